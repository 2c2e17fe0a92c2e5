"""Rewrite many small files of a table as few large ones, their rows unchanged.

The rows are first cut into ranges of image_id on this machine's disk, then each range is sorted and becomes a row
group: memory holds one range, whatever the table's size, and every file is read once. Files of different models, or
different thresholds, are never put together.
"""

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from tempfile import gettempdir
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.data.object_store import CHUNK, file_sha256, is_s3, join, local_path
from jobs.data.parts import ROW_GROUP_ROWS, FileFacts, write_sorted
from jobs.data.schema import SORT_KEYS, TABLE_SCHEMA
from jobs.data.scratch import scratch_folder
from jobs.data.snapshots import LabelTable, Snapshot
from mgmtn.errors import ConfigError, FetchError

# A range holds about this many: hashes do not fall quite evenly, and a row group should not split for a few rows.
_RANGE_ROWS: Final = round(0.95 * ROW_GROUP_ROWS)
_READ_ROWS: Final = 32_768


@dataclass(frozen=True)
class Lot:
    """Files of one model that are to be put together, and into how many."""

    files: tuple[FileFacts, ...]
    files_after: int

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)


def choose_lots(snapshot: Snapshot, *, rows_per_file: int, all_files: bool = False) -> tuple[Lot, ...]:
    """What is worth rewriting: small files, of which a model has several.

    Args:
        snapshot: the current one.
        rows_per_file: wanted in each new file, about; a file with less than half of it is small.
        all_files: large files too, unless a model's files are as they should be: large, and none overlaps another.
    """

    def generation(file: FileFacts) -> tuple[str, str]:
        return file.model_id, file.thresholds_id or ""

    lots = []
    for _, group in groupby(sorted(snapshot.files, key=generation), key=generation):
        files = sorted(group, key=lambda file: (file.min_image_id, file.path))
        small = [file for file in files if 2 * file.rows < rows_per_file]
        disjoint = all(one.max_image_id < other.min_image_id for one, other in pairwise(files))
        chosen = files if all_files and not (disjoint and len(small) < 2) else small
        # Rounded, not up: halves of a little more than one file would be small again.
        files_after = max(1, round(sum(file.rows for file in chosen) / rows_per_file))
        if len(chosen) > 1:
            lots.append(Lot(tuple(chosen), files_after))
    return tuple(lots)


def rewrite(table: LabelTable, lot: Lot, *, run_id: str, scratch: Path | None = None) -> tuple[FileFacts, ...]:
    """Write a lot's rows into new files, which follow each other by image_id.

    Args:
        table: the table that the files belong to.
        lot: from `choose_lots`.
        run_id: names the folder of the new files; the rows keep their own.
        scratch: a folder for the rows in between, about 1 KB each; None for the system's.

    Returns:
        The facts of the new files, not yet part of the table.

    Raises:
        ConfigError: a file is missing, damaged or not to be written.
    """
    try:
        with scratch_folder("compact", within=scratch) as folder:
            written = _rewrite_in(folder, table, lot, run_id=run_id)
    except OSError as error:
        raise ConfigError(f"scratch folder {str(scratch or gettempdir())!r}: {error}") from error
    assert sum(facts.rows for facts in written) == lot.rows, "a row was lost or doubled"
    return tuple(written)


def _rewrite_in(folder: Path, table: LabelTable, lot: Lot, *, run_id: str) -> list[FileFacts]:
    [(model_id, thresholds_id)] = {(file.model_id, file.thresholds_id) for file in lot.files}
    ranges_per_file = -(-lot.rows // (lot.files_after * _RANGE_ROWS))
    bounds = range_bounds(lot.files_after * ranges_per_file)
    ranges = [folder / f"range-{number}" for number in range(len(bounds) + 1)]
    for file in lot.files:
        _cut_file(table, file, ranges=ranges, bounds=bounds, folder=folder)
    written = []
    for start in range(0, len(ranges), ranges_per_file):
        there = [path for path in ranges[start : start + ranges_per_file] if path.exists()]
        if there:
            facts = write_sorted(
                map(_read_range, there),
                store=table.store,
                labels_uri=table.uri,
                model_id=model_id,
                run_id=run_id,
                thresholds_id=thresholds_id,
            )
            written.append(facts)
    return written


def range_bounds(count: int) -> tuple[str, ...]:
    """Where the second of `count` ranges of image_id begins, and so on; equally full ones, for ids are hashes."""
    return tuple(f"{number * 2**32 // count:08x}" for number in range(1, count))


def _cut_file(
    table: LabelTable, file: FileFacts, *, ranges: Sequence[Path], bounds: Sequence[str], folder: Path
) -> None:
    """Add a file's rows to those of their ranges."""
    with pq.ParquetFile(_whole(table, file, folder=folder)) as parquet:
        for batch in parquet.iter_batches(batch_size=_READ_ROWS, columns=TABLE_SCHEMA.names):
            batch = batch.cast(TABLE_SCHEMA)
            ids = batch["image_id"]
            assert pc.all(pc.less_equal(ids[:-1], ids[1:])).as_py() is not False, f"{file.path} is not sorted"
            for number, (start, stop) in enumerate(pairwise([0, *_cuts(ids, bounds), len(ids)])):
                if stop > start:
                    # Opened for each piece: there may be more ranges than a process may have files open.
                    with ranges[number].open("ab") as target:
                        target.write(batch.slice(start, stop - start).serialize())


def _cuts(ids: pa.Array, bounds: Sequence[str]) -> list[int]:
    """The place in sorted ids where each bound falls."""
    return [bisect.bisect_left(range(len(ids)), bound, key=lambda place: ids[place].as_py()) for bound in bounds]


def _whole(table: LabelTable, file: FileFacts, *, folder: Path) -> Path:
    """A file as a local one, checked to be what the snapshot says: damage would be copied with the rows.

    Raises:
        ConfigError: it is missing or damaged.
    """
    uri = join(table.uri, file.path)
    path = folder / "source.parquet" if is_s3(uri) else Path(local_path(uri))
    try:
        sha256 = _download(table, uri, path) if is_s3(uri) else file_sha256(path)
    except (FetchError, FileNotFoundError) as error:
        raise ConfigError(f"a file of the label table cannot be read: {error}") from error
    if sha256 != file.sha256:
        raise ConfigError(f"{uri!r} is damaged: its SHA-256 is {sha256}, the snapshot says {file.sha256}")
    return path


def _download(table: LabelTable, uri: str, path: Path) -> str:
    digest = hashlib.sha256()
    with table.store.open(uri) as source, path.open("wb") as target:
        while chunk := source.read(16 * CHUNK):
            digest.update(chunk)
            target.write(chunk)
    return digest.hexdigest()


def _read_range(path: Path) -> pa.Table:
    """A range's rows in order; they are no longer on disk."""
    with path.open("rb") as source:
        messages = pa.ipc.MessageReader.open_stream(source)
        batches = [pa.ipc.read_record_batch(message, TABLE_SCHEMA) for message in messages]
    path.unlink()
    return pa.Table.from_batches(batches, schema=TABLE_SCHEMA).sort_by(list(SORT_KEYS))
