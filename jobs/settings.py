"""The settings of every program, how they are loaded, and how a program's ending becomes an exit code.

A program declares its settings as a subclass of `Settings`, writes `run(settings)`, and ends in

```python
def main(argv: Sequence[str] | None = None) -> int:
    return run_program(QuerySettings, run, argv, prog="mgmtn query", description=__doc__)
```
"""

import logging
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_core import to_json
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from jobs.data.object_store import canonical_uri, file_place
from jobs.outcomes import EXIT_INTERRUPTED, EXIT_USAGE, exit_code_of
from jobs.setting_sources import read_sources, unknown_variables
from mgmtn.errors import ConfigError, MgmtnError

log = logging.getLogger(__name__)

_LOG_FORMAT: Final = "time=%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"
_NO_SETTINGS: Final = frozenset({"MGMTN_CACHE"})  # read elsewhere: where a copy of an object in S3 is kept
_OUR_LOGGERS: Final = ("mgmtn", "jobs", "__main__")


def configure_logging(*, verbose: bool = False) -> None:
    """Log to stderr, one line per event, `key=value`, times in UTC. Only a program's `main` calls this.

    Our own loggers speak from INFO (DEBUG where `verbose`), those of libraries from WARNING.
    """
    handler = _Stderr()
    handler.set_name("mgmtn")
    formatter = _OneLine(_LOG_FORMAT, datefmt="%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in [old for old in root.handlers if old.get_name() == "mgmtn"]:
        root.removeHandler(old)
    root.addHandler(handler)
    for name in _OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)


def print_summary(summary: Mapping[str, Any]) -> None:
    """Write a result as one JSON object on one line of stdout; numpy becomes numbers and lists, nan and infinity null.

    Raises:
        PydanticSerializationError: if a value has no JSON form.
    """
    print(to_json(dict(summary), inf_nan_mode="null", fallback=_plain).decode(), flush=True)


def _plain(value: Any) -> Any:
    if not callable(getattr(value, "tolist", None)):
        raise TypeError(f"a summary cannot hold a {type(value).__name__}: {value!r}")
    return value.tolist()


class _Stderr(logging.StreamHandler):
    """Whatever stderr is when an event comes, not what it was when logging was configured."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _OneLine(logging.Formatter):
    """A message stays on its line; only a traceback takes more."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = record.message.replace("\n", "\\n")
        return super().formatMessage(record)


class Settings(BaseSettings):
    """Root of every program's settings.

    A flag is the field's name in kebab case; a field typed `CliPositionalArg[...]` is a positional argument; a nested
    model is a group, `--fan.weights`. Every description gives the unit and the effect. Built directly, as tests do, it
    reads neither the environment nor a file: `load` does. The default of a nested model is the model's own defaults
    (`Field(default_factory=FanSettings)`), since a single flag of the group replaces any other default as a whole.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="MGMTN_",
        env_nested_delimiter="__",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_parse_none_str="null",
        cli_hide_none_type=True,
    )

    config: Path | None = Field(
        None, exclude=True, description="TOML file of settings; its keys are the flags' names with _ for -"
    )
    verbose: bool = Field(False, exclude=True, description="log debug events too")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed: `load` has asked the other sources already, each once."""
        return (init_settings,)


S = TypeVar("S", bound=Settings)


def _checked(named: Callable[[str], str]) -> Callable[[str], str]:
    def check(text: str) -> str:
        try:
            named(text)
        except ConfigError as error:
            # So that pydantic adds the field; and the value, which need not be there twice.
            raise ValueError(str(error).removeprefix(f"{text!r}: ")) from error
        return text

    return check


Place = Annotated[str, BeforeValidator(str), AfterValidator(_checked(canonical_uri))]  # a local path, or an s3:// URI
FilePlace = Annotated[str, BeforeValidator(str), AfterValidator(_checked(file_place))]


def load(cls: type[S], argv: Sequence[str] | None = None, *, prog: str, description: str = "") -> S:
    """Settings from flags, over the environment (`MGMTN_...`), over the file of `--config`, over defaults.

    Raises:
        SystemExit: 2 after printing every error, each naming setting and value, on stderr; 0 after `--help`.
    """
    try:
        said = read_sources(cls, sys.argv[1:] if argv is None else argv, prog=prog, description=description)
    except ConfigError as error:
        _stop(prog, [str(error)])
    problems = said.explain_unknown()
    try:
        settings = cls(**said.merged())
    except ValidationError as error:
        problems += [said.explain(details) for details in error.errors(include_url=False)]
    except MgmtnError as error:
        problems.append(str(error))
    if problems:
        _stop(prog, problems)
    return settings


def flags_of(settings: Settings) -> list[str]:
    """The flags that, without an environment, load these settings: the file of `--config`, and what differs from it."""
    told = {} if settings.config is None else tomllib.loads(settings.config.read_text(encoding="utf-8"))
    flags = [] if settings.config is None else ["--config", str(settings.config)]
    in_file = dict(_named(told))
    for name, value in _named(settings.model_dump(mode="json", exclude_unset=True)):
        if name not in in_file or in_file[name] != value:
            flags += _flag(name.replace("_", "-"), value)
    return flags


def _named(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _named(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", ",".join(map(str, value))]
    return [f"--{name}", "null" if value is None else str(value)]


def run_program(
    cls: type[S],
    run: Callable[[S], Mapping[str, Any] | None],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str = "",
) -> int:
    """Load the settings, configure logging, run, print the summary, and return the exit code (see `jobs.outcomes`).

    A mapping that `run` returns is the last line of stdout. Errors that we foresee become one line on stderr; any other
    leaves as it came, so that Python shows its traceback and exits with 1.
    """
    try:
        settings = load(cls, argv, prog=prog, description=description)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else EXIT_USAGE
    configure_logging(verbose=settings.verbose)
    for name, hint in unknown_variables(cls, set(os.environ) - _NO_SETTINGS):
        log.warning("unknown_variable=%s reason=%r", name, f"no setting of {prog} has this name{hint}")
    try:
        return _finish(prog, run, settings)
    except BrokenPipeError:
        return leave_closed_pipe()
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def leave_closed_pipe() -> int:
    """The exit code when our reader (`| head`) has read enough: success. Python's own last flush must be silent too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _finish(prog: str, run: Callable[[S], Mapping[str, Any] | None], settings: S) -> int:
    try:
        summary, code = run(settings), 0
    except MgmtnError as error:
        wanted = exit_code_of(error)
        if wanted is None:
            raise
        print(f"{prog}: {error}", file=sys.stderr)
        summary, code = getattr(error, "summary", None), wanted
    if summary is not None:
        print_summary(summary)
    sys.stdout.flush()
    return code


def _stop(prog: str, problems: Sequence[str]) -> NoReturn:
    count = "1 setting is wrong" if len(problems) == 1 else f"{len(problems)} settings are wrong"
    print(f"{prog}: {count} (see {prog} --help)", *(f"  {line}" for line in problems), sep="\n", file=sys.stderr)
    raise SystemExit(EXIT_USAGE)
