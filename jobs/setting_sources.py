"""Where settings come from: flags, environment and TOML, each read by pydantic-settings from the one model.

Nothing here knows a setting by name: the parser and its help are built from the settings model, and what each source
said is kept apart so that an error can name the place to correct.
"""

import argparse
import difflib
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource, TomlConfigSettingsSource

from jobs.outcomes import EXIT_USAGE
from mgmtn.errors import ConfigError

HELP_WIDTH: Final = 100
_EPILOG: Final = (
    "Every setting can also come from the environment ({prefix}NAME, in a group {prefix}GROUP__NAME) or from\n"
    "the TOML file of --config. Flags win over the environment, which wins over the file."
)
_VALUE_WIDTH: Final = 80


def is_positional(info: FieldInfo) -> bool:
    """True for a field declared as `CliPositionalArg[...]`, whose marker class is not public."""
    return any(getattr(mark, "__name__", "") == "_CliPositionalArg" for mark in info.metadata)


def flag_of(names: Sequence[str], *, positionals: Mapping[str, str]) -> str:
    """`("fan", "weights")` -> `--fan.weights`; a positional setting is called as the help calls it."""
    if names and names[0] in positionals:
        return positionals[names[0]]
    return "--" + ".".join(names).replace("_", "-")


def variable_of(names: Sequence[str], *, prefix: str) -> str:
    """`("fan", "weights")` -> `MGMTN_FAN__WEIGHTS`."""
    return prefix + "__".join(names).upper()


def setting_names(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """The path of every setting, groups included: `("limit",)`, `("fan",)`, `("fan", "weights")`."""
    for name, info in model.model_fields.items():
        yield (name,)
        for nested in _models_in(info.annotation):
            yield from ((name, *rest) for rest in setting_names(nested))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from _models_in(part)


class SettingsParser(argparse.ArgumentParser):
    """Leaves judging to the model: nothing is required here, and what no setting claims is kept for the report."""

    def __init__(self, *, prog: str, description: str, prefix: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=_EPILOG.format(prefix=prefix),
            formatter_class=_help_formatter,
            allow_abbrev=False,
        )
        self.flags: list[str] = []
        self.positionals: dict[str, str] = {}
        self.unknown: list[str] = []

    def add_setting(self, context: Any, *names: str, **options: Any) -> None:
        """Add one setting as pydantic-settings describes it, to the parser or to a group of it."""
        positional = not names[0].startswith("-")
        if positional:
            # A positional may also come from the environment or the file, so argparse must not insist on it.
            required = options.get("nargs") in (None, "+")
            options["nargs"] = "*" if options.get("nargs") in ("*", "+") else "?"
            options["help"] = f"{options.get('help') or ''}{' (required)' if required else ''}".strip()
            self.positionals[names[0]] = options["metavar"]
        elif options.get("metavar"):
            options["metavar"] = _metavar(options["metavar"])
        if isinstance(options.get("help"), str):
            for empty in ("null", "()", "[]", ""):
                options["help"] = options["help"].replace(f"(default: {empty})", "(default: none)")
        action = context.add_argument(*names, **options)
        self.flags.extend(action.option_strings)

    def parse(self, _: Any, args: Sequence[str]) -> argparse.Namespace:
        """Read the arguments, in any order; what no setting claims goes to `unknown`."""
        self.usage = " ".join([self.prog, *map(self._usage_of, self._get_positional_actions()), "[settings]"])
        parsed, self.unknown = self.parse_known_intermixed_args(list(args))
        for name in self.positionals:
            value = getattr(parsed, name, None)
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                # As JSON the values arrive untouched; pydantic-settings would cut a path at its commas.
                setattr(parsed, name, json.dumps(value))
        return parsed

    def _usage_of(self, action: argparse.Action) -> str:
        name = f"{action.metavar}{'...' if action.nargs == '*' else ''}"
        return name if (action.help or "").endswith("(required)") else f"[{name}]"

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def _metavar(type_name: str) -> str:
    words = {"int": "N", "float": "X", "str": "TEXT", "Path": "PATH"}
    many = re.match(r"(?:list|tuple|set|frozenset)\[(\w+)", type_name)
    return f"{words.get(many[1], many[1])},..." if many else words.get(type_name, type_name)


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    width = min(HELP_WIDTH, shutil.get_terminal_size((HELP_WIDTH, 24)).columns)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=width)


class _Lenient:
    """Hands text that is not JSON to the model as it is: the model's error names the setting and what it expects."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)  # type: ignore[misc]
        except ValueError:
            return value


class _Flags(_Lenient, CliSettingsSource[Any]):
    """The command line."""


class _Environment(_Lenient, EnvSettingsSource):
    """The environment; a list may be given plainly, `MGMTN_COLUMNS=uri,young`."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        decoded = super().decode_complex_value(field_name, field, value)
        takes_list = field is not None and not any(_models_in(field.annotation))
        return decoded.split(",") if isinstance(decoded, str) and takes_list else decoded


def _read_toml(cls: type[BaseSettings], path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"--config {str(path)!r}: there is no such file")
    try:
        return TomlConfigSettingsSource(cls, toml_file=path)()
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config {str(path)!r}: not valid TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {str(path)!r}: cannot be read: {error}") from error


@dataclass
class Said:
    """What each source said about one settings model, and how to speak of a setting."""

    prefix: str
    names: list[tuple[str, ...]]
    flags: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    file: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    unknown: list[str] = field(default_factory=list)
    known_flags: list[str] = field(default_factory=list)
    positionals: dict[str, str] = field(default_factory=dict)

    def merged(self) -> dict[str, Any]:
        """One nested dict: flags over environment over file."""
        return _merge(_merge(self.file, self.environment), self.flags)

    def explain_unknown(self) -> list[str]:
        """A line for each argument that no setting claims."""
        return [f"{text}: unknown argument{_hint(text.split('=')[0], self.known_flags)}" for text in self.unknown]

    def explain(self, error: ErrorDetails) -> str:
        """One line of a validation error: the setting, where it was said, the value, what is wrong."""
        names, index = _path_in(error["loc"], self.merged())
        if not names:
            return error["msg"].removeprefix("Value error, ")
        flag = flag_of(names, positionals=self.positionals) + index
        if error["type"] == "missing":
            key, variable = ".".join(names), variable_of(names, prefix=self.prefix)
            return f"{flag}: required; give it here, as {variable}, or as `{key}` in the --config file"
        where, value = self._origin(names, flag=flag), _shown(error["input"])
        if error["type"] == "extra_forbidden":
            return f"{where}: {value}: no such setting{_hint('.'.join(names), ['.'.join(n) for n in self.names])}"
        return f"{where}: {value}: {error['msg'].removeprefix('Value error, ')}"

    def _origin(self, names: Sequence[str], *, flag: str) -> str:
        if _holds(self.flags, names):
            return flag
        if _holds(self.environment, names):
            return f"{variable_of(names, prefix=self.prefix)} ({flag})"
        if _holds(self.file, names):
            return f"{'.'.join(names)} in {self.path} ({flag})"
        return flag


def read_sources(cls: type[BaseSettings], argv: Sequence[str], *, prog: str, description: str) -> Said:
    """Ask the three sources.

    Raises:
        ConfigError: if the file of `--config` cannot be read.
        SystemExit: after `--help` (0), or where the arguments cannot be split into flags and values (2).
    """
    prefix = cls.model_config.get("env_prefix", "")
    parser = SettingsParser(prog=prog, description=description, prefix=prefix)
    flags = _Flags(
        cls,
        cli_parse_args=list(argv),
        root_parser=parser,
        parse_args_method=parser.parse,
        add_argument_method=parser.add_setting,
        formatter_class=_help_formatter,
    )
    said = Said(prefix=prefix, names=list(setting_names(cls)), flags=flags(), environment=_Environment(cls)())
    said.unknown, said.known_flags, said.positionals = parser.unknown, parser.flags, parser.positionals
    said.path = said.flags.get("config") or said.environment.get("config") or ""
    if said.path:
        said.file = _read_toml(cls, Path(said.path))
    return said


def unknown_variables(cls: type[BaseSettings], environment: Iterable[str]) -> list[tuple[str, str]]:
    """The variables with our prefix that set nothing in this model, each with a hint at what was meant."""
    prefix = cls.model_config.get("env_prefix", "")
    known = [variable_of(names, prefix=prefix) for names in setting_names(cls)]
    strange = [name for name in sorted(environment) if name.upper().startswith(prefix) and name.upper() not in known]
    return [(name, _hint(name, known)) for name in strange]


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _path_in(loc: Sequence[int | str], data: Any) -> tuple[list[str], str]:
    """The setting's path and list index in a pydantic location, which also names the members of unions."""
    names: list[str] = []
    index = ""
    for position, part in enumerate(loc):
        if isinstance(part, int):
            index += f"[{part}]"
            data = data[part] if isinstance(data, list) and part < len(data) else None
        elif isinstance(data, Mapping) and (part in data or position == len(loc) - 1):
            names.append(part)
            data = data.get(part)
    return names, index


def _holds(data: Any, names: Sequence[str]) -> bool:
    for name in names:
        if not isinstance(data, Mapping) or name not in data:
            return False
        data = data[name]
    return True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _VALUE_WIDTH else text[: _VALUE_WIDTH - 3] + "..."


def _hint(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
