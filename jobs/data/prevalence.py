"""How common each attribute is among the faces of a table, counted by its labels: the model's thresholds have decided.

The facts of a file hold its counts, so that a table of any size is counted from its snapshot alone.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from mgmtn.attributes import ATTRIBUTES

if TYPE_CHECKING:
    from jobs.data.parts import FileFacts
    from jobs.data.snapshots import LabelTable


class LabelCounts(BaseModel):
    """Faces that have labels, and how many of them have each attribute."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    faces: int = Field(ge=0, description="faces with labels")
    positives: dict[str, int] = Field(description="those of them that have the attribute, for each of the 40")

    @property
    def shares(self) -> dict[str, float]:
        """Prevalence by attribute, from 0 to 1; empty where no face has labels."""
        if not self.faces:
            return {}
        return {name: count / self.faces for name, count in self.positives.items()}


def prevalence(table: "LabelTable", files: Iterable["FileFacts"]) -> dict[str, float]:
    """The share of the labelled faces of some of a table's files that have each attribute.

    Returns:
        From 0 to 1, in the attributes' order; empty where no face has labels.

    Raises:
        ConfigError: if a file must be read, since its facts hold no counts, and cannot be.
    """
    return label_counts(table, files).shares


def label_counts(table: "LabelTable", files: Iterable["FileFacts"]) -> LabelCounts:
    """The labels of some of a table's files, from their facts; of files without counts, the labels are read.

    Raises:
        ConfigError: if a file must be read and cannot be.
    """
    files = tuple(files)
    counts = [file.labels for file in files if file.labels is not None]
    uncounted = [file for file in files if file.labels is None]
    counts += (count_labels(batch["labels"]) for batch in table.read_files(uncounted, columns=("labels",)))
    return sum_counts(counts)


def sum_counts(counts: Iterable[LabelCounts]) -> LabelCounts:
    """The counts of several lots of faces together."""
    faces, positives = 0, dict.fromkeys(ATTRIBUTES, 0)
    for part in counts:
        faces += part.faces
        positives = {name: count + part.positives[name] for name, count in positives.items()}
    return LabelCounts(faces=faces, positives=positives)


def count_labels(labels: pa.Array | pa.ChunkedArray) -> LabelCounts:
    """Count a column `labels`: uint64, bit k set for attribute k, null in a row without labels."""
    bits = labels.drop_null().to_numpy()
    counts = [int(np.count_nonzero(bits & np.uint64(1 << k))) for k in range(len(ATTRIBUTES))]
    return LabelCounts(faces=len(bits), positives=dict(zip(ATTRIBUTES, counts, strict=True)))
