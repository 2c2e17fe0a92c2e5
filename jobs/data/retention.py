"""What of a label table may be deleted, and its deletion in an order that a crash cannot turn into a broken table.

Snapshots go first, then notes of dead runs, then files. A snapshot that is there has all its files, whenever the
deletion stops; files without a snapshot are leftovers, and the next deletion finds them. The other way round, a
snapshot without its files would be listed as part of the history and fail whoever reads it.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import groupby, pairwise
from typing import Final

from jobs.data.object_store import ObjectInfo, is_s3, join, local_path, relative
from jobs.data.resume import RUN_DIRECTORY, Unfinished, discarded_files, unfinished_runs
from jobs.data.snapshots import LabelTable, Snapshot, SnapshotConflict, next_snapshot
from jobs.outcomes import LeaseHeld
from mgmtn.errors import ConfigError

log = logging.getLogger(__name__)

_PART: Final = re.compile(r"model=[^/]+/run=(?P<run>[^/]+)/part-[0-9a-f]+\.parquet")
_TORN: Final = re.compile(r"(.*/)?\.[0-9a-f]{32}\.tmp")  # what `LocalStore` writes before it gives a file its name
_NOTE: Final = re.compile(RUN_DIRECTORY + r"/.+\.json")
_THREADS: Final = 16


@dataclass(frozen=True)
class Retention:
    """What stays: every snapshot that was the current one since `cutoff`, and those of the `keep` latest states.

    Attributes:
        cutoff: what nobody could need since then may go; None: all of it, however new.
        keep: states, the current one among them, at least 1; snapshots in a row with the same files are one (`fence`).
    """

    cutoff: datetime | None
    keep: int = 1

    @classmethod
    def of(cls, older_than: timedelta, *, keep: int = 1) -> "Retention":
        """Ages are those of this moment."""
        # Without an age nothing may hang on the difference between this machine's clock and the store's.
        return cls(datetime.now(UTC) - older_than if older_than else None, keep)

    def is_over(self, moment: datetime | None) -> bool:
        """Whether a moment is long enough ago; False if it is not known when it was."""
        return self.cutoff is None or (moment is not None and moment <= self.cutoff)


@dataclass
class Sweep:
    """What is to be deleted, and what is not.

    Attributes:
        current: number of the current snapshot.
        snapshots: numbers of those that go, oldest first.
        notes: URIs of notes of runs that go.
        files: Parquet files that go.
        torn: unfinished writes that go, without their names yet.
        kept_snapshots: numbers.
        kept_files: how many files they need.
        waiting: files of unfinished runs, which may still be taken up.
        recent: files of no snapshot and no known run that are too new to go.
        foreign: objects that are none of ours; they stay.
    """

    current: int
    snapshots: list[int]
    kept_snapshots: list[int]
    kept_files: int
    notes: list[str] = field(default_factory=list)
    files: list[ObjectInfo] = field(default_factory=list)
    torn: list[ObjectInfo] = field(default_factory=list)
    waiting: int = 0
    recent: int = 0
    foreign: int = 0

    @property
    def bytes(self) -> int:
        return sum(info.size or 0 for info in [*self.files, *self.torn])


def plan_sweep(table: LabelTable, retention: Retention) -> Sweep:
    """Look through a table for what may go. Nothing is deleted.

    A file goes if no snapshot that stays lists it, and a snapshot that goes does, or it was written before the cutoff.
    Files of unfinished runs wait, whatever their age, as long as a run of their model began or wrote something since
    the cutoff: it may be a model's work of many nights. Those of them that a later run has discarded do not wait.

    Raises:
        ConfigError: there is no label table, or it cannot be listed or read.
    """
    snapshots = table.history()
    if not snapshots:
        raise ConfigError(f"LABELS {table.uri!r}: there is no label table")
    kept, dropped = _divide(snapshots, retention)
    needed = {file.path for snapshot in kept for file in snapshot.files}
    released = {file.path for snapshot in dropped for file in snapshot.files} - needed
    listed = table.store.list(table.uri.rstrip("/") + "/", ordered=False)
    objects = {relative(info.uri, folder=table.uri): info for info in listed}
    runs = unfinished_runs(table)
    waiting = _waiting_runs(runs, objects, retention)
    discarded = discarded_files(table)
    sweep = Sweep(
        current=snapshots[-1].number,
        snapshots=[snapshot.number for snapshot in dropped],
        kept_snapshots=[snapshot.number for snapshot in kept],
        kept_files=len(needed),
    )
    for path, info in objects.items():
        _sort_in(
            sweep,
            path,
            info,
            needed=needed,
            released=released,
            waiting=waiting,
            discarded=discarded,
            retention=retention,
        )
    return sweep


def _divide(snapshots: Iterable[Snapshot], retention: Retention) -> tuple[list[Snapshot], list[Snapshot]]:
    """The snapshots that stay, and those that go.

    Its age is that of its successor: what was the current one an hour ago may still be being read.
    """
    snapshots = list(snapshots)
    going = [one for one, successor in pairwise(snapshots) if retention.is_over(successor.created_at)]
    states = [[*same] for _, same in groupby(snapshots, key=lambda snapshot: [file.path for file in snapshot.files])]
    latest = {snapshot.number for same in states[-retention.keep :] for snapshot in same}
    gone = {snapshot.number for snapshot in going} - latest
    return (
        [snapshot for snapshot in snapshots if snapshot.number not in gone],
        [snapshot for snapshot in snapshots if snapshot.number in gone],
    )


def _waiting_runs(runs: Iterable[Unfinished], objects: dict[str, ObjectInfo], retention: Retention) -> set[str]:
    """Ids of the unfinished runs whose work somebody may still take up."""
    last: dict[str, datetime] = {}  # sign of life, by run
    for path, info in objects.items():
        if (part := _PART.fullmatch(path)) and info.modified_at:
            last[part["run"]] = max(last.get(part["run"], info.modified_at), info.modified_at)
    runs = list(runs)
    alive = set()
    for run in runs:
        moments = [run.note.started_at, *([run.refusal.refused_at] if run.refusal else [])]
        if not retention.is_over(max([*moments, last.get(run.note.run_id, moments[0])])):
            alive.add(run.note.model_id)
    return {run.note.run_id for run in runs if run.note.model_id in alive}


def _sort_in(
    sweep: Sweep,
    path: str,
    info: ObjectInfo,
    *,
    needed: set[str],
    released: set[str],
    waiting: set[str],
    discarded: frozenset[str],
    retention: Retention,
) -> None:
    """Decide about one object of the table."""
    if part := _PART.fullmatch(path):
        if path in needed:
            return
        if path in released:
            sweep.files.append(info)
        elif part["run"] in waiting and path not in discarded:
            sweep.waiting += 1
        elif retention.is_over(info.modified_at):
            sweep.files.append(info)
        else:
            sweep.recent += 1
    elif _TORN.fullmatch(path):
        if retention.is_over(info.modified_at):
            sweep.torn.append(info)
    elif _NOTE.fullmatch(path):
        run_id = path.removeprefix(f"{RUN_DIRECTORY}/").removesuffix(".json")
        run_id = run_id.removesuffix(".refused").removesuffix(".discarded")
        if run_id not in waiting:
            sweep.notes.append(info.uri)
    elif not path.startswith("_"):
        sweep.foreign += 1


def fence(table: LabelTable, sweep: Sweep, *, run_id: str) -> Sweep:
    """Commit the current state again, so that no run which sleeps in its commit can still publish files that go.

    Such a run has checked its files and lost its lease since; its own were never listed, or a snapshot that goes lists
    them. The number that it is about to create is that of this snapshot.

    Args:
        table: the label table.
        sweep: from `plan_sweep`, made while this run held the lease.
        run_id: of this run, which still holds it.

    Returns:
        The sweep, with the new snapshot as the current one.

    Raises:
        LeaseHeld: another run has committed since the sweep was planned.
        ConfigError: a file of the current snapshot is missing: an older one may be what is left to restore.
    """
    current = table.at(sweep.current)
    again = next_snapshot(
        current,
        files=current.files,
        run_id=run_id,
        model_id=current.model_id,
        thresholds_id=current.thresholds_id,
        inventory_digest=current.inventory_digest,
    )
    try:
        number = table.commit(again).number
    except SnapshotConflict as error:
        raise LeaseHeld(str(error)) from error
    return replace(sweep, current=number, kept_snapshots=[*sweep.kept_snapshots, number])


def delete(table: LabelTable, sweep: Sweep, *, check: Callable[[], None]) -> None:
    """Delete what a sweep found, in the order that keeps every snapshot whole.

    Args:
        table: the label table.
        sweep: from `plan_sweep`.
        check: called before anything and between the steps; raises where this run may no longer write.

    Raises:
        LeaseHeld: the table has changed since it was looked through.
        ConfigError: something may not be deleted.
    """
    check()
    current = table.current()
    if current is None or current.number != sweep.current:
        raise LeaseHeld(f"{table.uri!r}: another run committed a snapshot after {sweep.current}; nothing was deleted")
    for number in sweep.snapshots:  # one after the other: the history never has a hole
        table.store.delete(table.snapshot_uri(number))
    with ThreadPoolExecutor(_THREADS) as threads:
        for uris in (sweep.notes, [info.uri for info in [*sweep.files, *sweep.torn]]):
            check()
            list(threads.map(table.store.delete, uris))
    if not is_s3(table.uri):
        _remove_empty_folders(join(table.uri, relative(info.uri, folder=table.uri)) for info in sweep.files)


def _remove_empty_folders(files: Iterable[str]) -> None:
    """The folders of a run, and of a model, whose last file is gone."""
    runs = {os.path.dirname(local_path(uri)) for uri in files}
    for folder in [*runs, *{os.path.dirname(run) for run in runs}]:
        try:
            os.rmdir(folder)
        except OSError as error:
            log.debug("folder=%r stays=%s", folder, error.strerror)
