#!/usr/bin/env python3
"""Where the seconds of one command go, phase by phase.

Runs a command of gemma-convert in this process, with clocks around the functions that do each job.
Seconds of work are those of all threads together, so that their sum may exceed the time that passed
("total"). "wait" is the time in which the reader waits for a free buffer, so it is no work.

    scripts/benchmark_phases.py FILE.json to-native SOURCE TARGET --format maxtext
"""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTED = time.monotonic()

PHASES = {
    "start": "the interpreter, imports, the command line",
    "plan": "config.json, headers, tables, and the places of arrays that are declared",
    "read": "bytes of the source into a buffer",
    "values": "transposed, cast, scaled and compared with what comes back",
    "checksum": "of what is written",
    "write": "into the target's files, or handed to tensorstore",
    "again": "bytes of an export that are read again for their checksum",
    "wait": "until a buffer is free",
    "metadata": "the sidecar, the tree, the seal",
    "sync": "until the disk has everything, and the new name",
}


Size = Callable[..., int]
"""The bytes that a call moves, by what it is given."""


@dataclass
class Clock:
    """Seconds of all threads together, the CPU's among them, and bytes."""

    seconds: float = 0.0
    cpu: float = 0.0
    nbytes: int = 0


class Clocks:
    """One clock a phase. What runs inside another phase's function counts for the inner one."""

    def __init__(self) -> None:
        self.phases = {name: Clock() for name in PHASES}
        self._lock = threading.Lock()
        self._inside = threading.local()

    def wrap(
        self, owner: Any, name: str, phase: str, size: Callable[..., int] | None = None
    ) -> None:
        """Puts a clock around a function of a module or class; `size` gives the bytes of a call."""
        call = getattr(owner, name)

        @functools.wraps(call)
        def timed(*given: Any, **named: Any) -> Any:
            outer = getattr(self._inside, "spent", (0.0, 0.0))
            self._inside.spent = 0.0, 0.0
            seconds, cpu = time.monotonic(), time.thread_time()
            try:
                return call(*given, **named)
            finally:
                seconds, cpu = time.monotonic() - seconds, time.thread_time() - cpu
                inner = self._inside.spent
                with self._lock:
                    clock = self.phases[phase]
                    clock.seconds += seconds - inner[0]
                    clock.cpu += cpu - inner[1]
                    clock.nbytes += 0 if size is None else size(*given, **named)
                self._inside.spent = outer[0] + seconds, outer[1] + cpu

        setattr(owner, name, timed)


def watch(clocks: Clocks) -> None:
    """Puts clocks around what a conversion does, both ways."""
    from gemma_convert.engine import casting, publishing, restoring, resumable, transfer
    from gemma_convert.stores import open_files
    from gemma_convert.stores.orbax import raw_chunks, writer
    from gemma_convert.stores.safetensors import checked_writer
    from gemma_convert.stores.safetensors import writer as shards
    from gemma_convert.tasks import to_hf, to_native

    def given(place: int) -> Size:
        return lambda *arguments: memoryview(arguments[place]).nbytes

    clocks.wrap(open_files.OpenFiles, "read_into", "read", given(3))
    clocks.wrap(raw_chunks.RawChunks, "read", "read", lambda _, __, values: values.nbytes)
    clocks.wrap(casting.Casting, "fill", "values", lambda *a: a[4].nbytes)
    clocks.wrap(restoring.Restoring, "fill", "values", lambda *a: a[4].nbytes)
    for module in (writer, shards):
        clocks.wrap(module, "checksum", "checksum", lambda values: values.nbytes)
    clocks.wrap(writer.OrbaxWriter, "write", "write", lambda *a: a[3].nbytes)
    clocks.wrap(shards.SafetensorsWriter, "write", "write", lambda *a: a[3].nbytes)
    clocks.wrap(checked_writer.CheckedWriter, "_read", "again")
    clocks.wrap(transfer._Buffers, "take", "wait")
    clocks.wrap(transfer.Transfer, "_drain", "write")
    clocks.wrap(publishing, "sync_folder", "sync")
    clocks.wrap(publishing.StagedFolder, "publish", "sync")
    clocks.wrap(writer.OrbaxWriter, "declare", "plan")
    clocks.wrap(to_native, "plan_conversion", "plan")
    clocks.wrap(to_native, "write_sidecar", "metadata")
    clocks.wrap(to_hf, "open_checkpoint", "plan")
    clocks.wrap(to_hf, "plan_export", "plan")
    clocks.wrap(resumable, "Journal", "metadata")


def main() -> int:
    from gemma_convert.cli import app

    clocks = Clocks()
    watch(clocks)
    clocks.phases["start"].seconds = time.monotonic() - STARTED
    report, sys.argv = Path(sys.argv[1]), ["gemma-convert", *sys.argv[2:]]
    code = app._run()
    phases = {name: vars(clock) for name, clock in clocks.phases.items()}
    values = {"total": time.monotonic() - STARTED, "phases": phases}
    report.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
