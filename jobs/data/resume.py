"""Runs that have written files and not committed: how they are known, and how the next run takes up their work.

A run says what it is before its first file, in `LABELS/_runs/<run_id>.json`; the note goes when its files are part of
a snapshot. A note that is still there belongs to a run that was killed, refused by a gate, or still works for a model
that is not complete (see `jobs.label`). The next run of the same model and settings takes over each finished file of
such a run whose images are still due, in the version and at the attempt that the file's rows have; it does not fetch
them again. Files are whole or not there (the stores make them in one step) and bear their content's hash as their
name. An image is taken over only from a file that holds all its faces, so none is ever put together from two runs.
"""

import bisect
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from jobs.data.object_store import join, relative
from jobs.data.parts import FileFacts, part_directory, read_facts, write_part
from jobs.data.schema import SCHEMA_VERSION, TABLE_SCHEMA, TRANSIENT
from jobs.data.snapshots import LabelTable, Snapshot
from mgmtn.errors import ConfigError, FetchError

if TYPE_CHECKING:
    import duckdb

log = logging.getLogger(__name__)

RUN_DIRECTORY: Final = "_runs"
_THREADS: Final = 8
_KEYS: Final = ("image_id", "etag", "attempts", "status", "face_index", "face_count")

_USABLE: Final = """
CREATE TEMP TABLE usable AS
SELECT f.file, f.image_id, d.reason
FROM found f JOIN read_parquet($due) d
    ON f.image_id = d.image_id AND f.etag IS NOT DISTINCT FROM d.etag AND f.attempts = d.attempts
QUALIFY row_number() OVER (PARTITION BY f.image_id ORDER BY f.file) = 1
"""
_OF_FILE: Final = "SELECT image_id FROM usable WHERE file = $file ORDER BY image_id"
_REASONS: Final = "SELECT reason, count(*) FROM usable GROUP BY reason ORDER BY reason"


class RunNote(BaseModel):
    """What a run is, in so far as it decides its rows; written before its first file."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    run_id: str
    started_at: AwareDatetime
    parent: int = Field(ge=0, description="the snapshot that the run was planned on; 0: none")
    model_id: str
    thresholds_id: str | None = None
    work: dict[str, Any] = Field(description="settings that decide what is found in an image")
    schema_version: int = SCHEMA_VERSION

    def agrees_with(self, other: "RunNote") -> bool:
        """Whether the rows of one may stand for those of the other."""
        names = ("model_id", "thresholds_id", "work", "schema_version")
        return all(getattr(self, name) == getattr(other, name) for name in names)


class Refusal(BaseModel):
    """Why a finished run was not published."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    refused_at: AwareDatetime
    reason: str


@dataclass(frozen=True)
class Unfinished:
    """A run without a snapshot of its own."""

    note: RunNote
    refusal: Refusal | None


@dataclass(frozen=True)
class Adopted:
    """What a run need not do again.

    Attributes:
        files: finished files, each image of them due and in no other; to be committed with the run's own.
        reasons: the images that they hold, counted by why they are due.
        ids: image_ids of these, strings, sorted.
        runs: ids of the runs that were looked through.
    """

    files: tuple[FileFacts, ...] = ()
    reasons: dict[str, int] = field(default_factory=dict)
    ids: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    runs: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """How many images are done."""
        return sum(self.reasons.values())

    def remaining(self, due: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """What of due images, in tables sorted by image_id, is still to be done."""
        for rows in due:
            if not rows.num_rows:
                continue
            ids = rows["image_id"]
            start, stop = (_position(self.ids, ids[end].as_py()) for end in (0, -1))
            todo = rows.filter(pc.invert(pc.is_in(ids, value_set=self.ids[start : stop + 1])))
            if todo.num_rows:
                yield todo


def _position(ids: pa.Array, wanted: str) -> int:
    """Where an id stands in sorted ids, or would."""
    return bisect.bisect_left(range(len(ids)), wanted, key=lambda index: ids[index].as_py())


def announce(table: LabelTable, note: RunNote) -> None:
    """Say that a run begins; must come before its first file.

    Raises:
        ConfigError: it cannot be written, or another run has this id.
    """
    if not table.store.put_if_absent(_note_uri(table, note.run_id), note.model_dump_json(indent=1).encode()):
        raise ConfigError(f"run_id {note.run_id!r}: there is a run with this id")


def refuse(table: LabelTable, run_id: str, *, reason: str) -> None:
    """Say that a run is complete and was not published; its files stay, to be looked at or accepted."""
    refusal = Refusal(refused_at=datetime.now(UTC), reason=reason)
    table.store.put_if_absent(_refusal_uri(table, run_id), refusal.model_dump_json(indent=1).encode())


def conclude(table: LabelTable, run_ids: Iterable[str]) -> None:
    """Forget runs whose work is part of a snapshot, or of no use to anybody."""
    for run_id in run_ids:
        table.store.delete(_refusal_uri(table, run_id))
        table.store.delete(_note_uri(table, run_id))


def unfinished_runs(table: LabelTable) -> tuple[Unfinished, ...]:
    """Every run with a note, the latest first; a run that died between its commit and the end of its note included.

    Raises:
        ConfigError: a note cannot be read.
    """
    folder = join(table.uri, RUN_DIRECTORY)
    uris = [info.uri for info in table.store.list(folder + "/", missing_ok=True)]
    refused = {uri for uri in uris if uri.endswith(".refused.json")}
    found = []
    for uri in uris:
        if uri in refused or not uri.endswith(".json"):
            continue
        try:
            note = RunNote.model_validate_json(table.store.get(uri))
            refusal_uri = _refusal_uri(table, note.run_id)
            refusal = Refusal.model_validate_json(table.store.get(refusal_uri)) if refusal_uri in refused else None
        except (FetchError, ValidationError) as error:
            raise ConfigError(f"{uri!r}: cannot be read as a run's note: {error}") from error
        found.append(Unfinished(note, refusal))
    return tuple(sorted(found, key=lambda run: (run.note.started_at, run.note.run_id), reverse=True))


def adopt(
    table: LabelTable,
    note: RunNote,
    *,
    current: Snapshot | None,
    due: Sequence[Path],
    accept_failures: bool = False,
) -> Adopted:
    """Take over the finished files of unfinished runs that agree with this one.

    A file of which only some images are still due is written again with those alone, into this run's folder; one that
    holds none is left alone. A damaged file is passed over, and its images are done again.

    Args:
        table: the label table.
        note: of this run.
        current: the current snapshot; its files are no longer anybody's to adopt.
        due: Parquet files of the plan's rows.
        accept_failures: take over passing failures (such as a store that did not answer) of refused runs too; else
            such images are tried again, or a run refused for its failures would be refused for ever.

    Raises:
        ConfigError: the table cannot be read or written.
    """
    runs = [run for run in unfinished_runs(table) if run.note.agrees_with(note) and run.note.run_id != note.run_id]
    listed = {file.path for file in current.files} if current else set()
    looked_through = tuple(run.note.run_id for run in runs)
    if not due:
        return Adopted(runs=looked_through)
    files: list[FileFacts] = []
    found: list[pa.Table] = []
    with ThreadPoolExecutor(_THREADS) as threads:
        for run in runs:
            paths = [path for path in _paths_of(table, run.note) if path not in listed]
            keep_failures = run.refusal is None or accept_failures
            for facts, images in threads.map(lambda path: _look_into(table, path), paths):
                if facts is not None:
                    numbered = images.append_column("file", pa.repeat(pa.scalar(len(files), pa.int32()), len(images)))
                    found.append(numbered if keep_failures else numbered.filter(_lasting(numbered["status"])))
                    files.append(facts)
        usable, reasons = _share_out(found, due=due)
        adopted = tuple(
            threads.map(lambda chosen: _take(table, note.run_id, files[chosen[0]], chosen[1]), usable.items())
        )
    if runs:
        log.info("event=resumed runs=%d files=%d images=%d", len(runs), len(adopted), sum(reasons.values()))
    ids = pa.chunked_array(list(usable.values()), pa.string()).combine_chunks()
    return Adopted(adopted, reasons, ids.sort(), looked_through)


def _look_into(table: LabelTable, path: str) -> tuple[FileFacts | None, pa.Table]:
    """A finished file's facts, and its images: image_id, etag, attempts, status. None for a file that is no use."""
    try:
        facts = read_facts(path, store=table.store, labels_uri=table.uri)
        rows = table.read_files([facts], columns=_KEYS).read_all()
    except (ConfigError, FetchError, pa.ArrowInvalid) as error:
        log.warning("event=file_not_adopted path=%s error=%s", path, error)
        return None, pa.table({})
    # Of one image all but face_index is the same in every row.
    wanted = [(name, "max") for name in ("etag", "attempts", "status", "face_count")]
    images = rows.group_by("image_id").aggregate([*wanted, ("face_index", "count_distinct")])
    images = images.rename_columns(["image_id", "etag", "attempts", "status", "face_count", "rows"])
    whole = pc.equal(images["rows"], pc.max_element_wise(images["face_count"].cast(pa.int64()), 1))
    if not pc.all(whole).as_py():
        log.warning("event=image_not_adopted path=%s reason=%r", path, "some of its faces are in another file")
    return facts, images.filter(whole).select(["image_id", "etag", "attempts", "status"])


def _lasting(status: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.invert(pc.is_in(status, value_set=pa.array(sorted(TRANSIENT))))


def _share_out(found: Sequence[pa.Table], *, due: Sequence[Path]) -> tuple[dict[int, pa.Array], dict[str, int]]:
    """Which images of which file are due, each once, and how many for each reason."""
    if not found:
        return {}, {}
    # Imported here: kept by this module, it would outlive Ray's threads at exit and fill the terminal with warnings.
    import duckdb

    connection = duckdb.connect()
    try:
        connection.register("found", pa.concat_tables(found))
        connection.execute(_USABLE, {"due": [str(path) for path in due]})
        numbers = [row[0] for row in connection.execute("SELECT DISTINCT file FROM usable ORDER BY file").fetchall()]
        usable = {number: _ids(connection, number) for number in numbers}
        return usable, dict(connection.execute(_REASONS).fetchall())
    finally:
        connection.close()


def _ids(connection: "duckdb.DuckDBPyConnection", file: int) -> pa.Array:
    rows = connection.sql(_OF_FILE, params={"file": file}).to_arrow_table()
    return rows["image_id"].cast(pa.string()).combine_chunks()


def _take(table: LabelTable, run_id: str, file: FileFacts, ids: pa.Array) -> FileFacts:
    """The file itself if all its images are wanted, else a new one with those that are."""
    if len(ids) == sum(file.images.values()):
        return file
    rows = table.read_files([file], columns=TABLE_SCHEMA.names).read_all()
    return write_part(
        rows.filter(pc.is_in(rows["image_id"], value_set=ids)),
        store=table.store,
        labels_uri=table.uri,
        model_id=file.model_id,
        run_id=run_id,
        thresholds_id=file.thresholds_id,
    )


def _paths_of(table: LabelTable, note: RunNote) -> list[str]:
    folder = join(table.uri, part_directory(note.model_id, note.run_id))
    listed = (relative(info.uri, folder=table.uri) for info in table.store.list(folder + "/", missing_ok=True))
    return sorted(path for path in listed if path.endswith(".parquet"))


def _note_uri(table: LabelTable, run_id: str) -> str:
    return join(table.uri, RUN_DIRECTORY, f"{run_id}.json")


def _refusal_uri(table: LabelTable, run_id: str) -> str:
    return join(table.uri, RUN_DIRECTORY, f"{run_id}.refused.json")
