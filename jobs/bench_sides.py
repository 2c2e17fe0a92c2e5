"""The two sides of the benchmark; `jobs.bench` starts each in a process of its own, with a `Side` in a file.

`job` is the labelling flow on a Ray cluster of this machine: `jobs.bench_job`. `loop` is what one would write without
it: `jobs.bench_loop`. Both use the same files, model, detector and number of CPUs.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from mgmtn.landmarks import DetectorSettings

SideName = Literal["loop", "job"]


class Side(BaseModel):
    """What a side is to do.

    Attributes:
        files: paths of the images.
        labels: folder for the job's table; the loop writes nothing.
        model: a model that ships, or a checkpoint's folder.
        batch_size: faces in one forward pass.
        images_per_block: that a worker of the job takes at a time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: SideName
    files: tuple[str, ...]
    labels: str
    model: str
    faces: Literal["detect", "whole-image"]
    detector: DetectorSettings
    cpus: int
    batch_size: int
    images_per_block: int


class Result(BaseModel):
    """What a side has done.

    Attributes:
        images, faces: how many were labelled; a broken image counts as one.
        first: images of the first block or chunk to be finished.
        seconds: from the end of that one to the end of all, what a side keeps included: startup is left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: int
    faces: int
    first: int
    seconds: float


def _label(name: SideName) -> Callable[[Side], Result]:
    # Imported by the side that it is: the plain loop must not pay for Ray.
    if name == "job":
        from jobs.bench_job import label

        return label
    from jobs.bench_loop import label as label_plainly

    return label_plainly


if __name__ == "__main__":
    side = Side.model_validate_json(Path(sys.argv[1]).read_bytes())
    print(_label(side.name)(side).model_dump_json(), flush=True)
