"""Progress of long work on stderr: a bar with rate and time left on a terminal, else a line at intervals."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

LOG_INTERVAL = 10.0  # seconds between lines where stderr is not a terminal


class WorkProgress:
    """How far one piece of work has come."""

    def __init__(self, name: str, *, total: int, unit: str, bar: Progress | None) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0
        self.started = self.last_line = time.monotonic()
        self._bar = bar
        self._task = bar.add_task(name, total=total, rate="") if bar else None

    def advance(self, count: int, note: str = "") -> None:
        """Count finished units; `note` says more, such as the failures so far."""
        self.set(self.done + count, note)

    def set(self, done: int, note: str = "") -> None:
        """Say how many units are finished."""
        self.done = done
        now = time.monotonic()
        rate = done / max(now - self.started, 1e-9)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, rate=f"{rate:.1f} {self.unit}/s {note}")
        elif now - self.last_line >= LOG_INTERVAL:
            self.last_line = now
            left = f"{(self.total - done) / rate:.0f}s" if rate else "unknown"
            line = "progress=%s done=%d total=%d rate=%.1f/s eta=%s %s"
            log.info(line, self.name, done, self.total, rate, left, note)


@contextmanager
def progress_bar(name: str, *, total: int, unit: str) -> Iterator[WorkProgress]:
    """Show the progress of `total` units of work."""
    if not sys.stderr.isatty():
        yield WorkProgress(name, total=total, unit=unit, bar=None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        yield WorkProgress(name, total=total, unit=unit, bar=bar)
