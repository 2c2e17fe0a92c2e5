"""Temporary folders that do not outlive their process, even one that is killed.

Such a process cannot clean up, so the next one that needs a folder in the same place does it. Whether a folder's
process is alive is told by a lock on the folder, which the kernel takes off when the process ends, however that is:
no process id is asked about, which a reboot or another container would give to somebody else.
"""

import fcntl
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

_PREFIX: Final = "mgmtn-scratch-"
_NAME: Final = re.compile(_PREFIX + r"[a-z]+-[a-z0-9_]{8}")  # a user's own folder must not look so


@contextmanager
def scratch_folder(purpose: str, *, within: Path | None = None) -> Iterator[Path]:
    """A new folder, which goes in the end; first, those that dead processes left beside it.

    Args:
        purpose: a word in small letters, for people who wonder what fills their disk.
        within: a folder of this machine; None for TMPDIR's.

    Raises:
        OSError: it cannot be made.
    """
    parent = Path(tempfile.gettempdir() if within is None else within)
    _clear(parent)
    folder, lock = _new_folder(parent, f"{_PREFIX}{purpose}-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _new_folder(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """A folder and what holds its lock; None where folders cannot be locked (NFS), and nobody clears up either."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            lock = _locked(folder)
        except (FileNotFoundError, BlockingIOError):
            continue  # another process, clearing up, took it for a dead one's before it was locked
        except OSError as error:
            log.debug("event=scratch_without_lock folder=%r error=%s", str(folder), error)
            return folder, None
        if folder.exists():
            return folder, lock
        os.close(lock)


def _clear(parent: Path) -> None:
    """Remove the folders here whose processes are dead."""
    for folder in parent.glob(f"{_PREFIX}*"):
        if not _NAME.fullmatch(folder.name):
            continue
        with suppress(OSError):  # its process lives, or it is another user's, or gone by now
            lock = _locked(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            log.info("event=scratch_removed folder=%r", str(folder))


def _locked(folder: Path) -> int:
    """A descriptor that holds the folder's lock until it is closed."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
