"""Several processes that check one model together under `jax.distributed`: one leads.

Process 0 runs the reference, compares and reports. The others make the same calls of JAX in the
same order and wait where process 0 works alone. Beside arrays they exchange words.

A process that fails before the first common step tells process 0, which reports it, and all end
with one exit code. One that fails later ends at once; JAX ends those that wait for it, at the
latest when its heartbeat is missed (100 s).
"""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from gemma_convert.engine.cluster import Cluster, connect, not_joined
from gemma_convert.errors import GemmaConvertError
from gemma_convert.output import note

T = TypeVar("T")

_FOREVER_MS = 7 * 24 * 3600 * 1000
_FAREWELL_MS = 10_000
_MOMENT_MS = 2_000
_INTERNAL, _INTERRUPTED = 70, 130
_GO = "go"


@dataclass
class _Group:
    """All processes; `steps` that they have begun together."""

    client: Any
    process: int
    processes: int
    steps: int = 0

    @property
    def others(self) -> range:
        return range(1, self.processes)

    def say(self, key: str, word: str) -> None:
        self.client.key_value_set(f"gemma-convert/{key}", word)

    def hear(self, key: str, timeout_ms: int = _FOREVER_MS) -> str:
        return str(self.client.blocking_key_value_get(f"gemma-convert/{key}", timeout_ms))

    def step(self) -> None:
        """Returns when process 0 has come as far; raises on all where one has failed before."""
        if self.process:
            if not self.steps:
                self.say(f"ready/{self.process}", _GO)
            word = self.hear(f"step/{self.steps}")
            if word != _GO:
                raise SystemExit(self._farewell(int(word)))
        else:
            if not self.steps:
                self._wait_for_others()
            self.say(f"step/{self.steps}", _GO)
        self.steps += 1

    def fail(self, error: BaseException) -> None:
        """Tells the others of `error`, and raises SystemExit where process 0 reports it."""
        code = _exit_code(error)
        if not self.process:
            self.say(f"step/{self.steps}", str(code))
            self._hear_farewells()
        elif not self.steps:
            self.say(f"ready/{self.process}", f"{code} {error}")
            raise SystemExit(self._farewell(int(self.hear("step/0"))))
        elif (ended := self._ended()) is not None:
            raise SystemExit(self._farewell(ended))
        if self.steps:
            atexit.register(_leave, code)

    def _ended(self) -> int | None:
        """The exit code of process 0, whose failure may be why this one fails."""
        try:
            word = self.hear(f"step/{self.steps}", _MOMENT_MS)
        except RuntimeError:
            return None
        return None if word == _GO else int(word)

    def _wait_for_others(self) -> None:
        for other in self.others:
            word = self.hear(f"ready/{other}")
            if word != _GO:
                code, _, message = word.partition(" ")
                failure = GemmaConvertError(f"Process {other} failed.", found=message)
                failure.exit_code = int(code)
                raise failure

    def _farewell(self, code: int) -> int:
        self.say(f"left/{self.process}", _GO)
        return code

    def _hear_farewells(self) -> None:
        """Waits until the others know, those that can: this process keeps the store."""
        for other in self.others:
            try:
                self.hear(f"left/{other}", _FAREWELL_MS)
            except RuntimeError:
                return


_group: _Group | None = None


@contextmanager
def joined(
    coordinator: str | None, processes: int | None, process: int | None, detect: bool
) -> Iterator[None]:
    """Within it this process is number `process` of several; nothing happens without arguments.

    The arguments are those of `cluster.connect`. It must be entered before JAX is used. A process
    other than 0 leaves it by SystemExit, without a word, where any of them failed. Raises
    UsageError for arguments that contradict each other.
    """
    global _group  # noqa: PLW0603
    cluster = connect(coordinator, processes, process, detect)
    if cluster is None:
        yield
        return
    with _stdout_kept():
        _group = _start(cluster)
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            _group.fail(error)
            if not _group.process:
                raise
            known = isinstance(error, GemmaConvertError)
            note(f"process {_group.process}: {error if known else traceback.format_exc()}")
            raise SystemExit(_exit_code(error)) from None
        finally:
            _group = None


def is_leader() -> bool:
    """Whether this process compares and reports: process 0, or the only one."""
    return _group is None or not _group.process


def process_count() -> int:
    """How many processes run together."""
    return 1 if _group is None else _group.processes


def in_step(items: Iterable[T]) -> Iterator[T]:
    """`items`, each made when all processes have come as far as this one."""
    iterator = iter(items)
    while True:
        if _group is not None:
            _group.step()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item


def publish(text: str) -> None:
    """Gives `text` of process 0 to the others, who have it from `published`."""
    if _group is not None and _group.others:
        _group.step()
        _group.say(f"text/{_group.steps}", text)


def published() -> str:
    """What process 0 has given to `publish`, for the others."""
    if _group is None:
        raise ValueError("there is no other process")
    _group.step()
    return _group.hear(f"text/{_group.steps}")


def _start(cluster: Cluster) -> _Group:
    import jax

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the reference needs room
    try:
        jax.devices()  # waits for all processes: later, one that has failed would be waited for
    except RuntimeError as error:
        raise not_joined(error) from error
    return _Group(cluster.client, cluster.process, cluster.processes)


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """The standard output is Python's alone: gloo, in C++, writes greetings to it."""
    sys.stdout.flush()
    kept, ours = os.dup(1), sys.stdout
    os.dup2(2, 1)
    with os.fdopen(os.dup(kept), "w", encoding=ours.encoding) as ours_alone:
        sys.stdout = ours_alone
        try:
            yield
        finally:
            sys.stdout = ours
            os.dup2(kept, 1)
            os.close(kept)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, GemmaConvertError):
        return error.exit_code
    return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else _INTERNAL


def _leave(code: int) -> None:
    """Ends this process without waiting for others, which may wait for it; JAX would, 300 s."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
