"""How long a run will take, by what the last ones took."""

from collections.abc import Iterator
from itertools import islice
from typing import Final

from jobs.data.snapshots import LabelTable, Snapshot
from mgmtn.errors import ConfigError

_RUNS: Final = 5
_LOOK_BACK: Final = 20  # snapshots; some are of compactions and deletions


def expected_seconds(table: LabelTable, current: Snapshot | None, *, images: int, model_id: str) -> float | None:
    """Seconds for so many images at the pace of the last runs, those of the same model if there are any.

    It includes what these took to start, so that after small runs it is too long for a large one. None if no run is
    known that labelled an image.
    """
    recent = [(snapshot.model_id, snapshot.pace) for snapshot in _back_from(table, current) if snapshot.pace]
    same = [pace for model, pace in recent if model == model_id]
    paces = list(islice(same or [pace for _, pace in recent], _RUNS))
    if not paces:
        return None
    return images * sum(pace.seconds for pace in paces) / sum(pace.images for pace in paces)


def _back_from(table: LabelTable, current: Snapshot | None) -> Iterator[Snapshot]:
    """The last snapshots, the latest first, as far as they have not been vacuumed."""
    snapshot = current
    for _ in range(_LOOK_BACK):
        if snapshot is None:
            return
        yield snapshot
        try:
            snapshot = table.at(snapshot.parent) if snapshot.parent else None
        except ConfigError:
            return
