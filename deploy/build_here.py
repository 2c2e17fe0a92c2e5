"""Build the image's Python layers without a container engine: run the Containerfile's own commands in a folder.

  python3.11 deploy/build_here.py build/image            # several GB, as the image
  python3.11 deploy/build_here.py build/image --borrow   # packages of the Python that runs this, instead of the lock's

Instructions of the build stage are carried out with the paths of the image below the folder (`/opt/mgmtn` becomes
`build/image/opt/mgmtn`), and then the smoke command of the last stage. What needs the root of an image is left out and
named: its Debian packages, its user, its profile.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parents[1]
CONTAINERFILE: Final = ROOT / "deploy" / "Containerfile"
IMAGE_PATHS: Final = ("/opt/mgmtn", "/src", "/home/mgmtn")


class Instruction(NamedTuple):
    """One instruction; `stage` counts its FROMs, 0 before the first."""

    stage: int
    name: str
    value: str


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions of a Containerfile, continued lines joined, comments gone."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    stage = 0
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        name, _, value = line.strip().partition(" ")
        stage += name == "FROM"
        yield Instruction(stage, name, value.strip())


def ignored(path: str, rules: list[str]) -> bool:
    """Whether .dockerignore keeps a path of the context from the builder: the last rule that fits decides."""
    kept = True
    parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    for rule in rules:
        pattern = rule.removeprefix("!").rstrip("/")
        deep = pattern.removeprefix("**/")
        fits = any(fnmatch(parent, pattern) for parent in parents if parent.count("/") == pattern.count("/"))
        if deep != pattern:
            fits = any(fnmatch(Path(parent).name, deep) for parent in parents)
        if fits:
            kept = rule.startswith("!")
    return not kept


def ignore_rules() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def copy(sources: list[str], destination: Path) -> None:
    """COPY: a folder's content, or files into a folder."""
    rules = ignore_rules()
    for source in sources:
        path = ROOT / source
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            name = str(file.relative_to(ROOT))
            if file.is_dir() or ignored(name, rules):
                continue
            target = destination / (file.relative_to(path) if path.is_dir() else file.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)


def build(folder: Path, *, arguments: Mapping[str, str], borrow: bool) -> None:
    """Carry out the instructions.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MGMTN_")}
    # A virtual environment of ours must not shine through; the base image's Python is the one that runs this.
    base = sysconfig.get_config_var("BINDIR")
    environment["PATH"] = os.pathsep.join([str(base), "/usr/bin", "/bin"])
    work, user = folder, False
    for stage, name, value in instructions(CONTAINERFILE.read_text(encoding="utf-8")):
        here = re.sub("|".join(map(re.escape, IMAGE_PATHS)), lambda match: f"{folder}{match[0]}", value)
        user |= name == "USER"
        if name == "ARG" and stage == 1:
            key, _, default = value.partition("=")
            environment[key] = arguments.get(key, default)
        elif name == "ENV":
            for pair in shlex.split(here):
                key, _, said = pair.partition("=")
                environment[key] = said.replace("$PATH", environment["PATH"])
        elif name == "WORKDIR":
            work = Path(here)
            work.mkdir(parents=True, exist_ok=True)
        elif name == "COPY" and stage == 1:
            *sources, destination = value.split()
            copy(sources, work / destination)
        elif name == "RUN" and (stage == 1 or user):
            if borrow and "--require-hashes" in value:
                lend(folder)
                continue
            print(f"RUN {value}", file=sys.stderr, flush=True)
            subprocess.run(["bash", "-euo", "pipefail", "-c", here], check=True, cwd=work, env=environment)
        elif name == "RUN":
            print(f"not run, needs the root of an image: {value}", file=sys.stderr)


def lend(folder: Path) -> None:
    """Let the folder's environment see the packages of the Python that runs this."""
    [site] = (folder / "opt" / "mgmtn" / "lib").glob("python*/site-packages")
    # A new environment has a setuptools of its own, older than the lock's, which would come first.
    pip: list[str | Path] = [folder / "opt" / "mgmtn" / "bin" / "python", "-m", "pip"]
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "setuptools"], check=True)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="is emptied first")
    parser.add_argument("--borrow", action="store_true", help="install no package but mgmtn")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    said = parser.parse_args()
    arguments = dict(pair.split("=", 1) for pair in said.build_arg)
    build(said.folder.resolve(), arguments=arguments, borrow=said.borrow)
    return 0


if __name__ == "__main__":
    sys.exit(main())
