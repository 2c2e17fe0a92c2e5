"""Gather a few real photographs to try mgmtn on: `python -m jobs.demo demo/photos`.

They lie in packages that are installed anyway; nothing is downloaded. Among them are pictures without a face, a collage
of two faces, and a file that is torn on purpose: its row in the label table says what is wrong with it.
"""

import importlib.util
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image
from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.settings import Settings, run_program
from mgmtn.errors import ConfigError

log = logging.getLogger(__name__)

# What is seen -> the package that carries it, and the file in it.
PHOTOGRAPHS: Final = {
    "astronaut.png": ("skimage", "data/astronaut.png"),  # Eileen Collins, NASA
    "admiral.jpg": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),  # Grace Hopper, US Navy
    "cat.png": ("skimage", "data/chelsea.png"),
    "coffee.png": ("skimage", "data/coffee.png"),
    "motorcycle.png": ("skimage", "data/motorcycle_left.png"),
    "rocket.jpg": ("skimage", "data/rocket.jpg"),
    "palace.jpg": ("sklearn", "datasets/images/china.jpg"),
    "flower.jpg": ("sklearn", "datasets/images/flower.jpg"),
}
COLLAGE: Final = "collage.jpg"
TORN: Final = "torn.jpg"

_COLLAGE_HEIGHT: Final = 480  # pixels


class DemoSettings(Settings):
    """Where the photographs go."""

    output: CliPositionalArg[Path] = Field(description="folder for the photographs; it is made")


def run(settings: DemoSettings) -> dict[str, Any]:
    """Write the photographs, the collage and the torn file. The same again changes nothing.

    Raises:
        ConfigError: if none of the packages with a face is installed.
    """
    settings.output.mkdir(parents=True, exist_ok=True)
    written = copy_photographs(settings.output)
    faces = [settings.output / name for name in ("astronaut.png", "admiral.jpg") if name in written]
    if not faces:
        raise ConfigError("the photographs come with scikit-image and matplotlib: pip install scikit-image matplotlib")
    write_collage(faces, path=settings.output / COLLAGE)
    # The first third of a photograph, as of a copy that broke off.
    whole = faces[-1].read_bytes()
    _write_once(settings.output / TORN, whole[: len(whole) // 3])
    return {"photographs": len(written) + 2, "output": str(settings.output)}


def copy_photographs(folder: Path) -> list[str]:
    """Copy what the installed packages have of `PHOTOGRAPHS`, and return its names."""
    written = []
    for name, (package, file) in PHOTOGRAPHS.items():
        source = _folder_of(package) / file
        if source.is_file():
            shutil.copy2(source, folder / name)  # with its time: an image with a new one counts as changed
            written.append(name)
        else:
            log.warning("photograph=%s missing_from=%s", name, package)
    return written


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # located, not imported: scikit-learn takes seconds
    return Path(spec.origin).parent if spec and spec.origin else Path(package)


def write_collage(faces: Sequence[Path], *, path: Path) -> None:
    """Photographs side by side, at one height: an image with several faces."""
    images = [Image.open(face).convert("RGB") for face in faces]
    images = [image.resize((round(image.width * _COLLAGE_HEIGHT / image.height), _COLLAGE_HEIGHT)) for image in images]
    collage = Image.new("RGB", (sum(image.width for image in images), _COLLAGE_HEIGHT))
    left = 0
    for image in images:
        collage.paste(image, (left, 0))
        left += image.width
    if not path.exists():
        collage.save(path, quality=92)


def _write_once(path: Path, data: bytes) -> None:
    if not path.exists():
        path.write_bytes(data)


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(DemoSettings, run, argv, prog="python -m jobs.demo", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
