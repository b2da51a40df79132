"""What this machine can do at most, in GB/s, to stand beside the figures of a conversion."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gemma_convert.arrays.values import convert
from gemma_convert.engine.transfer import WORKERS

BLOCK_BYTES = 32 << 20
FILE_BLOCKS = 24
ROUNDS = 5
WIDTH = 4096


def machine_figures(folder: Path) -> dict[str, float]:
    """Figure → GB/s, medians of five.

    Copies and transposed copies (bfloat16, rows a power of two apart) are those of as many threads
    as a conversion has, reads and writes those of one; the disk's is a write with its sync.
    """
    source = np.ones((WORKERS, BLOCK_BYTES // 2 // WIDTH, WIDTH), np.uint16)
    target = np.ones_like(source)
    turned = np.ones((WORKERS, WIDTH, BLOCK_BYTES // 2 // WIDTH), np.uint16)
    path = folder / "machine.bin"
    figures = {
        "memcpy": _rate(lambda: _threads(lambda at: np.copyto(target[at], source[at])), source),
        "transposed copy": _rate(
            lambda: _threads(lambda at: convert(source[at].T, turned[at], None)), source
        ),
    }
    block = source[0].reshape(-1).view(np.uint8)
    try:
        rates = [_file_rates(path, block) for _ in range(ROUNDS)]
    finally:
        path.unlink(missing_ok=True)
    names = ("write into the page cache", "write and sync", "read from the page cache")
    return figures | {
        name: statistics.median(rates)
        for name, rates in zip(names, zip(*rates, strict=True), strict=True)
    }


def _threads(job: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(job, range(WORKERS)))


def _rate(job: Callable[[], None], data: np.ndarray) -> float:
    times = []
    for _ in range(ROUNDS):
        started = time.monotonic()
        job()
        times.append(time.monotonic() - started)
    return data.nbytes / statistics.median(times) / 1e9


def _file_rates(path: Path, block: np.ndarray) -> tuple[float, float, float]:
    """GB/s of a new file: written, written and synced, read."""
    path.unlink(missing_ok=True)
    size = block.nbytes * FILE_BLOCKS / 1e9
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        started = time.monotonic()
        for number in range(FILE_BLOCKS):
            os.pwrite(descriptor, block.data, number * block.nbytes)
        written = time.monotonic() - started
        os.fsync(descriptor)
        synced = time.monotonic() - started
        started = time.monotonic()
        for number in range(FILE_BLOCKS):
            os.preadv(descriptor, [block.data], number * block.nbytes)
        read = time.monotonic() - started
    finally:
        os.close(descriptor)
    return size / written, size / synced, size / read
