"""How the C library keeps large blocks of memory. Settings: `mallopt(3)` of glibc.

By default glibc maps a large block afresh until it has seen a few freed, then takes such blocks
from heaps that it keeps for every thread. Other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def reuse_large_blocks() -> None:
    """One heap for all threads, from which large blocks come too, and which is trimmed late.

    For conversions, whose blocks are all of one size: fresh pages cost them half of their CPU time,
    and blocks freed in the heaps of several threads add up.
    """
    _set(_ARENA_MAX, 1)
    _set(_MMAP_THRESHOLD, 1 << 30)
    _set(_TRIM_THRESHOLD, 128 << 20)


def return_large_blocks() -> None:
    """Blocks of 1 MiB or more are mapped by themselves, and threads share few heaps.

    For forward passes, whose arrays differ: what is left between those of one layer does not fit
    the next, and heaps would grow with every layer.
    """
    _set(_ARENA_MAX, 2)
    _set(_MMAP_THRESHOLD, 1 << 20)


def _set(parameter: int, value: int) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(parameter, value)
