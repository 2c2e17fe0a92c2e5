"""Ends this process when its work hangs: a decoder in an endless loop, a call of a driver that never returns.

A thread says which work it was, shows where every thread stands, and ends the process. Code that never gives up the
interpreter's lock stops that thread too: for it, a thread of `faulthandler`, which needs no lock, does the last two a
moment later. A process that hangs in the kernel itself (a dead network file system) outlives both.
"""

import contextlib
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Final

log = logging.getLogger(__name__)

# Of the process, whatever stands for `sys.stderr`: faulthandler writes to a file descriptor.
_STDERR: Final = 2
_EXIT_HUNG: Final = 1  # what faulthandler ends a process with
_SECONDS_LATER: Final = 5.0


class _Watchdog:
    """Watches one thread's work; a thread of its own starts with the first."""

    def __init__(self) -> None:
        self._work, self._seconds = "", 0.0
        self._ends_at: float | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def watch(self, work: str, seconds: float) -> None:
        with self._changed:
            self._work, self._seconds = work, seconds
            self._ends_at = time.monotonic() + seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._end_what_hangs, daemon=True, name="watchdog")
                self._thread.start()
            self._changed.notify()
        faulthandler.dump_traceback_later(seconds + _SECONDS_LATER, exit=True, file=_STDERR)

    def extend(self) -> None:
        if self._ends_at is not None:
            self.watch(self._work, self._seconds)

    def rest(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        with self._changed:
            self._ends_at = None

    def _end_what_hangs(self) -> None:
        with self._changed:
            while self._ends_at is None or time.monotonic() < self._ends_at:
                self._changed.wait(None if self._ends_at is None else self._ends_at - time.monotonic())
            log.error("event=hung work=%r seconds=%g next=end_of_process", self._work, self._seconds)
            faulthandler.dump_traceback(file=_STDERR, all_threads=True)
            os._exit(_EXIT_HUNG)


_watchdog: Final = _Watchdog()


@contextlib.contextmanager
def ended_if_it_hangs(work: str, *, seconds: float) -> Iterator[None]:
    """End this process if the work within, or a step of it, takes longer; one thread of a process at a time.

    Args:
        work: names it in the log.
        seconds: of the work, or between two calls of `still_working`; 0: no limit.
    """
    if not seconds:
        yield
        return
    _watchdog.watch(work, seconds)
    try:
        yield
    finally:
        _watchdog.rest()


def still_working() -> None:
    """Called by work when it has come a step further: its time begins anew. Costs 0.1 ms."""
    _watchdog.extend()
