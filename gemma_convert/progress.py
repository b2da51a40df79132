"""How far work that takes time has come: events, and who listens to them.

    def listener(event):
        print(event.task, event.done, event.total)

    gemma_convert.to_native("gemma-4-E2B-it", "out", layout="maxtext", progress=listener)

The command line's bar, its plain lines and its JSON lines are such listeners
(`gemma_convert.output`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

T = TypeVar("T")

Kind = Literal["start", "advance", "end"]
Task = Literal["convert", "export", "upload", "verify", "layers", "logits"]
Unit = Literal["bytes", "stages", "slices", "sequences"]


@dataclass(frozen=True)
class ProgressEvent:
    """A task has begun, has made progress, or has ended.

    It has ended with an error if `done` is not `total`. `name` is that of the tensor, layer or file
    that was done last, empty at the start and the end; `seconds` are those since the task began.
    One task runs after the other.
    """

    event: Kind
    task: Task
    done: int
    total: int
    unit: Unit
    name: str
    seconds: float


Listener = Callable[[ProgressEvent], None]
"""What is called with each event, in the thread that works; what it raises ends the work."""


class Progress(Protocol):
    """Something that is told how much is done, and of what."""

    def advance(self, count: int, name: str) -> None: ...


class NoProgress:
    """Progress that nobody watches."""

    def advance(self, count: int, name: str) -> None:
        return None


class _Told:
    """Progress that a listener is told of."""

    def __init__(self, listener: Listener, task: Task, total: int, unit: Unit) -> None:
        self._listener, self._task, self._total, self._unit = listener, task, total, unit
        self._done, self._started = 0, time.monotonic()

    def advance(self, count: int, name: str) -> None:
        self._done += count
        self.tell("advance", name)

    def tell(self, event: Kind, name: str = "") -> None:
        seconds = time.monotonic() - self._started
        found = ProgressEvent(event, self._task, self._done, self._total, self._unit, name, seconds)
        self._listener(found)


@contextmanager
def working(
    listener: Listener | None, task: Task, total: int, unit: Unit = "bytes"
) -> Iterator[Progress]:
    """Progress of a task of `total` units, whose start and end are told too."""
    if listener is None:
        yield NoProgress()
        return
    told = _Told(listener, task, total, unit)
    told.tell("start")
    try:
        yield told
    finally:
        told.tell("end")


def steps(
    listener: Listener | None, task: Task, unit: Unit, items: Iterable[T], names: Sequence[str]
) -> Iterator[T]:
    """`items`, each of which is done when the next one is asked for; `names` are theirs."""
    with working(listener, task, len(names), unit) as progress:
        for item, name in zip(items, names, strict=True):
            yield item
            progress.advance(1, name)


@contextmanager
def ended(listener: Listener | None) -> Iterator[Listener | None]:
    """`listener`, which is told the end of its task at the latest at the end of this.

    For tasks that are told by `steps`, which an error leaves in the midst of an item.
    """
    last: ProgressEvent | None = None
    over = False

    def listening(event: ProgressEvent) -> None:
        nonlocal last
        if listener is not None and not over:
            last = event
            listener(event)

    try:
        yield None if listener is None else listening
    finally:
        if last is not None and last.event != "end":
            listening(replace(last, event="end", name=""))
        over = True
