"""Standard output and standard error of a command, whatever the shell has made of them.

A reader that has left (`| head`) is no failure: what it would have got is dropped, and the command
ends with its own exit code. Output that has no room is one: nothing that was printed can be relied
on, so the command ends with exit code 74, EX_IOERR of sysexits.h.
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gemma_convert.errors import OutputError


class _Descriptor(io.RawIOBase):
    """A descriptor that takes all that is written, and keeps the first failure that counts."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        try:
            return self._write(view)
        except BrokenPipeError:
            return len(view)
        except OSError as error:
            self.failure = self.failure or error
            return len(view)

    def _write(self, view: memoryview) -> int:
        """How many bytes were taken; a pipe that somebody has made non-blocking is waited for."""
        while True:
            try:
                return os.write(self._descriptor, view)
            except BlockingIOError:
                select.select([], [self._descriptor], [])


@contextmanager
def standard_streams() -> Iterator[Callable[[], OutputError | None]]:
    """Within it both streams can be written; what it gives tells whether output had no room.

    Names of files that are no text are printed with escapes. Streams that a caller put into
    `sys` are left alone.
    """
    _open_closed_ones()
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
        yield lambda: None
        return
    before = sys.stdout, sys.stderr
    outs = _Descriptor(1), _Descriptor(2)
    sys.stdout, sys.stderr = (
        _text(out, getattr(old, "encoding", "utf-8"), out.isatty() or out is outs[1])
        for out, old in zip(outs, before, strict=True)
    )
    try:
        yield lambda: _failed(outs[0])
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _failed(out: _Descriptor) -> OutputError | None:
    sys.stdout.flush()
    if out.failure is None:
        return None
    return OutputError(
        "Standard output cannot be written, so the printed output is incomplete.",
        found=out.failure.strerror,
        do="free some space where it is redirected to, and run the command again",
    )


def _text(out: _Descriptor, encoding: str, lines: bool) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(out)
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=lines)


def _open_closed_ones() -> None:
    """A stream that the shell has closed goes nowhere; no file may come to stand in its place."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115, PTH123
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
