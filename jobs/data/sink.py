"""Where labelled rows leave Ray Data: each write task makes one file; the driver learns the facts to commit."""

import logging
from collections.abc import Iterable
from typing import Final

import pyarrow as pa
from ray.data import Datasink
from ray.data._internal.execution.interfaces import TaskContext
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import WriteResult

from jobs.data.object_store import canonical_uri, join, open_store, relative
from jobs.data.parts import FileFacts, part_directory, read_facts, write_part
from mgmtn.errors import MgmtnError

__all__ = ["FileFacts", "LabelSink", "write_part"]

log = logging.getLogger(__name__)

MIN_ROWS_PER_WRITE: Final = 122_880


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
        min_rows_per_write: int = MIN_ROWS_PER_WRITE,
    ) -> None:
        """
        Args:
            labels_uri: the table's folder.
            model_id: of the checkpoint that labels; names the folder.
            run_id: names the folder; no other run may share it.
            thresholds_id: of the thresholds behind `labels`.
            min_rows_per_write: rows that Ray gathers for a file; the last one may have fewer. Bounds a worker's memory:
                about 1 KB a row.

        Raises:
            ConfigError: if an id cannot be part of a path.
        """
        self.files: tuple[FileFacts, ...] = ()
        self._labels_uri = canonical_uri(labels_uri)
        self._directory = part_directory(model_id, run_id)
        self._model_id, self._run_id, self._thresholds_id = model_id, run_id, thresholds_id
        self._min_rows = min_rows_per_write

    @property
    def min_rows_per_write(self) -> int:
        """Ray joins whole blocks up to this many rows and cuts none, so an image's faces stay together."""
        return self._min_rows

    def write(self, blocks: Iterable[Block], ctx: TaskContext) -> FileFacts | None:
        """Write one task's rows as one file; None if there are none."""
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        tables = [table for table in tables if table.num_rows]
        if not tables:
            return None
        return write_part(
            pa.concat_tables(tables, promote_options="permissive"),
            store=open_store(self._labels_uri),
            labels_uri=self._labels_uri,
            model_id=self._model_id,
            run_id=self._run_id,
            thresholds_id=self._thresholds_id,
        )

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
