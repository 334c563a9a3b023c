"""Memory for chunks: its peak follows what is in motion, not the number of threads that ever held a chunk."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

_M_ARENA_MAX = -8


def bound_memory() -> None:
    """Tell glibc to keep two heaps at most. By itself it lets every thread have one, and each keeps what it once held.

    Call it early in a process that moves tensors; elsewhere than on glibc it does nothing.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)
