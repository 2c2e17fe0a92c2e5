"""Take stock of the images there are: folders, S3 prefixes, single images and lists become one table.

Every image that an input names is in the table, readable or not: what is wrong with it becomes its outcome later on.
"""

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from jobs.data.object_store import ObjectInfo, canonical_uri, is_s3, local_path, open_store, parent, resolve
from jobs.data.schema import INVENTORY_SCHEMA, image_id
from mgmtn.errors import ConfigError, FetchError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
LIST_SUFFIXES: Final = (".parquet", ".csv", ".txt")
# A list of a million S3 URIs without etags is a million requests of about 20 ms.
_THREADS: Final = 32
_UNREADABLE_KEY: Final = b"mgmtn.unreadable"


def take_inventory(inputs: str | Sequence[str], *, all_files: bool = False) -> pa.Table:
    """The images behind one or more inputs.

    Args:
        inputs: each a folder, an S3 prefix, one image file, or a list: `.parquet` or `.csv` with a column `uri` and
            perhaps `etag` and `size`, or `.txt` with a URI a line. A path in a list is relative to the list's folder.
        all_files: take every file of a folder or prefix, not only those with an image's suffix.

    Returns:
        A table of `INVENTORY_SCHEMA`: each URI once, sorted by image_id. `etag` and `size` are null for an image that
        cannot be looked up. `unreadable_folders` tells what could not be listed.

    Raises:
        ConfigError: naming every input that does not exist or cannot be read.
    """
    columns: dict[str, list[str | int | None]] = {name: [] for name in INVENTORY_SCHEMA.names}
    problems: list[str] = []
    unreadable: list[str] = []
    for text in [inputs] if isinstance(inputs, str) else inputs:
        try:
            for info in _images_of(text, all_files=all_files, unreadable=unreadable):
                columns["image_id"].append(image_id(info.uri))
                columns["uri"].append(info.uri)
                columns["etag"].append(info.etag)
                columns["size"].append(info.size)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    for folder in unreadable:
        log.warning("inventory=incomplete unreadable_folder=%r", folder)
    metadata = {_UNREADABLE_KEY: json.dumps(sorted(set(unreadable)))}
    return _each_once(pa.table(columns, schema=INVENTORY_SCHEMA)).replace_schema_metadata(metadata)


def unreadable_folders(inventory: pa.Table) -> tuple[str, ...]:
    """URIs of the folders inside the inputs that may not be listed: what they hold is unknown, not gone."""
    return tuple(json.loads((inventory.schema.metadata or {}).get(_UNREADABLE_KEY, b"[]")))


def inventory_digest(inventory: pa.Table) -> str:
    """Hex SHA-256 over every image and its version, in order: equal digests, equal inventories."""
    digest = hashlib.sha256()
    for batch in inventory.to_batches(max_chunksize=65_536):
        size = batch["size"].cast(pa.string())
        lines = pc.binary_join_element_wise(
            batch["image_id"], batch["etag"], size, "\t", null_handling="replace", null_replacement=""
        )
        digest.update("".join(f"{line}\n" for line in lines.to_pylist()).encode())
    return digest.hexdigest()


def _each_once(table: pa.Table) -> pa.Table:
    """Sort by image_id, which stands for the URI; of equal ones the first named stays."""
    table = table.sort_by("image_id")
    if table.num_rows < 2:
        return table
    ids = table["image_id"].combine_chunks()
    repeats = pa.concat_arrays([pa.array([False]), pc.equal(ids[1:], ids[:-1])])
    return table.filter(pc.invert(repeats)).combine_chunks()


def _images_of(text: str, *, all_files: bool, unreadable: list[str]) -> Iterator[ObjectInfo]:
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
        raise ConfigError(f"input {text!r}: there is no such folder, image or list")
    elif uri.lower().endswith(LIST_SUFFIXES):
        yield from _read_list(uri)
    else:
        yield found


def _list_images(uri: str, *, all_files: bool, unreadable: list[str]) -> Iterator[ObjectInfo]:
    for info in open_store(uri).list(uri, unreadable=unreadable.append):
        if all_files or info.uri.lower().endswith(IMAGE_SUFFIXES):
            yield info


def _read_list(uri: str) -> Iterator[ObjectInfo]:
    """The images of a list, in its order; those without an etag are looked up."""
    try:
        table = _list_table(uri, data=open_store(uri).get(uri))
    except (FetchError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(f"list {uri!r}: cannot be read: {error}") from error
    if table["uri"].null_count or pc.any(pc.equal(table["uri"], "")).as_py():
        raise ConfigError(f"list {uri!r}: a row has no uri")
    uris = [resolve(text, folder=parent(uri)) for text in table["uri"].to_pylist()]
    # A CSV has no null but the empty text.
    etags = [etag or None for etag in table["etag"].to_pylist()]
    entries = map(ObjectInfo, uris, etags, table["size"].to_pylist())
    yield from _look_up_all(entries)


def _list_table(uri: str, *, data: bytes) -> pa.Table:
    """Columns uri, etag and size of a list's bytes; etag and size are null where the list has none."""
    wanted = {"uri": pa.string(), "etag": pa.string(), "size": pa.int64()}
    suffix = uri.lower().rpartition(".")[2]
    if suffix == "txt":
        lines = [line.rstrip("\r") for line in data.decode("utf-8-sig").split("\n")]
        named = [line for line in lines if line.strip()]
        table = pa.table({"uri": pa.array(named[1:] if named[:1] == ["uri"] else named, pa.string())})
    elif suffix == "csv":
        options = pa.csv.ConvertOptions(column_types=wanted)
        parsing = pa.csv.ParseOptions(newlines_in_values=True)
        table = pa.csv.read_csv(io.BytesIO(data), convert_options=options, parse_options=parsing)
    else:
        file = pq.ParquetFile(io.BytesIO(data))
        table = file.read(columns=[name for name in wanted if name in file.schema_arrow.names])
    if "uri" not in table.column_names:
        raise ConfigError(f"list {uri!r}: has no column 'uri', only {table.column_names}")
    columns = [
        table[name].cast(type_) if name in table.column_names else pa.nulls(table.num_rows, type_)
        for name, type_ in wanted.items()
    ]
    return pa.table(columns, names=list(wanted))


def _look_up_all(entries: Iterable[ObjectInfo]) -> Iterator[ObjectInfo]:
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(partial(_look_up), entries)


def _look_up(entry: ObjectInfo) -> ObjectInfo:
    """The entry with its etag and size as the list gives them, else as they are; both None if they cannot be had."""
    if entry.etag is not None:
        return entry
    try:
        return open_store(entry.uri).stat(entry.uri) or ObjectInfo(entry.uri, None, None)
    except FetchError as error:
        log.warning("lookup=failed uri=%r error=%s", entry.uri, error)
        return ObjectInfo(entry.uri, None, None)
