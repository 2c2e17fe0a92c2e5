"""Distributions of a table's numbers, and examples of what failed, in one pass over few of its columns.

Memory holds one row group's columns and the counts, whatever the table's size.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.data.schema import STATUSES, Status

# What a pass needs of each row.
STATISTICS_COLUMNS: Final = (
    "uri",
    "size",
    "width",
    "height",
    "status",
    "error",
    "attempts",
    "face_index",
    "face_count",
    "detection_score",
    "sharpness",
    "face_size",
)


@dataclass
class Histogram:
    """Counts of values between edges; what lies outside is counted in the first or the last bin.

    Attributes:
        title: of the quantity.
        unit: empty for a pure number.
        edges: ascending, one more than bins.
        note: what a reader should know about it.
        whole: the values are whole numbers, and each bin is that of one.
    """

    title: str
    unit: str
    edges: np.ndarray
    note: str = ""
    whole: bool = False
    counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.edges) - 1, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count values; nan is nothing."""
        values = values[np.isfinite(values)]
        bins = np.searchsorted(self.edges, values, side="right") - 1
        self.counts += np.bincount(np.clip(bins, 0, len(self.counts) - 1), minlength=len(self.counts))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def quantile(self, share: float) -> float | None:
        """The value below which a share of all lies, by interpolation in its bin; None where nothing was counted."""
        if not self.total:
            return None
        wanted, below = share * self.total, np.concatenate([[0], np.cumsum(self.counts)])
        position = int(np.clip(np.searchsorted(below, wanted, side="left") - 1, 0, len(self.counts) - 1))
        inside = (wanted - below[position]) / max(int(self.counts[position]), 1)
        low, high = self.edges[position], self.edges[position + 1]
        return float(low if self.whole else low + np.clip(inside, 0, 1) * (high - low))

    @property
    def last(self) -> float:
        """What stands at the end of the axis: the last edge, or the last whole number, which stands for more too."""
        return float(self.edges[-2] if self.whole else self.edges[-1])


def _histograms() -> dict[str, Histogram]:
    return {
        "detection_score": Histogram(
            "Detection score", "", np.linspace(0, 1, 25), "how sure the detector was of a face"
        ),
        "sharpness": Histogram(
            "Sharpness",
            "",
            np.geomspace(1, 10_000, 25),
            "variance of the Laplacian; blurred below about 20",
        ),
        "face_size": Histogram("Face size", "px", np.geomspace(8, 2048, 25), "root of the box's area"),
        "face_count": Histogram("Faces in an image", "", np.arange(12.0), whole=True),
        "pixels": Histogram("Image size", "MP", np.geomspace(0.001, 128, 25), "width x height"),
        "size": Histogram("File size", "KB", np.geomspace(1, 65_536, 25)),
    }


@dataclass
class TableStatistics:
    """What one pass over a snapshot's rows finds.

    Attributes:
        histograms: by quantity.
        problems: for each status but `ok`, the first rows that have it.
    """

    examples: int = 6
    histograms: dict[str, Histogram] = field(default_factory=_histograms)
    problems: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, batch: pa.RecordBatch) -> None:
        """Count a batch of rows with `STATISTICS_COLUMNS`."""
        faces = batch.filter(pc.greater_equal(batch["face_index"], 0))
        for name in ("detection_score", "sharpness", "face_size"):
            self.histograms[name].add(_floats(faces[name]))
        # Exactly one row of an image has its face_index at 0 or below.
        images = batch.filter(pc.less_equal(batch["face_index"], 0))
        readable = images.filter(images["width"].is_valid())
        self.histograms["face_count"].add(_floats(readable["face_count"]))
        self.histograms["pixels"].add(_floats(readable["width"]) * _floats(readable["height"]) / 1e6)
        self.histograms["size"].add(_floats(images["size"]) / 1024)
        self._keep_problems(images)

    def _keep_problems(self, images: pa.RecordBatch) -> None:
        for status in STATUSES:
            kept = self.problems.setdefault(status, [])
            if status != Status.OK and len(kept) < self.examples:
                found = images.filter(pc.equal(images["status"], status)).slice(0, self.examples - len(kept))
                kept += found.select(["uri", "status", "error", "attempts"]).to_pylist()


def measure(batches: Iterable[pa.RecordBatch], *, examples: int = 6) -> TableStatistics:
    """One pass over rows with `STATISTICS_COLUMNS`."""
    statistics = TableStatistics(examples=examples)
    for batch in batches:
        statistics.add(batch)
    return statistics


def _floats(column: pa.Array) -> np.ndarray:
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
