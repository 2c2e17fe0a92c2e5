"""Take stock of the images there are: folders, S3 prefixes, single images, lists and reports become one inventory.

Every image that an input names is in it, readable or not: what is wrong with it becomes its outcome later on.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.data.buckets import bucket_bounds, stage
from jobs.data.image_lists import LIST_SUFFIXES, read_list
from jobs.data.object_store import ObjectInfo, canonical_uri, is_s3, local_path, open_store
from jobs.data.s3_inventory import REPORT_NAME, read_report
from jobs.data.schema import INVENTORY_SCHEMA, image_id
from mgmtn.errors import ConfigError, FetchError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_BATCH_ROWS: Final = 16_384
# Of a written inventory; a hundred million images are files of 1.6 million, each of which is sorted in memory.
_FILES: Final = 64
_UNREADABLE_KEY: Final = b"mgmtn.unreadable"


def take_inventory(inputs: str | Sequence[str], *, all_files: bool = False) -> pa.Table:
    """The images behind one or more inputs, in memory: about 150 bytes an image, and four times that on the way.

    Args:
        inputs: each a folder, an S3 prefix, one image file, a list (see `image_lists`), or the `manifest.json` of an S3
            Inventory report.
        all_files: take every file of a folder, a prefix or a report, not only those with an image's suffix.

    Returns:
        A table of `INVENTORY_SCHEMA`: each URI once, sorted by image_id. `etag` and `size` are null for an image that
        cannot be looked up. `unreadable_folders` tells what could not be listed.

    Raises:
        ConfigError: naming every input that does not exist or cannot be read.
    """
    unreadable: list[str] = []
    batches = list(_batches(inputs, all_files=all_files, unreadable=unreadable.append))
    return _each_once(pa.Table.from_batches(batches, schema=INVENTORY_SCHEMA)).cast(_schema(unreadable))


def check_inputs(inputs: Sequence[str]) -> None:
    """See that local inputs are there: at once, before the work that a listing may be.

    Raises:
        ConfigError: naming every one that is not.
    """
    missing = []
    for text in inputs:
        uri = canonical_uri(text)
        if not is_s3(uri) and not os.path.exists(local_path(uri)):
            missing.append(str(_missing(text)))
    if missing:
        raise ConfigError("; ".join(missing))


def _missing(text: str) -> ConfigError:
    return ConfigError(f"input {text!r}: there is no such folder, image or list")


def write_inventory(inputs: str | Sequence[str], folder: Path, *, all_files: bool = False) -> Path:
    """The same as `take_inventory`, as Parquet files: for more images than fit in memory.

    Args:
        folder: a new one, for the files. One after the other, they are sorted by image_id as a whole.

    Returns:
        The folder.

    Raises:
        ConfigError: naming every input that does not exist or cannot be read.
    """
    unreadable: list[str] = []
    bounds = bucket_bounds(_FILES, rows_per_bucket=1)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".inventory-") as unsorted:
        batches = _batches(inputs, all_files=all_files, unreadable=unreadable.append)
        staged = stage(batches, schema=INVENTORY_SCHEMA, folder=Path(unsorted, "files"), bounds=bounds)
        schema = _schema(unreadable)
        for files in staged.files:
            for file in files:
                pq.write_table(_each_once(pq.read_table(file)).cast(schema), folder / file.name, compression="zstd")
                file.unlink()
    if not any(staged.files):
        pq.write_table(schema.empty_table(), folder / "0000.parquet")
    return folder


def _batches(
    inputs: str | Sequence[str], *, all_files: bool, unreadable: Callable[[str], None]
) -> Iterator[pa.RecordBatch]:
    """The images behind the inputs, in batches of `INVENTORY_SCHEMA`; one that is named twice is there twice."""
    problems: list[str] = []
    for text in [inputs] if isinstance(inputs, str) else inputs:
        try:
            images = _images_of(text, all_files=all_files, unreadable=unreadable)
            while some := list(islice(images, _BATCH_ROWS)):
                columns = [
                    [image_id(info.uri) for info in some],
                    [info.uri for info in some],
                    [info.etag for info in some],
                    [info.size for info in some],
                ]
                yield pa.RecordBatch.from_arrays(
                    [pa.array(column, field.type) for column, field in zip(columns, INVENTORY_SCHEMA, strict=True)],
                    schema=INVENTORY_SCHEMA,
                )
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))


def _schema(unreadable: Sequence[str]) -> pa.Schema:
    """An inventory's columns, with what it does not know."""
    for folder in unreadable:
        log.warning("inventory=incomplete unreadable_folder=%r", folder)
    return INVENTORY_SCHEMA.with_metadata({_UNREADABLE_KEY: json.dumps(sorted(set(unreadable)))})


def unreadable_folders(inventory: pa.Table) -> tuple[str, ...]:
    """URIs of the folders inside the inputs that may not be listed: what they hold is unknown, not gone."""
    return tuple(json.loads((inventory.schema.metadata or {}).get(_UNREADABLE_KEY, b"[]")))


def inventory_digest(inventory: pa.Table | Path) -> str:
    """Hex SHA-256 over every image and its version, in order: equal digests, equal inventories.

    Args:
        inventory: from `take_inventory` or `write_inventory`.
    """
    digest = hashlib.sha256()
    for batch in _batches_of_files(inventory) if isinstance(inventory, Path) else inventory.to_batches(65_536):
        size = batch["size"].cast(pa.string())
        lines = pc.binary_join_element_wise(
            batch["image_id"], batch["etag"], size, "\t", null_handling="replace", null_replacement=""
        )
        digest.update("".join(f"{line}\n" for line in lines.to_pylist()).encode())
    return digest.hexdigest()


def _batches_of_files(folder: Path) -> Iterator[pa.RecordBatch]:
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=65_536)


def _each_once(table: pa.Table) -> pa.Table:
    """Sort by image_id, which stands for the URI; of equal ones the first named stays."""
    table = table.sort_by("image_id")
    if table.num_rows < 2:
        return table
    ids = table["image_id"].combine_chunks()
    repeats = pa.concat_arrays([pa.array([False]), pc.equal(ids[1:], ids[:-1])])
    return table.filter(pc.invert(repeats)).combine_chunks()


def _images_of(text: str, *, all_files: bool, unreadable: Callable[[str], None]) -> Iterator[ObjectInfo]:
    uri = canonical_uri(text)
    if not is_s3(uri) and os.path.isdir(local_path(uri)):
        yield from _list_images(uri, all_files=all_files, unreadable=unreadable)
        return
    try:
        found = None if uri.endswith("/") else open_store(uri).stat(uri)
    except FetchError as error:
        raise ConfigError(f"input {text!r}: {error}") from error
    if found is None and is_s3(uri):
        yield from _list_images(uri, all_files=all_files, unreadable=unreadable)
    elif found is None:
        raise _missing(text)
    elif uri.endswith(f"/{REPORT_NAME}"):
        yield from _chosen(read_report(uri), all_files=all_files)
    elif uri.lower().endswith(LIST_SUFFIXES):
        yield from read_list(uri)
    else:
        yield found


def _list_images(uri: str, *, all_files: bool, unreadable: Callable[[str], None]) -> Iterator[ObjectInfo]:
    return _chosen(open_store(uri).list(uri, unreadable=unreadable, ordered=False), all_files=all_files)


def _chosen(objects: Iterable[ObjectInfo], *, all_files: bool) -> Iterator[ObjectInfo]:
    return (info for info in objects if all_files or info.uri.lower().endswith(IMAGE_SUFFIXES))
