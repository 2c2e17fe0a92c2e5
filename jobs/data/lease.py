"""One writer of a label table at a time, by a lease that runs out when its holder dies.

The lease is a chain of small objects, `LABELS/_lease/<number, 20 digits>.json`. Each is made by create-if-absent and
never changed; the last one counts. To take, renew or give back the lease is to create the next number: of two who try,
one wins, and the other learns it. So a renewal and a takeover cannot both succeed, and no conditional overwrite is
needed, which not every S3 server has.

`fence` grows by one with each new holder. A holder that slept through its lease's end finds a later record where its
own next one should go, and may not commit (`confirm`). Should it sleep between that question and its commit, the
snapshot's own create-if-absent is the last guard: it wins over the newer run or loses to it, and overwrites nothing.

What is assumed of clocks: those of two machines that write the same table differ by less than `skew_seconds`. If they
do not, a lease can be taken from a run that lives; then one of the two fails to commit, and no row is harmed.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from jobs.data.object_store import ObjectStore, canonical_uri, join, open_store
from jobs.outcomes import LeaseHeld
from mgmtn.errors import ConfigError, FetchError

log = logging.getLogger(__name__)

LEASE_DIRECTORY: Final = "_lease"
EXIT_TERMINATED: Final = 128 + signal.SIGTERM
_RENEWALS: Final = 4  # in the time after which a lease runs out: three may fail
_POLL_SECONDS: Final = 1.0


class LeaseSettings(BaseModel):
    """How long a dead run keeps others out, and how long to wait for a living one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float = Field(
        120, gt=0, description="seconds after which the lease of a run that no longer renews it runs out"
    )
    skew_seconds: float = Field(15, ge=0, description="seconds by which the clocks of two machines may differ")
    wait_seconds: float = Field(
        0, ge=0, description="seconds to wait for a lease that another run holds before giving up with exit code 75"
    )


class LeaseRecord(BaseModel):
    """One object of the chain."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fence: int = Field(ge=1, description="grows with each holder")
    holder: str = Field(description="the run")
    host: str
    process: str = Field(description="kernel's boot, process namespace, process id and its start")
    written_at: AwareDatetime
    expires_at: AwareDatetime
    released: bool = False

    def is_free(self, now: datetime, *, skew: timedelta) -> bool:
        """Whether another may take the lease: given back, run out, or its holder is a dead process of this machine."""
        return self.released or now > self.expires_at + skew or _is_dead(self.process)


@contextlib.contextmanager
def held(labels_uri: str, *, holder: str, settings: LeaseSettings) -> Iterator["Lease"]:
    """Hold the table's lease, renewed by a thread, and give it back in the end, whatever the end is.

    A run that loses its lease is interrupted, where this is the main thread.

    Args:
        labels_uri: the table's folder.
        holder: the run's id, for others to read.
        settings: the times.

    Raises:
        LeaseHeld: another run holds it, or took it from this one.
        ConfigError: the table's folder cannot be written.
    """
    lease = Lease(labels_uri, holder=holder, settings=settings)
    lease.acquire()
    finished = threading.Event()
    interrupts = threading.current_thread() is threading.main_thread()
    renewing = threading.Thread(target=_renew_until, args=(lease, finished, interrupts), daemon=True, name="lease")
    try:
        with ending_on_sigterm(), _interrupted_if_lost(lease):
            renewing.start()
            try:
                yield lease
            finally:
                finished.set()
                renewing.join()
    except KeyboardInterrupt:
        if lease.lost:
            raise LeaseHeld(f"{lease.uri!r}: {lease.lost}; the run was interrupted") from None
        raise
    finally:
        lease.release()


def _renew_until(lease: "Lease", finished: threading.Event, interrupts: bool) -> None:
    while not finished.wait(lease.settings.seconds / _RENEWALS):
        try:
            lease.confirm()
        except LeaseHeld as error:
            log.error("event=lease_lost %s", error)
            if interrupts and not finished.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            return
        except (ConfigError, FetchError) as error:
            log.warning("event=lease_not_renewed error=%s", error)


@contextlib.contextmanager
def _interrupted_if_lost(lease: "Lease") -> Iterator[None]:
    """Let SIGINT interrupt a run that has lost its lease also where it is ignored, as by a shell's background jobs.

    Not SIGTERM: while Ray starts, its own handler of that aborts the process three seconds later.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return

    def interrupt(*_: object) -> None:
        if lease.lost:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the program as an exit does, through every `finally`; the old handler comes back in the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise SystemExit(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def current_holder(labels_uri: str) -> LeaseRecord | None:
    """The last record of a table's lease, whether it still holds or not; None if there never was one."""
    uri = canonical_uri(labels_uri)
    _, record = _last(open_store(uri), join(uri, LEASE_DIRECTORY))
    return record


class Lease:
    """One run's hold on a table."""

    def __init__(self, labels_uri: str, *, holder: str, settings: LeaseSettings) -> None:
        self.uri = canonical_uri(labels_uri)
        self.holder, self.settings = holder, settings
        self.fence = 0
        self.lost = ""
        self._number = 0
        self._expires_at = datetime.min.replace(tzinfo=UTC)
        self._store = open_store(self.uri)
        self._folder = join(self.uri, LEASE_DIRECTORY)
        self._lock = threading.Lock()

    def acquire(self) -> None:
        """Become the holder.

        Raises:
            LeaseHeld: another run is, and was until the time to wait was over.
        """
        patience = time.monotonic() + self.settings.wait_seconds
        while True:
            number, record = _last(self._store, self._folder)
            if record is None or record.is_free(_now(), skew=timedelta(seconds=self.settings.skew_seconds)):
                fence = record.fence + 1 if record else 1
                if self._create(number + 1, self._record(fence)):
                    self.fence = fence
                    self._forget(number)
                    log.info("event=lease_taken fence=%d from=%s", fence, record.holder if record else None)
                    return
                continue  # somebody was faster: look again
            if time.monotonic() >= patience:
                raise LeaseHeld(
                    f"{self.uri!r}: run {record.holder} on {record.host} holds the lease, "
                    f"until {record.expires_at:%H:%M:%S} UTC unless it renews it; no work was started"
                )
            time.sleep(_POLL_SECONDS)

    def confirm(self) -> None:
        """Renew the lease, which proves that it is still held.

        Raises:
            LeaseHeld: it is not; this run must not commit.
            ConfigError, FetchError: the store does not answer.
        """
        with self._lock:
            if not self.lost and not self._extend():
                self.lost = f"another run took the lease {self.fence}, which this one had not renewed in time"
            if not self.lost:
                self._check_last()
            if self.lost:
                raise LeaseHeld(f"{self.uri!r}: {self.lost}; nothing was published")
            self._forget(self._number - 1)

    def release(self) -> None:
        """Give the lease back, if it is still held; a store that does not answer leaves it to run out."""
        with self._lock:
            if self.lost:
                return
            try:
                self._extend(released=True)
                self._forget(self._number - 1)
            except (ConfigError, FetchError) as error:
                log.warning("event=lease_not_released expires_at=%s error=%s", self._expires_at, error)

    def _extend(self, *, released: bool = False) -> bool:
        """Create the record after this run's last one; False if that is another's by now."""
        if self._create(self._number + 1, self._record(self.fence, released=released)):
            return True
        # It may be a renewal of this run that was written, though the store's answer was lost.
        number, record = _last(self._store, self._folder)
        if record is None or (record.fence, record.holder, record.released) != (self.fence, self.holder, False):
            return False
        self._number, self._expires_at = number, record.expires_at
        return self._create(number + 1, self._record(self.fence, released=released))

    def _check_last(self) -> None:
        # A holder that slept very long finds its next number free again: others' records were there and are cleared.
        number, record = _last(self._store, self._folder)
        if number != self._number or record is None or record.fence != self.fence:
            self.lost = f"lease {self.fence} ran out, and others have held it since"
            self._store.delete(_uri(self._folder, self._number))

    def _create(self, number: int, record: LeaseRecord) -> bool:
        created = self._store.put_if_absent(_uri(self._folder, number), record.model_dump_json(indent=1).encode())
        if created:
            self._number, self._expires_at = number, record.expires_at
        return created

    def _record(self, fence: int, *, released: bool = False) -> LeaseRecord:
        now = _now()
        return LeaseRecord(
            fence=fence,
            holder=self.holder,
            host=socket.gethostname(),
            process=_this_process(),
            written_at=now,
            expires_at=now + timedelta(seconds=self.settings.seconds),
            released=released,
        )

    def _forget(self, before: int) -> None:
        """Clear records that nobody looks at; the one before the last stays, for whoever is about to read it."""
        try:
            for number in _numbers(self._store, self._folder):
                if number < before:
                    self._store.delete(_uri(self._folder, number))
        except (ConfigError, FetchError) as error:
            log.warning("event=lease_records_stay error=%s", error)


def _last(store: ObjectStore, folder: str) -> tuple[int, LeaseRecord | None]:
    """Number and content of the last record; 0 and None if there is none."""
    while True:
        number = max(_numbers(store, folder), default=0)
        # A listing may lag behind where a look-up by name does not.
        while store.stat(_uri(folder, number + 1)) is not None:
            number += 1
        if number == 0:
            return 0, None
        try:
            return number, LeaseRecord.model_validate_json(store.get(_uri(folder, number)))
        except FetchError:
            if store.stat(_uri(folder, number)) is not None:
                raise  # else it was cleared between the two, since there are later ones
        except ValidationError as error:
            raise ConfigError(f"{_uri(folder, number)!r}: not a lease: {error}") from error


def _numbers(store: ObjectStore, folder: str) -> list[int]:
    names = (info.uri.rpartition("/")[2] for info in store.list(folder + "/", missing_ok=True))
    stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return [int(stem) for stem in stems if len(stem) == 20 and stem.isdecimal()]


def _uri(folder: str, number: int) -> str:
    return join(folder, f"{number:020d}.json")


def _now() -> datetime:
    return datetime.now(UTC)


def _this_process() -> str:
    return f"{_machine()}/{os.getpid()}/{_started(os.getpid())}"


def _machine() -> str:
    """Names the kernel's boot and the process namespace, within which a process id means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""  # not Linux: a dead holder's lease runs out, no sooner


def _started(pid: int) -> str:
    """A process's start in ticks since boot, as the kernel counts them; empty for a process that is gone or a zombie.

    Not psutil's time of day: it moves with the clock, and a living process would be taken for another.
    """
    try:
        # The name, in parentheses, may hold anything; state and start are fields 3 and 22.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _is_dead(process: str) -> bool:
    """True only for a process of this machine and namespace that is known to be gone."""
    machine, pid, started = process.rsplit("/", 2)
    return bool(machine) and machine == _machine() and _started(int(pid)) != started
