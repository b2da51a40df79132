"""The only place that prints: results on stdout, progress and chatter on stderr.

What comes from a checkpoint is printed without doing anything to the terminal: of all text no
characters but letters, signs and our own line ends and tabs get there as they are.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

PLAIN_INTERVAL_S = 5.0

_LAYOUT = "\n\t"


class Progress(Protocol):
    """Something that is told how many bytes are done, and of which tensor."""

    def advance(self, count: int, name: str) -> None: ...


class NoProgress:
    """Progress that nobody watches."""

    def advance(self, count: int, name: str) -> None:
        return None


class ProgressBar:
    """Bytes, rate, time left and the current tensor on stderr; plain lines without a terminal."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self._done, self._started = 0, time.monotonic()
        self._next_line = self._started + PLAIN_INTERVAL_S
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> ProgressBar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[tensor]}", style="dim", markup=False),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self.title, total=self.total, tensor="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int, name: str) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, advance=count, tensor=printable(name)[-48:])
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_INTERVAL_S
            note(self._line(printable(name)))

    def _line(self, name: str) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = self._done / seconds
        left = (self.total - self._done) / rate if rate else float("inf")
        share = self._done / self.total if self.total else 1.0
        return (
            f"{self.title} {share:4.0%}  {human_bytes(self._done)} of {human_bytes(self.total)}  "
            f"{human_bytes(rate)}/s  {left:.0f} s left  {name}"
        )


def printable(text: str, layout: str = "") -> str:
    """`text` with escapes for controls, marks of direction, lone surrogates and the like.

    The characters of `layout` stay; without any it is on one line.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in layout else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def human_bytes(count: float) -> str:
    """A number of bytes in binary units, such as `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


class Facts:
    """A table without lines: a label and what there is to say of it in each row, on one line."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        self._rows.append(tuple(map(printable, cells)))

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for row in self._rows:
            table.add_row(*row)
        return table


def show(renderable: RenderableType) -> None:
    """Prints a rich renderable or a string on stdout."""
    if isinstance(renderable, str):
        print(printable(renderable, _LAYOUT))
    else:
        from rich.console import Console
        from rich.segment import Segment, Segments

        if isinstance(sys.stdout, io.TextIOWrapper):  # the name of a file may be no text
            sys.stdout.reconfigure(errors="backslashreplace")
        console = Console(highlight=False, markup=False, emoji=False)
        parts = (part for part in console.render(renderable) if not part.control)
        console.print(
            Segments(Segment(printable(text, _LAYOUT), style) for text, style, _ in parts), end=""
        )


def show_json(values: Mapping[str, object]) -> None:
    """Prints one JSON object on stdout; NaN is refused, since strict readers refuse it too."""
    print(json.dumps(values, indent=2, allow_nan=False).replace("\x7f", "\\u007f"))


def note(text: str) -> None:
    """Prints a line of chatter, or several, on stderr."""
    print(printable(text, _LAYOUT), file=sys.stderr, flush=True)


_NAMES: dict[str, str] = {}


@contextmanager
def named(folder: Path, name: str) -> Iterator[None]:
    """While this lasts, messages and reports say `name` for `folder`."""
    before = _NAMES.get(str(folder))
    _NAMES[str(folder)] = name
    try:
        yield
    finally:
        if before is None:
            _NAMES.pop(str(folder), None)
        else:
            _NAMES[str(folder)] = before


def shown(place: object) -> str:
    """A path, or a text with paths, in which folders that stand for others have their names."""
    text = str(place)
    for folder, name in sorted(_NAMES.items(), key=lambda entry: -len(entry[0])):
        text = text.replace(folder, name)
    return text
