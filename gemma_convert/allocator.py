"""Makes the C library reuse large blocks of memory, instead of returning each to the kernel.

By default glibc maps every large block afresh and keeps separate heaps for threads: half of a
conversion's CPU time goes into fresh pages, and freed blocks of several heaps add up. Settings:
`mallopt(3)`. Other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's malloc.h

_TRIM_BYTES = 128 << 20
_MMAP_BYTES = 1 << 30


def reuse_large_blocks() -> None:
    """One heap for all threads, from which large blocks come too, and which is trimmed late."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_ARENA_MAX, 1)
    mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)
    mallopt(_TRIM_THRESHOLD, _TRIM_BYTES)
