"""Label images with the job's own flow: inventory, plan, pools of actors, Parquet files.

It is what `mgmtn label` does, without the snapshot at its end, which is one small file.
"""

import time
from typing import Any

import ray

from jobs.bench_sides import Result, Side
from jobs.cluster import ClusterSettings, joined, share, totals
from jobs.data.inventory import take_inventory
from jobs.data.models import resolve_model
from jobs.data.pipeline import label_flow
from jobs.data.plan import PLAN_COLUMNS, make_plan
from jobs.data.sink import LabelSink
from jobs.data.snapshots import LabelTable
from jobs.data.stages import FaceWork
from mgmtn.images import ImageLimits
from mgmtn.network import NetworkSettings


@ray.remote(num_cpus=0)
class Clock:
    """Counts what left the model, and remembers when the first of it did."""

    def __init__(self) -> None:
        self.began, self.first, self.images, self.faces = 0.0, 0, 0, 0

    def add(self, counts: dict[str, int]) -> None:
        """The images by status that left the model together and, under `faces`, their faces."""
        images = sum(counts.values()) - counts["faces"]
        if not self.first:
            self.began, self.first = time.time(), images
        self.images += images
        self.faces += counts["faces"]

    def get(self) -> tuple[float, int, int, int]:
        return self.began, self.first, self.images, self.faces


def label(side: Side) -> Result:
    """Label the images on a cluster of this machine."""
    checkpoint = resolve_model(side.model)
    card = checkpoint.card
    assert isinstance(card.network, NetworkSettings), f"{side.model} predicts {card.kind}, not attributes"
    current = LabelTable(side.labels).read(None, columns=PLAN_COLUMNS)
    work = FaceWork(
        detector=side.detector,
        limits=ImageLimits(),
        mode=side.faces,
        image_size=card.network.image_size,
        draw_masks=False,
        model_id=card.model_id,
        run_id="bench",
    )
    with joined(ClusterSettings(num_cpus=side.cpus)):
        clock: Any = Clock.remote()  # type: ignore[attr-defined]  # added by Ray
        resources = totals()
        label_flow(
            make_plan(take_inventory(side.files), current, model_id=card.model_id).due,
            work=work,
            checkpoint=ray.put(checkpoint),
            pools=share(cpus=resources["CPU"], gpus=resources["GPU"], face_workers=None, model_workers=None),
            batch_size=side.batch_size,
            images_per_block=side.images_per_block,
            progress=clock,
        ).write_datasink(
            LabelSink(side.labels, model_id=card.model_id, run_id="bench"), ray_remote_args={"num_cpus": 0}
        )
        end = time.time()
        began, first, images, faces = ray.get(clock.get.remote())
    return Result(images=images, faces=faces, first=first, seconds=end - began)
