"""Memory for chunks: given back as soon as it is free, so that its peak is what is in motion and not what ever was."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8


def bound_memory() -> None:
    """Tell glibc to map buffers of a megabyte and more by themselves, and to keep two heaps at most.

    By itself it lets every thread have a heap, takes chunks from it, and keeps what is freed amid them: a coordinator's
    peak then grows with the number of threads and sites that ever held a chunk, to twice what this gives it. Call it
    early in a process that moves tensors; elsewhere than on glibc it does nothing.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
