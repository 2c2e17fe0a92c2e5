"""Read a list of images: `.parquet` or `.csv` with a column `uri`, perhaps `etag` and `size`, or `.txt`, a URI a line.

A list is read piece by piece: it may be longer than memory holds.
"""

import io
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Final, TypeAlias, cast

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from jobs.data.object_store import ObjectInfo, open_store, parent, resolve
from mgmtn.errors import ConfigError, FetchError

log = logging.getLogger(__name__)

LIST_SUFFIXES: Final = (".parquet", ".csv", ".txt")

_COLUMNS: Final = {"uri": pa.string(), "etag": pa.string(), "size": pa.int64()}
# A list of a million S3 URIs without etags is a million requests of about 20 ms.
_THREADS: Final = 32
_AT_ONCE: Final = 8_192  # rows
_READ_BYTES: Final = 8 << 20

_Entry: TypeAlias = tuple[str | None, str | None, int | None]  # uri as written, etag, size


def read_list(uri: str) -> Iterator[ObjectInfo]:
    """The images of a list, in its order.

    A path is relative to the list's folder. An image without an etag in the list is looked up; its etag and size are
    None if they cannot be had.

    Raises:
        ConfigError: if the list cannot be read, has no column `uri`, or a row of it has none.
    """
    entries = _entries(uri)
    with ThreadPoolExecutor(_THREADS) as pool:
        while some := list(islice(entries, _AT_ONCE)):
            yield from pool.map(_looked_up, some)


def _entries(uri: str) -> Iterator[ObjectInfo]:
    folder = parent(uri)
    read = {"txt": _lines, "csv": _csv_rows, "parquet": _parquet_rows}[uri.lower().rpartition(".")[2]]
    try:
        for number, (name, etag, size) in enumerate(read(uri), start=1):
            if not name:
                raise ConfigError(f"list {uri!r}: image {number}: a row has no uri")
            try:
                image = resolve(name, folder=folder)
            except ConfigError as error:
                raise ConfigError(f"list {uri!r}: image {number}: {error}") from error
            # A CSV has no null but the empty text; some tools write an etag with S3's quotes.
            yield ObjectInfo(image, (etag or "").strip('"') or None, size)
    except (FetchError, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"list {uri!r}: cannot be read: {error}") from error


def _opened(uri: str) -> io.BufferedReader:
    # pyarrow and text files read little at a time: of an object in S3, each time would be a request.
    return io.BufferedReader(cast(io.RawIOBase, open_store(uri).open(uri)), _READ_BYTES)


def _lines(uri: str) -> Iterator[_Entry]:
    with io.TextIOWrapper(_opened(uri), encoding="utf-8-sig", newline="\n") as file:
        names = (line.removesuffix("\n").rstrip("\r") for line in file)
        for number, name in enumerate(name for name in names if name.strip()):
            if number or name != "uri":
                yield name, None, None


def _csv_rows(uri: str) -> Iterator[_Entry]:
    parsing = pa.csv.ParseOptions(newlines_in_values=True)
    reading = pa.csv.ReadOptions(block_size=_READ_BYTES)
    with _opened(uri) as file, pa.csv.open_csv(file, parse_options=parsing, read_options=reading) as reader:
        names = _wanted(uri, reader.schema.names)
    # Only these columns: the types of the others are guessed from the first rows, and later ones need not agree.
    converting = pa.csv.ConvertOptions(column_types=_COLUMNS, include_columns=names)
    options = {"parse_options": parsing, "read_options": reading, "convert_options": converting}
    with _opened(uri) as file, pa.csv.open_csv(file, **options) as reader:
        yield from _rows(reader)


def _parquet_rows(uri: str) -> Iterator[_Entry]:
    with _opened(uri) as file, pq.ParquetFile(file) as table:
        names = _wanted(uri, table.schema_arrow.names)
        yield from _rows(table.iter_batches(batch_size=_AT_ONCE, columns=names))


def _rows(batches: Iterable[pa.RecordBatch]) -> Iterator[_Entry]:
    for batch in batches:
        columns = [
            batch[name].cast(type_).to_pylist() if name in batch.schema.names else [None] * batch.num_rows
            for name, type_ in _COLUMNS.items()
        ]
        yield from zip(*columns, strict=True)


def _wanted(uri: str, names: list[str]) -> list[str]:
    """The columns of a list that are read."""
    if "uri" not in names:
        raise ConfigError(f"list {uri!r}: has no column 'uri', only {names}")
    return [name for name in _COLUMNS if name in names]


def _looked_up(entry: ObjectInfo) -> ObjectInfo:
    if entry.etag is not None:
        return entry
    try:
        return open_store(entry.uri).stat(entry.uri) or ObjectInfo(entry.uri, None, None)
    except FetchError as error:
        log.warning("lookup=failed uri=%r error=%s", entry.uri, error)
        return ObjectInfo(entry.uri, None, None)
