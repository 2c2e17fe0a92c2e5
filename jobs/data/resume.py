"""Runs that have written files and not committed: how they are known, and how the next run takes up their work.

A run says what it is before its first file, in `LABELS/_runs/<run_id>.json`; the note goes when its files are part of
a snapshot. A note that is still there belongs to a run that was killed, refused by a gate, or still works for a model
that is not complete (see `jobs.label`). The next run of the same model and settings takes over each finished file of
such a run whose images are still due, in the version and at the attempt that the file's rows have; it does not fetch
them again. Files are whole or not there (the stores make them in one step) and bear their content's hash as their
name. An image is taken over only from a file that holds all its faces, so none is ever put together from two runs.

A file that was not taken over as it is holds rows that nobody wants any more, perhaps of pictures that were withdrawn.
The run that took its other rows says so in `LABELS/_runs/<run_id>.discarded.json`: nobody takes it up again, and
`mgmtn vacuum` need not wait for its run.
"""

import logging
import shutil
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from jobs.data.buckets import ImageIds, bucket_bounds, buckets_of_files, stage
from jobs.data.object_store import join, relative
from jobs.data.parts import FileFacts, part_directory, read_facts, write_part
from jobs.data.plan import DUE_SCHEMA, PlanLimits
from jobs.data.schema import SCHEMA_VERSION, TABLE_SCHEMA, TRANSIENT
from jobs.data.snapshots import LabelTable, Snapshot, lots_of
from mgmtn.errors import ConfigError, FetchError

log = logging.getLogger(__name__)

RUN_DIRECTORY: Final = "_runs"
_THREADS: Final = 8
_FILES_AT_ONCE: Final = 64  # that are looked into before their images are put aside
_KEYS: Final = ("image_id", "etag", "attempts", "status", "face_index", "face_count")
_DUE: Final = pa.schema([DUE_SCHEMA.field(name) for name in ("image_id", "etag", "attempts", "reason")])
_FOUND: Final = pa.schema(
    [*(DUE_SCHEMA.field(name) for name in ("image_id", "etag", "attempts")), ("file", pa.int32())]
)

_USABLE: Final = """
COPY (
    SELECT f.image_id, f.file, d.reason
    FROM ({found}) f JOIN ({due}) d
        ON f.image_id = d.image_id AND f.etag IS NOT DISTINCT FROM d.etag AND f.attempts = d.attempts
    QUALIFY row_number() OVER (PARTITION BY f.image_id ORDER BY f.file) = 1
    ORDER BY f.image_id
) TO '{usable}' (FORMAT parquet, COMPRESSION lz4)
"""
_COUNTS: Final = "SELECT file, reason, count(*) FROM read_parquet($usable) GROUP BY file, reason ORDER BY file, reason"
_OF_FILES: Final = """
SELECT file, image_id FROM read_parquet($usable) WHERE list_contains($files, file) ORDER BY file, image_id
"""


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


class Discarded(BaseModel):
    """Files of runs before, of which a run has taken what was still due."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    paths: tuple[str, ...] = Field(description="relative to the table")


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
        ids: image_ids of these.
        runs: ids of the runs that were looked through.
    """

    files: tuple[FileFacts, ...] = ()
    reasons: dict[str, int] = field(default_factory=dict)
    ids: ImageIds = field(default_factory=ImageIds.few)
    runs: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """How many images are done."""
        return sum(self.reasons.values())

    def remaining(self, due: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """What of due images, in tables sorted by image_id, is still to be done."""
        for rows in due:
            todo = rows.filter(pc.invert(self.ids.hold(rows["image_id"]))) if rows.num_rows else rows
            if todo.num_rows:
                yield todo


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
        table.store.delete(_discarded_uri(table, run_id))
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
        if uri.endswith((".refused.json", ".discarded.json")) or not uri.endswith(".json"):
            continue
        try:
            note = RunNote.model_validate_json(table.store.get(uri))
            refusal_uri = _refusal_uri(table, note.run_id)
            refusal = Refusal.model_validate_json(table.store.get(refusal_uri)) if refusal_uri in refused else None
        except (FetchError, ValidationError) as error:
            raise ConfigError(f"{uri!r}: cannot be read as a run's note: {error}") from error
        found.append(Unfinished(note, refusal))
    return tuple(sorted(found, key=lambda run: (run.note.started_at, run.note.run_id), reverse=True))


def discarded_files(table: LabelTable) -> frozenset[str]:
    """Paths, relative to the table, of files of unfinished runs that nobody takes up any more.

    Raises:
        ConfigError: a run's list of them cannot be read.
    """
    paths: set[str] = set()
    for info in table.store.list(join(table.uri, RUN_DIRECTORY) + "/", missing_ok=True):
        if info.uri.endswith(".discarded.json"):
            try:
                paths.update(Discarded.model_validate_json(table.store.get(info.uri)).paths)
            except (FetchError, ValidationError) as error:
                raise ConfigError(f"{info.uri!r}: cannot be read as a list of files: {error}") from error
    return frozenset(paths)


def adopt(
    table: LabelTable,
    note: RunNote,
    *,
    current: Snapshot | None,
    due: Sequence[Path],
    accept_failures: bool = False,
    discard: bool = False,
    limits: PlanLimits | None = None,
) -> Adopted:
    """Take over the finished files of unfinished runs that agree with this one.

    A file of which only some images are still due is written again with those alone, into this run's folder; one that
    holds none is left alone. A damaged file is passed over, and its images are done again. However many images there
    are, those of a bucket are in memory at a time.

    Args:
        table: the label table.
        note: of this run, which has been announced.
        current: the current snapshot; its files are no longer anybody's to adopt.
        due: Parquet files of the plan's rows.
        accept_failures: take over passing failures (such as a store that did not answer) of refused runs too; else
            such images are tried again, or a run refused for its failures would be refused for ever.
        discard: let nobody wait for files that were not taken over as they are: what else they hold is not due.
        limits: memory and temporary files.

    Raises:
        ConfigError: the table cannot be read or written.
    """
    runs = [run for run in unfinished_runs(table) if run.note.agrees_with(note) and run.note.run_id != note.run_id]
    looked_through = tuple(run.note.run_id for run in runs)
    if not due or not runs:
        return Adopted(runs=looked_through)
    limits = limits or PlanLimits()
    passed_over = discarded_files(table) | {file.path for file in (current.files if current else ())}
    paths = [
        (path, accept_failures or run.refusal is None)
        for run in runs
        for path in _paths_of(table, run.note)
        if path not in passed_over
    ]
    with ExitStack() as undo:
        folder = undo.enter_context(limits.scratch("resume"))
        files: list[FileFacts] = []
        found = _images_in(table, paths, files)
        usable, counts = _share_out(found, due=due, folder=folder, images_per_bucket=limits.images_per_bucket)
        wanted: Counter[int] = Counter()
        reasons: Counter[str] = Counter()
        for (number, reason), images in counts.items():
            wanted[number] += images
            reasons[reason] += images
        totals = [sum(file.images.values()) for file in files]
        whole = [file for number, file in enumerate(files) if wanted[number] == totals[number]]
        parts = [number for number, total in enumerate(totals) if 0 < wanted[number] < total]
        adopted = (*whole, *_rewrite(table, note.run_id, {number: files[number] for number in parts}, usable))
        weakref.finalize(usable, undo.pop_all().close)
    log.info("event=resumed runs=%d files=%d images=%d", len(runs), len(adopted), reasons.total())
    stale = sorted({file.path for file in files} - {file.path for file in whole})
    if discard and stale:
        record = Discarded(paths=tuple(stale)).model_dump_json(indent=1).encode()
        table.store.put_if_absent(_discarded_uri(table, note.run_id), record)
    return Adopted(adopted, dict(sorted(reasons.items())), usable, looked_through)


def _images_in(
    table: LabelTable, paths: Sequence[tuple[str, bool]], files: list[FileFacts]
) -> Iterator[pa.RecordBatch]:
    """The images of finished files, rows of `_FOUND`; adds each file's facts to `files`, its number is its place there.

    Args:
        table: the label table.
        paths: of the files, and whether passing failures of theirs are of use.
        files: to be filled.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        for start in range(0, len(paths), _FILES_AT_ONCE):
            some = paths[start : start + _FILES_AT_ONCE]
            looks = threads.map(lambda each: _look_into(table, each[0]), some)
            for (_, keep_failures), (facts, images) in zip(some, looks, strict=True):
                if facts is None:
                    continue
                chosen = images if keep_failures else images.filter(_lasting(images["status"]))
                number = pa.repeat(pa.scalar(len(files), pa.int32()), len(chosen))
                files.append(facts)
                yield from chosen.append_column("file", number).select(_FOUND.names).to_batches()


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


def _share_out(
    found: Iterable[pa.RecordBatch], *, due: Sequence[Path], folder: Path, images_per_bucket: int
) -> tuple[ImageIds, Counter[tuple[int, str]]]:
    """Which images of which file are due, each once; and how many of a file for each reason.

    The images' files in `folder` also say which file is meant, by its number in `file`.
    """
    # Imported here: kept by this module, it would outlive Ray's threads at exit and fill the terminal with warnings.
    import duckdb

    bounds = bucket_bounds(sum(pq.read_metadata(path).num_rows for path in due), rows_per_bucket=images_per_bucket)
    finished = stage(found, schema=_FOUND, folder=folder / "found", bounds=bounds)
    wanted = buckets_of_files(due, schema=_DUE, folder=folder / "due", bounds=bounds)
    counts: Counter[tuple[int, str]] = Counter()
    files: list[Path | None] = []
    with closing(duckdb.connect()) as connection:
        for bucket in range(len(bounds) + 1):
            rows, due_rows = finished.sql(bucket), wanted.sql(bucket)
            if rows is None or due_rows is None:
                files.append(None)
                continue
            usable = folder / f"usable-{bucket:04d}.parquet"
            target = str(usable).replace("'", "''")
            connection.execute(_USABLE.format(found=rows, due=due_rows, usable=target))
            for file, reason, images in connection.execute(_COUNTS, {"usable": str(usable)}).fetchall():
                counts[file, reason] += images
            files.append(usable)
    shutil.rmtree(folder / "found", ignore_errors=True)
    return ImageIds(files, bounds=bounds), counts


def _rewrite(table: LabelTable, run_id: str, files: Mapping[int, FileFacts], usable: ImageIds) -> list[FileFacts]:
    """New files with those images of some files, given by their numbers, that are usable."""
    import duckdb

    numbers = {file.path: number for number, file in files.items()}
    written: list[FileFacts] = []
    with closing(duckdb.connect()) as connection, ThreadPoolExecutor(_THREADS) as threads:
        for lot in lots_of(sorted(files.values(), key=lambda file: (file.min_image_id, file.path))):
            there = usable.files(lot[0].min_image_id, max(file.max_image_id for file in lot))
            parameters = {"usable": list(map(str, there)), "files": [numbers[file.path] for file in lot]}
            rows = connection.sql(_OF_FILES, params=parameters).to_arrow_table()
            ids = [rows.filter(pc.equal(rows["file"], numbers[file.path]))["image_id"] for file in lot]
            written += threads.map(lambda file, chosen: _take(table, run_id, file, chosen), lot, ids)
    return written


def _take(table: LabelTable, run_id: str, file: FileFacts, ids: pa.ChunkedArray) -> FileFacts:
    """A new file with some of a file's images."""
    rows = table.read_files([file], columns=TABLE_SCHEMA.names).read_all()
    return write_part(
        rows.filter(pc.is_in(rows["image_id"], value_set=ids.cast(pa.string()).combine_chunks())),
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


def _discarded_uri(table: LabelTable, run_id: str) -> str:
    return join(table.uri, RUN_DIRECTORY, f"{run_id}.discarded.json")
