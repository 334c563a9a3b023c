"""Memory for chunks: kept, not given back to the system and asked for again."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> None:
    """Tell glibc to serve buffers of a chunk's size from a heap that it keeps, and from two heaps at most.

    By itself it maps each such buffer anew, whose pages the system clears one by one, and lets every thread have a heap
    of its own: a coordinator's round takes a fifth more time in the system then, and its peak memory grows with the
    number of threads that ever held a chunk. Call it early in a process that moves tensors; elsewhere than on glibc it
    does nothing.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)
