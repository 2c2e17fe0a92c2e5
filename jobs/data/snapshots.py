"""The label table's history: numbered snapshots, each the list of files that make the table.

The write of a snapshot's file, possible once for each number, is the commit. A reader takes the highest number. Files
are never changed: rows are replaced by new files, and a file that held them is rewritten without them (copy on write),
so that the files of a snapshot hold each face exactly once.

Why copy on write, and neither delete vectors nor a view: any engine that is given the list of files reads exactly the
current faces, with no predicate that somebody could forget, and a picture that is withdrawn leaves the files of the
next snapshot, not only its answers. The price is that a night rewrites each file that holds a changed or deleted image:
few files where a night's changes are fewer than the files, all of them where every file has a deletion. A file without
any is kept as it is.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from jobs.data.buckets import ImageIds
from jobs.data.object_store import canonical_uri, is_s3, join, local_copy, local_path, open_store
from jobs.data.parts import FileFacts, read_parts, write_part
from jobs.data.schema import SCHEMA_VERSION, TABLE_SCHEMA
from mgmtn.errors import ConfigError, FetchError, MgmtnError

log = logging.getLogger(__name__)

SNAPSHOT_DIRECTORY: Final = "_snapshots"
_SNAPSHOT_NAME: Final = re.compile(r"\d{20}\.json")
_THREADS: Final = 16
_REWRITES: Final = 4  # files held in memory at once, decoded
_LOT_ROWS: Final = 1_000_000  # whose image_ids are held at once, 36 bytes each
_CHUNK: Final = 8 << 20


class SnapshotConflict(MgmtnError):
    """Another run has committed first; what this one wrote is still there, and its plan is out of date."""


class Pace(BaseModel):
    """How fast a run was."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int = Field(gt=0, description="images that the run labelled itself")
    seconds: float = Field(gt=0, description="from its start to its commit")


class Snapshot(BaseModel):
    """A committed state of the table."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    number: int = Field(ge=1, description="one more than its parent's")
    parent: int | None = Field(None, description="the snapshot that it replaces; null for the first")
    schema_version: int = SCHEMA_VERSION
    created_at: AwareDatetime
    run_id: str
    model_id: str
    thresholds_id: str | None = None
    inventory_digest: str = Field(description="of the inventory that was labelled")
    planned: dict[str, int] = Field(default_factory=dict, description="images due in the run by reason, and `deleted`")
    pace: Pace | None = Field(None, description="null where nothing was labelled")
    images: dict[str, int] = Field(description="all images of the table by status")
    faces: int = Field(ge=0)
    files: tuple[FileFacts, ...]

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)

    @property
    def models(self) -> dict[str, int]:
        """Images by the model that labelled them. Two models only where a run could not reach every image: those of an
        input that it did not list, kept by `--deletions keep`, and those of a folder that it may not list."""
        images: Counter[str] = Counter()
        for file in self.files:
            images[file.model_id] += sum(file.images.values())
        return dict(sorted(images.items()))

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)


def next_snapshot(
    parent: Snapshot | None,
    *,
    files: Iterable[FileFacts],
    run_id: str,
    model_id: str,
    inventory_digest: str,
    thresholds_id: str | None = None,
    planned: dict[str, int] | None = None,
    pace: Pace | None = None,
) -> Snapshot:
    """The snapshot to commit after `parent`; the table's counts are summed from its files."""
    listed = tuple(sorted(files, key=lambda file: (file.min_image_id, file.path)))
    images: Counter[str] = Counter()
    for file in listed:
        images.update(file.images)
    return Snapshot(
        number=parent.number + 1 if parent else 1,
        parent=parent.number if parent else None,
        created_at=datetime.now(UTC),
        run_id=run_id,
        model_id=model_id,
        thresholds_id=thresholds_id,
        inventory_digest=inventory_digest,
        planned=planned or {},
        pace=pace,
        images=dict(sorted(images.items())),
        faces=sum(file.faces for file in listed),
        files=listed,
    )


def lots_of(files: Iterable[FileFacts]) -> Iterator[tuple[FileFacts, ...]]:
    """Files in order, so many at a time that the image_ids of their rows fit in memory; a larger one comes alone."""
    lot: list[FileFacts] = []
    rows = 0
    for file in files:
        if lot and rows + file.rows > _LOT_ROWS:
            yield tuple(lot)
            lot, rows = [], 0
        lot.append(file)
        rows += file.rows
    if lot:
        yield tuple(lot)


class LabelTable:
    """A label table by its folder's URI; there need be nothing yet."""

    def __init__(self, uri: str) -> None:
        """Raises `ConfigError` for a URI of no known store."""
        self.uri = canonical_uri(uri)
        self.store = open_store(self.uri)

    def current(self) -> Snapshot | None:
        """The latest snapshot; None before the first commit.

        Raises:
            ConfigError: if the table's store cannot be used or the snapshot is damaged.
        """
        numbers = self._numbers()
        if not numbers:
            return None
        number = numbers[-1]
        # A listing may lag behind where a look-up by name does not.
        while self._exists(number + 1):
            number += 1
        return self.at(number)

    def at(self, number: int) -> Snapshot:
        """One snapshot of the history.

        Raises:
            ConfigError: if there is none with this number, or it is damaged.
        """
        uri = self.snapshot_uri(number)
        try:
            data = self.store.get(uri)
        except FetchError as error:
            raise ConfigError(f"{self.uri!r}: snapshot {number} {self._why_not(number, error)}") from error
        try:
            return Snapshot.model_validate_json(data)
        except ValidationError as error:
            raise ConfigError(f"{uri!r}: not a snapshot: {error}") from error

    def history(self) -> tuple[Snapshot, ...]:
        """Every snapshot, oldest first."""
        snapshots: list[Snapshot] = []
        for number in self._numbers():
            try:
                snapshots.append(self.at(number))
            except ConfigError:
                if self._exists(number):
                    raise  # else it was vacuumed while we read the others
        return tuple(snapshots)

    def files(self, snapshot: Snapshot) -> tuple[str, ...]:
        """The URIs of a snapshot's files, for any engine that reads Parquet."""
        return tuple(self._uri_of(file) for file in snapshot.files)

    def local_files(self, snapshot: Snapshot) -> tuple[Path, ...]:
        """The same files as local paths, fetched into the cache where the table is in S3.

        Raises:
            ConfigError: if one is missing or damaged.
        """
        if not is_s3(self.uri):
            return tuple(Path(local_path(uri)) for uri in self.files(snapshot))
        return tuple(local_copy(self._uri_of(file), sha256=file.sha256) for file in snapshot.files)

    def read(self, snapshot: Snapshot | None, *, columns: Sequence[str]) -> pa.RecordBatchReader:
        """A snapshot's rows as a stream, file by file, holding one file's row group at a time; no rows for None."""
        return self.read_files(snapshot.files if snapshot else (), columns=columns)

    def read_files(self, files: Iterable[FileFacts], *, columns: Sequence[str]) -> pa.RecordBatchReader:
        """The rows of some of the table's files, as `read` streams them."""
        schema = pa.schema([TABLE_SCHEMA.field(name) for name in columns])
        uris = [self._uri_of(file) for file in files]
        batches = (batch.cast(schema) for batch in read_parts(uris, store=self.store, columns=columns))
        return pa.RecordBatchReader.from_batches(schema, batches)

    def commit(self, snapshot: Snapshot) -> Snapshot:
        """Make a snapshot the current one.

        Args:
            snapshot: follows its parent. Of a file that the parent lists too the size is checked, of any other also the
                content.

        Raises:
            SnapshotConflict: if the number is taken; the other snapshot stays as it is.
            ConfigError: if a listed file is missing or damaged, or nothing can be written.
        """
        assert snapshot.number == (snapshot.parent or 0) + 1, "a snapshot follows its parent"
        assert len({file.path for file in snapshot.files}) == len(snapshot.files), "a file is listed twice"
        self.verify(snapshot.files, retained=self.at(snapshot.parent).files if snapshot.parent else ())
        data = snapshot.model_dump_json(indent=1).encode()
        if not self.store.put_if_absent(self.snapshot_uri(snapshot.number), data):
            raise SnapshotConflict(
                f"{self.uri!r}: another run committed snapshot {snapshot.number} first; nothing was overwritten. "
                "Run the same command again: it plans against the new snapshot"
            )
        log.info("committed=%d files=%d rows=%d", snapshot.number, len(snapshot.files), snapshot.rows)
        return snapshot

    def carry_over(self, snapshot: Snapshot | None, *, drop_ids: ImageIds, run_id: str) -> tuple[FileFacts, ...]:
        """The files that hold a snapshot's rows without those of some images.

        A file that holds none of them is kept as it is; the others are rewritten into `run_id`'s folder of the same
        model, several at once, their rows otherwise unchanged. In memory are the image_ids of a million rows, those of
        one bucket that are dropped, and the files that are being rewritten.

        Args:
            snapshot: the current one; None for no rows at all.
            drop_ids: those that are superseded or deleted, whatever model labelled them.
            run_id: of the run that rewrites.

        Raises:
            ConfigError: if a file cannot be read or written.
        """
        remaining: list[FileFacts] = []
        with ThreadPoolExecutor(_THREADS) as readers, ThreadPoolExecutor(_REWRITES) as writers:
            for lot in lots_of(snapshot.files if snapshot else ()):
                touched = [file for file in lot if drop_ids.any_between(file.min_image_id, file.max_image_id)]
                keep = self._keep(touched, drop_ids, readers)
                rewritten = writers.map(lambda file, rows: self._only(file, rows, run_id=run_id), touched, keep)
                instead = dict(zip((file.path for file in touched), rewritten, strict=True))
                remaining += filter(None, (instead.get(file.path, file) for file in lot))
        return tuple(remaining)

    def _keep(self, files: Sequence[FileFacts], drop_ids: ImageIds, pool: ThreadPoolExecutor) -> list[pa.Array]:
        """For each file, which of its rows are not those of dropped images."""
        ids = list(pool.map(lambda file: self._rows(file, columns=["image_id"])["image_id"].combine_chunks(), files))
        if not ids:
            return []
        keep = pc.invert(drop_ids.hold(pa.chunked_array(ids)))
        starts = accumulate(map(len, ids), initial=0)
        return [keep.slice(start, len(part)) for start, part in zip(starts, ids, strict=False)]

    def _only(self, file: FileFacts, rows: pa.Array, *, run_id: str) -> FileFacts | None:
        """The file itself if all its rows are wanted, None if none is, else a new one with those that are."""
        if pc.all(rows).as_py():
            return file
        if not pc.any(rows).as_py():
            return None
        return write_part(
            self._rows(file, columns=TABLE_SCHEMA.names).filter(rows),
            store=self.store,
            labels_uri=self.uri,
            model_id=file.model_id,
            run_id=run_id,
            thresholds_id=file.thresholds_id,
        )

    def _rows(self, file: FileFacts, *, columns: Sequence[str]) -> pa.Table:
        return pa.Table.from_batches(list(read_parts([self._uri_of(file)], store=self.store, columns=columns)))

    def verify(self, files: Iterable[FileFacts], *, retained: Iterable[FileFacts] = ()) -> None:
        """Check that files are there and are what their facts say.

        Args:
            files: what is to be checked.
            retained: files whose content was checked before: of these the size has to do.

        Raises:
            ConfigError: naming each file that is missing, has another size, or another content.
        """
        known = {(file.path, file.sha256) for file in retained}
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda file: self._problem_with(file, read=(file.path, file.sha256) not in known), files)
            problems = [problem for problem in found if problem]
        if problems:
            raise ConfigError(f"{self.uri!r}: nothing is committed: {'; '.join(problems)}")

    def _problem_with(self, file: FileFacts, *, read: bool) -> str:
        uri = self._uri_of(file)
        try:
            found = self.store.stat(uri)
            if found is None:
                return f"{uri!r} is missing"
            if found.size != file.bytes:
                return f"{uri!r} has {found.size} bytes, not {file.bytes}"
            sha256 = self._sha256(uri) if read else file.sha256
        except FetchError as error:
            return str(error)
        return "" if sha256 == file.sha256 else f"{uri!r} has another content than was written: SHA-256 {sha256}"

    def _sha256(self, uri: str) -> str:
        digest = hashlib.sha256()
        with self.store.open(uri) as source:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def _numbers(self) -> list[int]:
        folder = join(self.uri, SNAPSHOT_DIRECTORY) + "/"
        names = (info.uri.rpartition("/")[2] for info in self.store.list(folder, missing_ok=True))
        return sorted(int(name.removesuffix(".json")) for name in names if _SNAPSHOT_NAME.fullmatch(name))

    def _exists(self, number: int) -> bool:
        try:
            return self.store.stat(self.snapshot_uri(number)) is not None
        except FetchError as error:
            raise ConfigError(f"{self.uri!r}: its snapshots cannot be looked up: {error}") from error

    def _uri_of(self, file: FileFacts) -> str:
        return join(self.uri, file.path)

    def _why_not(self, number: int, error: FetchError) -> str:
        numbers = self._numbers()
        if not numbers or number in numbers:
            return f"cannot be read: {error}"
        if number > numbers[-1]:
            return f"is not there yet; the latest is {numbers[-1]}"
        return f"has been vacuumed; those that are left begin with {numbers[0]}"

    def snapshot_uri(self, number: int) -> str:
        """Where a snapshot is, or would be."""
        return join(self.uri, SNAPSHOT_DIRECTORY, f"{number:020d}.json")
