"""Measure the labelling job against a plain loop: `python -m jobs.bench`, or `make bench`.

Both label the same images with the same model, detector and number of CPUs, one after the other in this run;
`jobs.bench_loop` and `jobs.bench_job` say what each is. The ratio is what Ray, the plan and the table's files leave of
the plain loop's speed: 1.00 would be all of it. Nothing else should run on the machine.
"""

import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from PIL import Image, ImageEnhance
from pydantic import Field, PositiveInt
from pydantic_core import to_json
from pydantic_settings import CliPositionalArg

from jobs.bench_machine import machine
from jobs.bench_sides import Result, Side, SideName
from jobs.data.detection import DetectionSettings
from jobs.data.inventory import take_inventory
from jobs.data.object_store import local_path
from jobs.data.scratch import scratch_folder
from jobs.data.stages import FaceMode
from jobs.settings import Settings, run_program
from mgmtn.checkpoint import DEFAULT_MODEL
from mgmtn.errors import ConfigError

log = logging.getLogger(__name__)

_SIDES: Final[tuple[SideName, ...]] = ("loop", "job")
_SAMPLE_SECONDS: Final = 0.2  # between looks at memory: a look costs about 1 ms
_LONGER_SIDE: Final = 640  # pixels of the images that are made


class BenchSettings(DetectionSettings, Settings):
    """What is measured."""

    photos: CliPositionalArg[str] = Field("", description="folder of images; empty: the demo's photographs, varied")
    images: PositiveInt = Field(160, description="images made from the demo's photographs")
    repeats: PositiveInt = Field(3, description="runs of each side; the medians are reported")
    model: str = Field(DEFAULT_MODEL, description="a model that ships, or a checkpoint's folder")
    faces: tuple[FaceMode, ...] = Field(("whole-image", "detect"), description="how faces are had; each is measured")
    cpus: PositiveInt = Field(os.cpu_count() or 1, description="processes of the loop, CPUs of the job")
    batch_size: PositiveInt = Field(64, description="faces in one forward pass")
    images_per_block: PositiveInt = Field(32, description="images that a worker of the job takes at a time")
    output: Path | None = Field(None, description="JSON file for every single measurement")


def run(settings: BenchSettings) -> dict[str, Any]:
    """Measure, print a table, and return the ratios."""
    measured: list[dict[str, Any]] = []
    with scratch_folder("bench") as folder:
        files = image_files(settings, folder=folder)
        for mode in settings.faces:
            for repeat in range(settings.repeats):
                for name in _SIDES if repeat % 2 == 0 else _SIDES[::-1]:  # neither always finds the files in the cache
                    side = _side(settings, name=name, mode=mode, files=files, labels=f"{folder}/{mode}-{repeat}")
                    measured.append({"faces_mode": mode, "repeat": repeat, "side": name} | measure(side))
                    log.info("measured %s", " ".join(f"{key}={value}" for key, value in measured[-1].items()))
    report = {"machine": machine(settings.cpus), "ratios": ratios(measured), "measured": measured}
    if settings.output is not None:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_bytes(to_json(report, indent=1, inf_nan_mode="null") + b"\n")
    print(markdown(measured), flush=True)
    return {"machine": report["machine"], "ratios": report["ratios"]}


def image_files(settings: BenchSettings, *, folder: Path) -> tuple[str, ...]:
    """Paths of the images to label: those of the user's folder, or made ones.

    Raises:
        ConfigError: there is no such folder, or nothing in it.
    """
    photos = settings.photos or str(make_images(folder, count=settings.images))
    files = tuple(sorted(local_path(uri) for uri in take_inventory(photos)["uri"].to_pylist()))
    if not files:
        raise ConfigError(f"photos: no images in {photos!r}")
    return files


def _side(settings: BenchSettings, *, name: SideName, mode: FaceMode, files: tuple[str, ...], labels: str) -> Side:
    return Side(
        name=name,
        files=files,
        labels=labels,
        model=settings.model,
        faces=mode,
        detector=settings.detector_settings(),
        cpus=settings.cpus,
        batch_size=settings.batch_size,
        images_per_block=settings.images_per_block,
    )


def make_images(folder: Path, *, count: int) -> Path:
    """Different files from the demo's photographs: random crops, half of them mirrored, lighter or darker.

    Returns:
        The folder of the images: JPEG, 640 pixels on the longer side.
    """
    source, images = folder / "demo", folder / "images"
    subprocess.run([sys.executable, "-m", "jobs.demo", str(source)], check=True, stdout=subprocess.DEVNULL)
    photographs = [Image.open(path).convert("RGB") for path in sorted(source.iterdir()) if path.name != "torn.jpg"]
    images.mkdir()
    random = np.random.default_rng(0)
    for index in range(count):
        image = photographs[index % len(photographs)]
        width, height = (round(side * random.uniform(0.7, 1)) for side in image.size)
        left, top = int(random.integers(image.width - width + 1)), int(random.integers(image.height - height + 1))
        scale = _LONGER_SIDE / max(width, height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = ImageEnhance.Brightness(image).enhance(random.uniform(0.8, 1.2))
        image.save(images / f"{index:05d}.jpg", quality=90)
    return images


def measure(side: Side) -> dict[str, Any]:
    """Run one side in a process of its own.

    Returns:
        `images`, `faces`; `rate_warm`, images per second from the end of the first block or chunk, startup excluded;
        `rate_cold`, over the whole life of the process; the peaks of memory, see `Memory`.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(side.model_dump_json())
        file.flush()
        started, memory = time.monotonic(), Memory()
        command = [sys.executable, "-m", "jobs.bench_sides", file.name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                memory.look(psutil.Process(process.pid))
                time.sleep(_SAMPLE_SECONDS)
            seconds = time.monotonic() - started
            assert process.stdout is not None, "it is a pipe"
            output = process.stdout.read()
    if process.returncode != 0:
        raise RuntimeError(f"the {side.name} ended with {process.returncode}; what it said stands above")
    result = Result.model_validate_json(output.splitlines()[-1])
    warm = result.images - result.first
    return {
        "images": result.images,
        "faces": result.faces,
        "rate_warm": round(warm / result.seconds, 2) if warm else math.nan,
        "rate_cold": round(result.images / seconds, 2),
        **{f"{part}_mb": round(peak / 1e6) for part, peak in memory.peaks.items()},
    }


class Memory:
    """Peaks of resident memory of a process and its descendants, bytes.

    `driver` is the process itself; `workers` those that label, Ray's idle ones too; `services` the rest of Ray; `total`
    all at one moment. Pages that processes share, such as Ray's object store and code, are counted in each.
    """

    def __init__(self) -> None:
        self.peaks = dict.fromkeys(("driver", "workers", "services", "total"), 0)

    def look(self, root: psutil.Process) -> None:
        now = dict.fromkeys(self.peaks, 0)
        try:
            processes = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                part = "driver" if process.pid == root.pid else _part_of(process.cmdline())
                size = process.memory_info().rss
            except (psutil.NoSuchProcess, psutil.ZombieProcess):  # ended since it was listed
                continue
            now[part] += size
            now["total"] += size
        self.peaks = {part: max(peak, now[part]) for part, peak in self.peaks.items()}


def _part_of(command: Sequence[str]) -> str:
    line = " ".join(command)
    return "workers" if line.startswith("ray::") or "multiprocessing" in line else "services"


def ratios(measured: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The job's rate by the loop's, per way of having faces: the median over repeats, the lowest and the highest.

    Each repeat's sides are divided by each other, since they ran next to each other.
    """
    result: dict[str, dict[str, Any]] = {}
    for mode in dict.fromkeys(row["faces_mode"] for row in measured):
        result[mode] = {}
        for rate in ("rate_warm", "rate_cold"):
            by_side = {
                name: {row["repeat"]: row[rate] for row in measured if (row["faces_mode"], row["side"]) == (mode, name)}
                for name in _SIDES
            }
            found = [by_side["job"][repeat] / by_side["loop"][repeat] for repeat in by_side["loop"]]
            result[mode][rate] = {
                "median": round(statistics.median(found), 3),
                "lowest": round(min(found), 3),
                "highest": round(max(found), 3),
            }
    return result


def markdown(measured: Sequence[Mapping[str, Any]]) -> str:
    """A table of medians, and of the ratios between them."""
    lines = [
        "| faces | side | images/s, startup excluded | included | driver MB | workers MB | services MB | all MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for mode, of_mode in ratios(measured).items():
        for name in _SIDES:
            rows = [row for row in measured if (row["faces_mode"], row["side"]) == (mode, name)]
            rates = [f"{statistics.median(row[rate] for row in rows):.1f}" for rate in ("rate_warm", "rate_cold")]
            peaks = [
                f"{statistics.median(row[f'{part}_mb'] for row in rows):.0f}"
                for part in ("driver", "workers", "services", "total")
            ]
            lines.append(f"| {mode} | {name} | {' | '.join(rates + peaks)} |")
        shares = [
            f"**{ratio['median']:.2f}** ({ratio['lowest']:.2f} to {ratio['highest']:.2f})" for ratio in of_mode.values()
        ]
        lines.append(f"| {mode} | job / loop | {' | '.join(shares)} | | | | |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(BenchSettings, run, argv, prog="python -m jobs.bench", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
