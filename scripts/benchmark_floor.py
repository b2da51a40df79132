#!/usr/bin/env python3
"""The least that a conversion to MaxText must do: read, transpose, write one raw file, sync.

scripts/benchmark_floor.py SOURCE FILE
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np

from gemma_convert.arrays.dtypes import DTypePolicy, numpy_dtype
from gemma_convert.arrays.values import convert
from gemma_convert.engine.transfer import WORKERS
from gemma_convert.mapping.plan import Plan
from gemma_convert.mapping.planning import plan_to_native
from gemma_convert.mapping.region import blocks, selection
from gemma_convert.mapping.table import load_table
from gemma_convert.model.config import read_architecture
from gemma_convert.stores.safetensors.reader import SafetensorsFolder


def floor(source: Path, target: Path) -> None:
    """Reads every tensor once, transposes it as a conversion does, writes one raw file, syncs."""
    with SafetensorsFolder(source) as reader:
        plan = plan_to_native(
            read_architecture(source), load_table("maxtext"), reader.specs, DTypePolicy()
        )
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT, 0o644)
        with ThreadPoolExecutor(WORKERS) as pool:
            local = threading.local()
            jobs = [pool.submit(job, local) for job in _floor_jobs(plan, reader, descriptor)]
            for job in jobs:
                job.result()
        os.fsync(descriptor)
        os.close(descriptor)


def _floor_jobs(
    plan: Plan, reader: SafetensorsFolder, descriptor: int
) -> Iterator[Callable[[threading.local], None]]:
    """One job a block: its own read, transpose and write, in two buffers of its thread."""
    place = 0
    for name, source in plan.sources.items():
        offset = 0
        for ranges in blocks(source.region, source.steps):
            lengths = source.region.lengths(ranges)
            size = prod(lengths) * source.spec.itemsize

            def job(
                local: threading.local,
                name: str = name,
                source: object = source,
                ranges: Mapping[str, tuple[int, int]] = ranges,
                lengths: tuple[int, ...] = lengths,
                size: int = size,
                offset: int = offset,
                place: int = place,
            ) -> None:
                given = _buffer(local, "given", size)
                reader.read_into(reader.tensors[name], offset, given.data)
                dtype = numpy_dtype(source.spec.dtype)
                block = given.view(dtype).reshape(lengths)
                at = place
                for copy in source.copies:
                    if copy.source.meets(ranges):
                        part = block[selection(copy, ranges)].transpose(copy.permutation)
                        spec = plan.targets[copy.target.tensor].spec
                        count = part.size * spec.itemsize
                        made = _buffer(local, "made", count)
                        values = made.view(numpy_dtype(spec.dtype)).reshape(part.shape)
                        convert(part, values, copy.scale)
                        os.pwrite(descriptor, made.data, at)
                        at += count

            yield job
            place += size * (2 if source.copies[0].scale is not None else 1)
            offset += size


def _buffer(local: threading.local, name: str, size: int) -> np.ndarray:
    buffer = getattr(local, name, None)
    if buffer is None or buffer.size < size:
        buffer = np.empty(size, np.uint8)
        setattr(local, name, buffer)
    return buffer[:size]


if __name__ == "__main__":
    floor(Path(sys.argv[1]), Path(sys.argv[2]))
