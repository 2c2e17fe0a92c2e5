"""How the C library gives back the memory that tensors leave: by default at once, and so slowly."""

import ctypes
import sys
from typing import Final

_M_TRIM_THRESHOLD: Final = -1  # of mallopt, as in glibc's malloc.h
_M_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = 1 << 30  # glibc takes no larger one for blocks


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones.

    glibc maps each large block anew and returns it to the kernel when it is freed, so that a network's every feature
    map is pages that the kernel must clear again: half of the CPU time of a batch in a small network. The price is
    that the process stays as large as it once was. For a process that runs one network again and again.

    Returns:
        Whether the C library is one that can be told so.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library than glibc
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
