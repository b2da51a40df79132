"""The only place that prints: results on stdout, progress and chatter on stderr.

What comes from a checkpoint is printed without doing anything to the terminal: of all text no
characters but letters, signs and our own line ends and tabs get there as they are.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemma_convert.progress import Listener, ProgressEvent, Unit

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

PLAIN_INTERVAL_S = 5.0
JSON_INTERVAL_S = 0.2

Level = Literal["error", "warning", "info"]
LEVELS: tuple[Level, ...] = ("error", "warning", "info")
"""What is told on stderr; each with those before it."""

LINES_SCHEMA = "gemma-convert/progress/1"
LINE_FIELDS = (
    "event",
    "task",
    "done",
    "total",
    "unit",
    "name",
    "seconds",
    "level",
    "text",
)
"""Of every JSON line on stderr; null where an event has none."""

_LAYOUT = "\n\t"

_FILE_WIDTH = 10_000
"""Characters of a line in a file or a pipe, where nothing need be folded."""


class _Bar:
    """Shows how much is done, at which rate, the time left and the current name on a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, event: ProgressEvent) -> None:
        if event.event == "start":
            self._bar = _rich_bar(event.unit)
            self._task = self._bar.add_task(event.task, total=event.total, name="")
            self._bar.start()
        elif event.event == "advance":
            name = printable(event.name)[-48:]
            self._bar.update(self._task, completed=event.done, name=name)
        else:
            self._bar.stop()


def _rich_bar(unit: Unit) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = (
        (DownloadColumn(binary_units=True), TransferSpeedColumn())
        if unit == "bytes"
        else (MofNCompleteColumn(), TextColumn(unit))
    )
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *amount,
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}", style="dim", markup=False),
        console=Console(stderr=True),
        transient=True,
    )


class _Lines:
    """The same as a line now and then, where there is no terminal."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, event: ProgressEvent) -> None:
        if event.event == "start":
            self._next = PLAIN_INTERVAL_S
        elif event.event == "advance" and event.seconds >= self._next:
            self._next = event.seconds + PLAIN_INTERVAL_S
            note(_line(event))


def _line(event: ProgressEvent) -> str:
    rate = event.done / max(event.seconds, 1e-9)
    left = (event.total - event.done) / rate if rate else float("inf")
    share = event.done / event.total if event.total else 1.0
    amount = f"{event.done} of {event.total} {event.unit}"
    if event.unit == "bytes":
        done, total = human_bytes(event.done), human_bytes(event.total)
        amount = f"{done} of {total}  {human_bytes(rate)}/s"
    return f"{event.task} {share:4.0%}  {amount}  {left:.0f} s left  {event.name}"


class _JsonLines:
    """Every start and end as a JSON line, and what is between them now and then."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, event: ProgressEvent) -> None:
        if event.event == "advance" and event.seconds < self._next:
            return
        self._next = 0.0 if event.event == "start" else event.seconds + JSON_INTERVAL_S
        _json_line(**asdict(event))


def _json_line(**values: object) -> None:
    line = {"schema": LINES_SCHEMA, **dict.fromkeys(LINE_FIELDS), **values}
    print(_strict(line), file=sys.stderr, flush=True)


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


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number and the word for what it counts: `1 tensor`, `2 tensors`, `1 entry`, `0 entries`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


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
        for _ in max(self._rows, key=len, default=()):
            table.add_column(overflow="fold")  # a name that is cut could be any of several
        for row in self._rows:
            table.add_row(*row)
        return table


def show(renderable: RenderableType) -> None:
    """Prints a rich renderable or a string on stdout, folded where that is a terminal."""
    if isinstance(renderable, str):
        print(printable(renderable, _LAYOUT))
    else:
        from rich.console import Console
        from rich.segment import Segment, Segments

        if isinstance(sys.stdout, io.TextIOWrapper):  # the name of a file may be no text
            sys.stdout.reconfigure(errors="backslashreplace")
        folds = sys.stdout.isatty() or "COLUMNS" in os.environ
        width = None if folds else _FILE_WIDTH
        console = Console(highlight=False, markup=False, emoji=False, width=width)
        parts = (part for part in console.render(renderable) if not part.control)
        for line in Segment.split_lines(parts):
            while line and not line[-1].text.strip():
                line.pop()
            told = [Segment(printable(text, _LAYOUT), style) for text, style, _ in line]
            if told:
                told[-1] = Segment(told[-1].text.rstrip(), told[-1].style)
            console.print(Segments([*told, Segment.line()]), end="", soft_wrap=True)


def show_json(values: Mapping[str, object]) -> None:
    """Prints one JSON object on stdout; NaN is refused, since strict readers refuse it too."""
    print(_strict(values, indent=2))


def _strict(values: Mapping[str, object], indent: int | None = None) -> str:
    return json.dumps(values, indent=indent, allow_nan=False).replace("\x7f", "\\u007f")


@dataclass
class _Chatter:
    """What stderr is told: everything down to `level`, in words or as JSON lines."""

    level: Level = "info"
    json_lines: bool = False


_chatter = _Chatter()


def chatter(level: Level = "info", json_lines: bool = False) -> Listener | None:
    """Sets what stderr is told from now on; gives what shows progress there, which is info."""
    _chatter.level, _chatter.json_lines = level, json_lines
    if level != "info":
        return None
    if json_lines:
        return _JsonLines()
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return _Bar() if terminal else _Lines()


def note(text: str, level: Level = "info") -> None:
    """Prints a line of chatter, or several, on stderr, with its level if that is no info."""
    if LEVELS.index(level) > LEVELS.index(_chatter.level):
        return
    if _chatter.json_lines:
        _json_line(event="message", level=level, text=text)
        return
    words = text if level == "info" else f"{level}: {text}"
    print(printable(words, _LAYOUT), file=sys.stderr, flush=True)


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
