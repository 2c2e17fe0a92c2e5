"""Read an S3 Inventory report: Amazon's own list of a bucket, made daily or weekly.

A report is a `manifest.json` that names data files. Format: Amazon S3 User Guide, "Cataloging and analyzing your data
with S3 Inventory". A bucket of a hundred million objects takes a hundred thousand requests to list, and a few hundred
files to read this way; what changed since the report was made shows when the image is read.
"""

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, ValidationError

from jobs.data.object_store import ObjectInfo, is_s3, join, open_store, parent
from jobs.data.scratch import scratch_folder
from mgmtn.errors import ConfigError, FetchError

log = logging.getLogger(__name__)

REPORT_NAME: Final = "manifest.json"

# By their names without case and underscores, in which CSV (`ETag`) and Parquet (`e_tag`) agree.
_NEEDED: Final = ("bucket", "key", "etag")
_USED: Final = (*_NEEDED, "size", "islatest", "isdeletemarker")
_BLOCK_BYTES: Final = 8 << 20
_ROWS: Final = 65_536


class DataFile(BaseModel):
    """A file of a report."""

    key: str
    md5: str = Field(alias="MD5checksum")


class Report(BaseModel):
    """What a `manifest.json` says."""

    format: str = Field(alias="fileFormat")
    columns: str = Field(alias="fileSchema")
    files: tuple[DataFile, ...]


def read_report(uri: str) -> Iterator[ObjectInfo]:
    """The objects of a report, in its order; of a bucket with versions, the current ones.

    Args:
        uri: of the `manifest.json`. Its data files lie in the same bucket, under the keys that it says, or, where the
            report was copied to a local folder, beside it, in `data/` or in `../data/`.

    Raises:
        ConfigError: if it is no report, has no ETag, or a file of it is missing, torn or of a format we do not read.
    """
    try:
        report = Report.model_validate_json(open_store(uri).get(uri))
    except (FetchError, ValidationError) as error:
        raise ConfigError(f"{uri!r}: cannot be read as the manifest of an S3 Inventory report: {error}") from error
    if report.format not in ("CSV", "Parquet"):
        raise ConfigError(f"report {uri!r}: its format is {report.format!r}; CSV and Parquet can be read")
    for file in report.files:
        with _fetched(uri, file) as path:
            try:
                batches = _csv(path, report, uri=uri) if report.format == "CSV" else _parquet(path, uri=uri)
                yield from _objects(batches, encoded=report.format == "CSV")
            except (pa.ArrowException, OSError, ValueError) as error:
                raise ConfigError(f"report {uri!r}: its file {file.key!r} cannot be read: {error}") from error


@contextlib.contextmanager
def _fetched(report_uri: str, file: DataFile) -> Iterator[Path]:
    """A data file on this machine, whole."""
    uri = _find(report_uri, file.key)
    with scratch_folder("inventory") as folder:
        path = folder / file.key.rpartition("/")[2][-100:]
        try:
            with open_store(uri).open(uri) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 64 << 20)
        except FetchError as error:
            raise ConfigError(f"report {report_uri!r}: its file {file.key!r} cannot be read: {error}") from error
        with path.open("rb") as written:
            md5 = hashlib.file_digest(written, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if md5 != file.md5.lower():
            raise ConfigError(f"report {report_uri!r}: its file {file.key!r} has MD5 {md5}, not {file.md5}")
        log.info("event=report_file key=%r", file.key)
        yield path


def _find(report_uri: str, key: str) -> str:
    if is_s3(report_uri):
        return f"s3://{report_uri.removeprefix('s3://').partition('/')[0]}/{key}"
    folder, name = parent(report_uri), key.rpartition("/")[2]
    places = [join(folder, name), join(folder, "data", name), join(parent(folder), "data", name)]
    return next((place for place in places if open_store(place).stat(place)), places[0])


def _csv(path: Path, report: Report, *, uri: str) -> Iterator[pa.RecordBatch]:
    names = [_plain(name) for name in report.columns.split(",")]
    used = _used(names, uri=uri)
    with pa.csv.open_csv(
        path,
        read_options=pa.csv.ReadOptions(column_names=names, block_size=_BLOCK_BYTES),
        convert_options=pa.csv.ConvertOptions(include_columns=used, column_types=dict.fromkeys(used, pa.string())),
    ) as reader:
        yield from reader


def _parquet(path: Path, *, uri: str) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        written = {_plain(name): name for name in file.schema_arrow.names}
        used = _used(list(written), uri=uri)
        for batch in file.iter_batches(batch_size=_ROWS, columns=[written[name] for name in used]):
            yield batch.rename_columns([_plain(name) for name in batch.schema.names])


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "")


def _used(names: list[str], *, uri: str) -> list[str]:
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise ConfigError(f"report {uri!r}: has no {', '.join(missing)}, only {names}; add it to the configuration")
    return [name for name in _USED if name in names]


def _objects(batches: Iterable[pa.RecordBatch], *, encoded: bool) -> Iterator[ObjectInfo]:
    for batch in batches:
        for row in batch.to_pylist():
            # A delete marker has no etag.
            if _is(row.get("islatest"), False) or _is(row.get("isdeletemarker"), True) or not row["etag"]:
                continue
            key = unquote_plus(row["key"], errors="strict") if encoded else _text(row["key"])
            size = int(row["size"]) if row.get("size") not in (None, "") else None
            if not (key.endswith("/") and size == 0):  # how consoles show a folder
                yield ObjectInfo(f"s3://{_text(row['bucket'])}/{key}", _text(row["etag"]).strip('"'), size)


def _is(value: Any, wanted: bool) -> bool:
    """Whether a flag says so: a boolean in Parquet, text in CSV, and nothing in a bucket without versions."""
    return str(value).lower() == str(wanted).lower()


def _text(value: str | bytes) -> str:
    # Not every writer of Parquet says that its bytes are UTF-8.
    return value.decode() if isinstance(value, bytes) else value
