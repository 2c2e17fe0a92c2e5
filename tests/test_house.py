"""The rules that keep the rooms apart: who imports whom, what the library offers, that what ships can be used."""

import ast
import importlib
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mgmtn
from jobs import cli
from jobs.settings import load
from mgmtn.errors import MgmtnError

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "mgmtn").rglob("*.py"))
DATA = sorted((ROOT / "jobs" / "data").rglob("*.py"))
PROGRAM_FILES = sorted((ROOT / "jobs").glob("*.py"))
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.toml"))
OF_THE_CLUSTER = {"ray", "boto3", "botocore", "prometheus_client", "jobs"}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its top or within a function, by its full name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def is_program(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


PROGRAMS = {f"jobs.{path.stem}" for path in PROGRAM_FILES if is_program(path)}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_model_library_knows_nothing_of_the_cluster(path):
    assert not {name.partition(".")[0] for name in imported(path)} & OF_THE_CLUSTER


@pytest.mark.parametrize("path", [*DATA, *PROGRAM_FILES], ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_imports_a_program(path):
    assert not imported(path) & PROGRAMS


def test_programs_are_told_from_what_they_share():
    assert {"jobs.label", "jobs.query", "jobs.cli"} <= PROGRAMS
    assert not {"jobs.cluster", "jobs.settings"} & PROGRAMS


@pytest.mark.parametrize("path", [*LIBRARY, *DATA, *PROGRAM_FILES], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_named_after_nothing(path):
    assert path.stem not in {"utils", "util", "helpers", "common", "base", "misc"}


def test_the_surface_of_the_library_is_what_it_says():
    assert len(set(mgmtn.__all__)) == len(mgmtn.__all__)
    for name in mgmtn.__all__:
        assert getattr(mgmtn, name) is not None
    assert set(mgmtn.__all__) <= set(dir(mgmtn))


def test_every_error_is_on_the_surface():
    tree, todo = set(), [MgmtnError]
    while todo:
        error = todo.pop()
        todo += [child for child in error.__subclasses__() if child.__module__ == "mgmtn.errors"]
        tree.add(error.__name__)
    assert tree <= set(mgmtn.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'mgmtn' has no attribute 'Labeler'"):
        mgmtn.Labeler  # noqa: B018


def test_the_names_of_attributes_come_without_torch():
    code = "import sys, mgmtn; mgmtn.ATTRIBUTES; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout == "False\n"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_that_ships_loads_with_the_command_in_its_header(path, monkeypatch):
    [command] = [
        line[1:]
        for line in path.read_text(encoding="utf-8").splitlines()
        if f"--config jobs/configs/{path.name}" in line
    ]
    name, *arguments = shlex.split(command)[1:]
    assert name in cli.COMMANDS
    program = importlib.import_module(f"jobs.{name}")
    loaded = []

    def only_load(cls, run, argv, *, prog, description=""):
        loaded.append(load(cls, argv, prog=prog, description=description))
        return 0

    monkeypatch.setattr(program, "run_program", only_load)
    monkeypatch.chdir(ROOT)
    assert program.main(arguments) == 0
    assert len(loaded) == 1


def test_what_ships_beside_the_code_is_packaged():
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "package-data"
    ]
    for package, patterns in packaged.items():
        covered = {path for pattern in patterns for path in (ROOT / package).glob(pattern)}
        beside = {path for path in (ROOT / package).rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        assert beside <= covered


def test_the_lock_pins_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = (ROOT / "deploy" / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for text in [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)])
    assert "opencv-python" not in pins
    assert "tensorflow" not in pins
