"""One immutable file of the label table: how it is written, and the facts about it that a snapshot keeps.

Free of Ray, so that reading a table's history does not wait for it.
"""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from jobs.data.object_store import ObjectStore, file_sha256, join
from jobs.data.prevalence import LabelCounts, count_labels
from jobs.data.schema import ERROR_LENGTH, REQUIRED, SORT_KEYS, STATUSES, TABLE_SCHEMA
from jobs.data.scratch import scratch_folder
from mgmtn.errors import ConfigError, FetchError

ROW_GROUP_ROWS: Final = 122_880
# The only columns whose values repeat; the dictionary of any other would hold every value and be given up half way.
_DICTIONARY: Final = ["status", "error", "attempts", "face_index", "face_count", "model_id", "run_id"]
_FACT_COLUMNS: Final = ["image_id", "status", "face_index", "labels", "model_id"]
_THRESHOLDS_KEY: Final = b"mgmtn.thresholds_id"
_SAFE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


class FileFacts(BaseModel):
    """What a snapshot says about one of its files."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    path: str = Field(description="relative to the table: model=.../run=.../part-....parquet")
    model_id: str
    run_id: str = Field(description="the run that wrote the file; its rows name the runs that labelled them")
    thresholds_id: str | None = None
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str
    min_image_id: str
    max_image_id: str
    images: dict[str, int] = Field(description="images by status")
    faces: int = Field(ge=0)
    labels: LabelCounts | None = Field(None, description="how common each attribute is; null where nobody counted")


def part_directory(model_id: str, run_id: str) -> str:
    """`model=<model_id>/run=<run_id>`, relative to the table.

    Raises:
        ConfigError: if an id cannot be part of a path that every engine and shell reads the same way.
    """
    for name, value in (("model_id", model_id), ("run_id", run_id)):
        if not _SAFE_NAME.fullmatch(value):
            raise ConfigError(
                f"{name} {value!r}: use letters, digits and . _ + - (128 at most), a letter or digit first"
            )
    return f"model={model_id}/run={run_id}"


def write_part(
    table: pa.Table,
    *,
    store: ObjectStore,
    labels_uri: str,
    model_id: str,
    run_id: str,
    thresholds_id: str | None = None,
) -> FileFacts:
    """Write rows of one model as one file, named after its content.

    Args:
        table: at least one row, with the columns of `TABLE_SCHEMA` in any order and in types that cast to it; all
            faces of an image together. `error` is cut to what the table allows.
        store: the store of `labels_uri`.
        labels_uri: the table's folder.
        model_id: names the folder; the rows carry the same.
        run_id: the run that writes, and names the folder; rows carried over from another run keep theirs.
        thresholds_id: of the thresholds behind `labels`; kept in the file too.

    Raises:
        ConfigError: if the file cannot be written.
    """
    rows = conform(table).sort_by(list(SORT_KEYS))
    return write_sorted(
        [rows], store=store, labels_uri=labels_uri, model_id=model_id, run_id=run_id, thresholds_id=thresholds_id
    )


def write_sorted(
    tables: Iterable[pa.Table],
    *,
    store: ObjectStore,
    labels_uri: str,
    model_id: str,
    run_id: str,
    thresholds_id: str | None = None,
) -> FileFacts:
    """Write one file from tables of `TABLE_SCHEMA` that follow each other in order; holds one of them at a time.

    Each table begins a row group. Arguments and errors as for `write_part`; there is a table, and none is empty.
    """
    directory = part_directory(model_id, run_id)
    stamp = {_THRESHOLDS_KEY: thresholds_id.encode()} if thresholds_id is not None else {}
    schema = TABLE_SCHEMA.with_metadata({**TABLE_SCHEMA.metadata, **stamp})
    remaining = iter(tables)
    first = next(remaining)
    seen: list[pa.Table] = []
    with scratch_folder("part") as folder:
        path = folder / "part.parquet"
        with _parquet_writer(path, schema, rows_per_group=first.num_rows) as writer:
            for rows in chain([first], remaining):
                models = rows["model_id"].unique().to_pylist()
                assert models == [model_id], f"rows of another model than {model_id}"
                writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)
                seen.append(rows.select(_FACT_COLUMNS))
        sha256 = file_sha256(path)
        name = f"{directory}/part-{sha256[:32]}.parquet"
        facts = _facts_of(
            pa.concat_tables(seen),
            path=name,
            run_id=run_id,
            thresholds_id=thresholds_id,
            sha256=sha256,
            size=path.stat().st_size,
        )
        store.put_file(path, join(labels_uri, name))
    return facts


def read_facts(path: str, *, store: ObjectStore, labels_uri: str) -> FileFacts:
    """The facts of a file that a run has written and not yet committed, from the file alone.

    Args:
        path: relative to the table.
        store: the store of `labels_uri`.
        labels_uri: the table's folder.

    Raises:
        FetchError: if it cannot be read.
        ConfigError: if its content is not what its name says.
    """
    data = store.get(join(labels_uri, path))
    sha256 = hashlib.sha256(data).hexdigest()
    if not path.endswith(f"/part-{sha256[:32]}.parquet"):
        raise ConfigError(f"{join(labels_uri, path)!r}: its content is not what its name says")
    file = pq.ParquetFile(io.BytesIO(data))
    thresholds = (file.schema_arrow.metadata or {}).get(_THRESHOLDS_KEY)
    run_id = path.split("/")[1].removeprefix("run=")
    rows = file.read(columns=_FACT_COLUMNS)
    return _facts_of(
        rows,
        path=path,
        run_id=run_id,
        thresholds_id=thresholds.decode() if thresholds else None,
        sha256=sha256,
        size=len(data),
    )


def read_parts(
    uris: Sequence[str], *, store: ObjectStore, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of files of the table, file by file in order; only the wanted columns are fetched.

    Raises:
        ConfigError: if a file is missing or damaged.
    """
    for uri in uris:
        try:
            with store.open(uri) as source, pq.ParquetFile(source, pre_buffer=True) as file:
                yield from file.iter_batches(batch_size=ROW_GROUP_ROWS, columns=columns)
        except (FetchError, pa.ArrowInvalid) as error:
            raise ConfigError(f"a file of the label table cannot be read: {error}") from error


def conform(table: pa.Table) -> pa.Table:
    """The table's columns in `TABLE_SCHEMA`'s order and types; a value that does not fit its type is an error."""
    arrays = [_cast(table.column(field.name), field=field) for field in TABLE_SCHEMA]
    conformed = pa.Table.from_arrays(arrays, schema=TABLE_SCHEMA)
    for name in REQUIRED:
        assert conformed[name].null_count == 0, f"{name} is null in {conformed[name].null_count} rows"
    strange = set(conformed["status"].unique().to_pylist()) - set(STATUSES)
    assert not strange, f"unknown status {sorted(strange)}"
    return conformed


def _cast(column: pa.ChunkedArray, *, field: pa.Field) -> pa.ChunkedArray:
    if isinstance(column.type, pa.BaseExtensionType):
        # Ray turns a numpy column of fixed-size vectors into its own tensor type.
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], type=column.type.storage_type)
    column = column.cast(field.type)
    return pc.utf8_slice_codeunits(column, 0, ERROR_LENGTH) if field.name == "error" else column


def _parquet_writer(path: Path, schema: pa.Schema, *, rows_per_group: int) -> pq.ParquetWriter:
    """A writer of the layout that the table promises."""
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=_DICTIONARY,
        write_page_index=True,
        sorting_columns=pq.SortingColumn.from_ordering(schema, list(SORT_KEYS)),
        bloom_filter_options={"image_id": {"ndv": min(rows_per_group, ROW_GROUP_ROWS), "fpp": 0.01}},
    )


def _facts_of(
    rows: pa.Table, *, path: str, run_id: str, thresholds_id: str | None, sha256: str, size: int
) -> FileFacts:
    # Exactly one row of an image has its face_index at 0 or below.
    firsts = rows.filter(pc.less_equal(rows["face_index"], 0))
    return FileFacts(
        path=path,
        model_id=rows["model_id"][0].as_py(),
        run_id=run_id,
        thresholds_id=thresholds_id,
        rows=rows.num_rows,
        bytes=size,
        sha256=sha256,
        min_image_id=pc.min(rows["image_id"]).as_py(),
        max_image_id=pc.max(rows["image_id"]).as_py(),
        images=dict(sorted(Counter(firsts["status"].to_pylist()).items())),
        faces=pc.sum(pc.greater_equal(rows["face_index"], 0)).as_py(),
        labels=count_labels(rows["labels"]),
    )
