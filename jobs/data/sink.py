"""Where labelled rows leave Ray Data: each write task makes one file; the driver learns the facts to commit."""

import logging
import time
from collections.abc import Iterable
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Datasink
from ray.data._internal.execution.interfaces import TaskContext
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import WriteResult

from jobs.data.object_store import canonical_uri, join, open_store, relative
from jobs.data.parts import FileFacts, part_directory, read_facts, write_part
from jobs.data.schema import Status
from jobs.data.worker_metrics import worker_metrics
from mgmtn.attributes import ATTRIBUTES
from mgmtn.errors import MgmtnError

__all__ = ["FileFacts", "LabelSink", "write_part"]

log = logging.getLogger(__name__)

PREDICTED: Final = (*ATTRIBUTES, "labels")
OF_A_FACE: Final = (
    *("box_x1", "box_y1", "box_x2", "box_y2", "detection_score", "sharpness", "face_size", "landmarks"),
    *PREDICTED,
)

# About ten minutes of two cores' work, or one of a GPU's: what a run that dies can lose for each file it was gathering.
# `mgmtn compact` makes large files of them.
ROWS_PER_FILE: Final = 8_192


def one_outcome_each(rows: pa.Table) -> pa.Table:
    """Let an image of which some faces failed in the model have failed with all of them: one row, to be tried again.

    The model's stage takes faces in batches of a fixed size, and the faces of an image may lie in two of them.
    """
    failed = rows.filter(pc.is_in(rows["status"], value_set=pa.array([Status.MODEL_ERROR, Status.CRASHED])))
    if not failed.num_rows:
        return rows
    outcomes = failed.group_by("image_id", use_threads=False).aggregate([("status", "first"), ("error", "first")])
    hit = pc.is_in(rows["image_id"], value_set=outcomes["image_id"])
    images = rows.filter(pc.and_(hit, pc.less_equal(rows["face_index"], 0)))
    outcomes = outcomes.take(pc.index_in(images["image_id"], value_set=outcomes["image_id"]))
    for name in ("status", "error"):
        images = _with(images, name, outcomes[f"{name}_first"])
    for name, value in {**dict.fromkeys(OF_A_FACE), "face_index": -1, "face_count": 0}.items():
        images = _with(images, name, pa.repeat(pa.scalar(value, images.schema.field(name).type), len(images)))
    return pa.concat_tables([rows.filter(pc.invert(hit)), images])


def _with(rows: pa.Table, name: str, column: pa.ChunkedArray | pa.Array) -> pa.Table:
    field = rows.schema.field(name)
    return rows.set_column(rows.schema.get_field_index(name), field, column.cast(field.type))


class LabelSink(Datasink[FileFacts | None]):
    """Writes rows of the label table into a run's folder. Nothing of it is part of the table until a snapshot lists it.

    After the write, `files` holds the facts of every finished file, of a failed write too: there from the files
    themselves, since Ray hands over no results of a write that failed.
    """

    def __init__(
        self,
        labels_uri: str,
        *,
        model_id: str,
        run_id: str,
        thresholds_id: str | None = None,
        rows_per_file: int = ROWS_PER_FILE,
    ) -> None:
        """
        Args:
            labels_uri: the table's folder.
            model_id: of the checkpoint that labels; names the folder.
            run_id: names the folder; no other run may share it.
            thresholds_id: of the thresholds behind `labels`.
            rows_per_file: rows that Ray gathers for a file, which is written as soon as they are there; the last one
                may have fewer. Bounds a worker's memory: about 1 KB a row.

        Raises:
            ConfigError: if an id cannot be part of a path.
        """
        self.files: tuple[FileFacts, ...] = ()
        self._labels_uri = canonical_uri(labels_uri)
        self._directory = part_directory(model_id, run_id)
        self._model_id, self._run_id, self._thresholds_id = model_id, run_id, thresholds_id
        self._rows_per_file = rows_per_file

    @property
    def min_rows_per_write(self) -> int:
        """Ray joins whole blocks up to this many rows and cuts none, so an image's faces stay together."""
        return self._rows_per_file

    def write(self, blocks: Iterable[Block], ctx: TaskContext) -> FileFacts | None:
        """Write one task's rows, whole images, as one file; None if there are none."""
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        tables = [table for table in tables if table.num_rows]
        if not tables:
            return None
        started = time.perf_counter()
        facts = write_part(
            one_outcome_each(pa.concat_tables(tables, promote_options="permissive")),
            store=open_store(self._labels_uri),
            labels_uri=self._labels_uri,
            model_id=self._model_id,
            run_id=self._run_id,
            thresholds_id=self._thresholds_id,
        )
        seconds = time.perf_counter() - started
        worker_metrics().time_stage("write", seconds=seconds, images=sum(facts.images.values()))
        return facts

    def on_write_complete(self, write_result: WriteResult[FileFacts | None]) -> None:
        """Keep the facts for the commit, which is the program's decision."""
        facts = {part.path: part for part in write_result.write_returns if part is not None}
        self.files = tuple(facts[path] for path in sorted(facts))

    def on_write_failed(self, error: Exception) -> None:
        """Keep the facts of what was finished; the error itself goes on to the caller."""
        try:
            self.files = self.finished()
        except MgmtnError as unreadable:
            log.warning("finished_files=unknown directory=%s error=%s", self._directory, unreadable)
        log.error("write=failed finished_files=%d error=%s", len(self.files), error)

    def finished(self) -> tuple[FileFacts, ...]:
        """The facts of every whole file in the run's folder.

        A task that ran twice may have left two files with the same images.

        Raises:
            MgmtnError: if they cannot be read.
        """
        store, folder = open_store(self._labels_uri), join(self._labels_uri, self._directory)
        # The folder comes with its first file.
        listed = (relative(info.uri, folder=self._labels_uri) for info in store.list(folder + "/", missing_ok=True))
        paths = sorted(path for path in listed if path.endswith(".parquet"))
        return tuple(read_facts(path, store=store, labels_uri=self._labels_uri) for path in paths)
