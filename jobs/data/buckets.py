"""Rows cut into ranges of image_id, so that tables larger than memory can be compared one range at a time.

An image_id is a hash: ranges of equal width hold about equally many images.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mgmtn.errors import ConfigError

_DIGITS: Final = 3  # leading hex digits of an image_id that decide
MAX_BUCKETS: Final = 16**_DIGITS
# A smaller row group costs more than its rows; a larger one is held for every bucket at once.
_ROW_GROUP_ROWS: Final = 16_384
_BATCH_ROWS: Final = 65_536
_IDS: Final = pa.schema([("image_id", pa.string())])
# A bucket may be read from files as they lie if that reads no row much more than once.
_MAX_READS: Final = 2.0


def bucket_bounds(rows: int, *, rows_per_bucket: int) -> tuple[str, ...]:
    """Where buckets 1, 2, ... begin, for a power of two of buckets; empty for a single one."""
    count = 1
    while count * rows_per_bucket < rows and count < MAX_BUCKETS:
        count *= 2
    return tuple(f"{bucket * MAX_BUCKETS // count:0{_DIGITS}x}" for bucket in range(1, count))


@dataclass(frozen=True)
class Buckets:
    """Rows with a column `image_id` in Parquet files, by bucket.

    Attributes:
        files: for each bucket the files that hold its rows.
        bounds: of the buckets, where the files hold rows of other buckets too; None where they do not.
    """

    files: tuple[tuple[Path, ...], ...]
    bounds: tuple[str, ...] | None = None

    def sql(self, bucket: int, *, columns: str = "*") -> str | None:
        """A query for a bucket's rows; None where there are none."""
        if not self.files[bucket]:
            return None
        names = ", ".join("'" + str(file).replace("'", "''") + "'" for file in self.files[bucket])
        query = f"SELECT {columns} FROM read_parquet([{names}], hive_partitioning = false)"
        if self.bounds is None:
            return query
        ends = ("", *self.bounds, "g")  # no hex digit comes after g
        return f"{query} WHERE image_id >= '{ends[bucket]}' AND image_id < '{ends[bucket + 1]}'"


def stage(batches: Iterable[pa.RecordBatch], *, schema: pa.Schema, folder: Path, bounds: Sequence[str]) -> Buckets:
    """Write rows into a Parquet file for each bucket; reads every batch once and holds a few rows for each bucket.

    Args:
        batches: with at least the columns of `schema`, which are those that are kept. Sorted batches are cut faster.
        folder: a new one.
        bounds: from `bucket_bounds`.
    """
    folder.mkdir(parents=True)
    files = [folder / f"{bucket:04d}.parquet" for bucket in range(len(bounds) + 1)]
    waiting: list[list[pa.RecordBatch]] = [[] for _ in files]
    with ExitStack() as stack:
        writers: dict[int, pq.ParquetWriter] = {}

        def write(bucket: int) -> None:
            if bucket not in writers:
                writers[bucket] = stack.enter_context(_writer(files[bucket], schema=schema))
            writers[bucket].write_table(pa.Table.from_batches(waiting[bucket]))
            waiting[bucket] = []

        for batch in batches:
            for bucket, rows in _cut(batch.select(schema.names).cast(schema), bounds=bounds):
                waiting[bucket].append(rows)
                if sum(part.num_rows for part in waiting[bucket]) >= _ROW_GROUP_ROWS:
                    write(bucket)
        for bucket, parts in enumerate(waiting):
            if parts:
                write(bucket)
    return Buckets(tuple((file,) if bucket in writers else () for bucket, file in enumerate(files)))


class ImageIds:
    """A set of image_ids, one bucket of them in memory at a time."""

    def __init__(self, files: Sequence[Path | None], *, bounds: Sequence[str]) -> None:
        """
        Args:
            files: for each bucket a Parquet file with the column `image_id`, sorted, each id once; None without any.
            bounds: of the buckets.
        """
        self._files = tuple(files)
        self._bounds = tuple(bounds)
        self._last: tuple[int, pa.Array] = (-1, pa.array([], pa.string()))

    @classmethod
    def of(cls, batches: Iterable[pa.RecordBatch], *, folder: Path, bounds: Sequence[str]) -> "ImageIds":
        """The image_ids of rows, sorted by way of files in a new folder; they may be there more than once."""
        staged = stage(batches, schema=_IDS, folder=folder, bounds=bounds)
        files: list[Path | None] = []
        for [file] in (of_bucket or (None,) for of_bucket in staged.files):
            if file is not None:
                ids = pq.read_table(file)["image_id"].unique().sort()
                pq.write_table(pa.table({"image_id": ids}), file, compression="lz4", use_dictionary=False)
            files.append(file)
        return cls(files, bounds=bounds)

    @classmethod
    def few(cls, ids: Iterable[str] = ()) -> "ImageIds":
        """Some image_ids that stay in memory."""
        chosen = cls((None,), bounds=())
        chosen._last = (0, pa.array(sorted(set(ids)), pa.string()))
        return chosen

    def files(self, first: str, last: str) -> tuple[Path, ...]:
        """The files of the buckets in which ids from the first to the last may lie."""
        return tuple(file for file in self._files[self._buckets(first, last)] if file is not None)

    def between(self, first: str, last: str) -> Iterator[pa.Array]:
        """Those from the first to the last, both included, in order: an array for each bucket that has any."""
        buckets = self._buckets(first, last)
        for bucket in range(buckets.start, buckets.stop):
            ids = self._of_bucket(bucket)
            start = bisect.bisect_left(range(len(ids)), first, key=lambda place: ids[place].as_py())
            stop = bisect.bisect_right(range(len(ids)), last, key=lambda place: ids[place].as_py())
            if stop > start:
                yield ids.slice(start, stop - start)

    def any_between(self, first: str, last: str) -> bool:
        """Whether there is one from the first to the last."""
        return next(self.between(first, last), None) is not None

    def hold(self, ids: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Which of some ids, in any order and at least one, belong to the set: booleans."""
        ids = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
        found = pa.repeat(pa.scalar(False), len(ids))
        ends = pc.min_max(ids).as_py()
        for part in self.between(ends["min"], ends["max"]):
            found = pc.or_(found, pc.is_in(ids, value_set=part))
        return found

    def _buckets(self, first: str, last: str) -> slice:
        return slice(bisect.bisect_right(self._bounds, first), bisect.bisect_right(self._bounds, last) + 1)

    def _of_bucket(self, bucket: int) -> pa.Array:
        # Whoever asks does so in order, again and again for the same bucket.
        if self._last[0] != bucket:
            file = self._files[bucket]
            self._last = (bucket, _read_ids(file) if file is not None else pa.array([], pa.string()))
        return self._last[1]


def _read_ids(file: Path) -> pa.Array:
    return pq.read_table(file, columns=["image_id"])["image_id"].cast(pa.string()).combine_chunks()


def buckets_of_files(files: Sequence[Path], *, schema: pa.Schema, folder: Path, bounds: Sequence[str]) -> Buckets:
    """The buckets of rows in Parquet files: the files themselves if they are sorted enough, else staged into `folder`.

    Raises:
        ConfigError: if a file cannot be read or lacks a column.
    """
    try:
        as_they_lie = _files_by_bucket(files, schema=schema, bounds=bounds)
        return as_they_lie or stage(_batches(files, schema=schema), schema=schema, folder=folder, bounds=bounds)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"a Parquet file of {[str(file) for file in files[:3]]} cannot be read: {error}") from error


def _files_by_bucket(files: Sequence[Path], *, schema: pa.Schema, bounds: Sequence[str]) -> Buckets | None:
    """None if reading each bucket's row groups would read the files more than `_MAX_READS` times over."""
    chosen: list[list[Path]] = [[] for _ in range(len(bounds) + 1)]
    total = read = 0
    for file in files:
        metadata = pq.read_metadata(file)
        found = metadata.schema.to_arrow_schema()
        missing = [name for name in schema.names if name not in found.names]
        if missing:
            raise ConfigError(f"{str(file)!r} has no column {', '.join(missing)}, only {found.names}")
        ids = found.names.index("image_id")
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            statistics = group.column(ids).statistics
            if statistics is None or not statistics.has_min_max:
                return None
            first, last = (bisect.bisect_right(bounds, end) for end in (statistics.min, statistics.max))
            total += group.num_rows
            read += group.num_rows * (last - first + 1)
            for bucket in range(first, last + 1):
                if file not in chosen[bucket][-1:]:
                    chosen[bucket].append(file)
    return Buckets(tuple(map(tuple, chosen)), tuple(bounds)) if read <= _MAX_READS * total else None


def _batches(files: Sequence[Path], *, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for path in files:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=schema.names)


def _cut(batch: pa.RecordBatch, *, bounds: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """A batch's rows by bucket; of a sorted batch, slices."""
    if not bounds:
        if batch.num_rows:
            yield 0, batch
        return
    ids = batch["image_id"]
    if not pc.all(pc.less_equal(ids[:-1], ids[1:])).as_py():
        batch = batch.sort_by("image_id")
        ids = batch["image_id"]
    cuts = [bisect.bisect_left(range(len(ids)), bound, key=lambda index: ids[index].as_py()) for bound in bounds]
    for bucket, (start, stop) in enumerate(pairwise([0, *cuts, len(ids)])):
        if stop > start:
            yield bucket, batch.slice(start, stop - start)


def _writer(file: Path, *, schema: pa.Schema) -> pq.ParquetWriter:
    # Read once, soon and from this machine: speed before size.
    return pq.ParquetWriter(file, schema, compression="lz4", use_dictionary=_REPEATING, write_statistics=False)


_REPEATING: Final = ["status", "attempts", "model_id"]
