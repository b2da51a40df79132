"""The processes of one command line, from joining one another to the exit code of each.

Within `joined` the side of a check that JAX runs finds them here. Processes other than 0 make the
same calls of JAX in the same order and wait where process 0 works alone.

One that fails while process 0 waits for it inside of JAX ends at once; JAX then ends the others, at
the latest when its heartbeat is missed (100 s).
"""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from gemma_convert.engine.cluster import connect, not_joined
from gemma_convert.engine.processes import Processes
from gemma_convert.errors import GemmaConvertError, exit_code
from gemma_convert.output import note

T = TypeVar("T")

_processes = Processes()


@contextmanager
def joined(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    detect: bool,
    *,
    devices: bool = False,
) -> Iterator[Processes]:
    """The processes that the arguments of `cluster.connect` name; one alone without arguments.

    With `devices` they use JAX's together; it must be entered before JAX is used. Where any of them
    failed process 0 leaves it by that failure, and the others by SystemExit, without a word where
    process 0 reports it. Raises UsageError for arguments that contradict each other.
    """
    global _processes  # noqa: PLW0603
    found = connect(coordinator, processes, process, detect)
    with _devices_shared() if devices and found.client is not None else nullcontext():
        _processes = found
        try:
            with found:
                yield found
        except BaseException as error:
            if not found.told():
                atexit.register(_leave, exit_code(error))
            if found.leads:
                raise
            known = isinstance(error, GemmaConvertError | KeyboardInterrupt)
            if not known or not found.told():
                told = error if known else traceback.format_exc()
                note(f"process {found.index}: {told}", "error")
            raise SystemExit(exit_code(error)) from None
        finally:
            _processes = Processes()


def is_leader() -> bool:
    """Whether this process compares and reports: process 0, or the only one."""
    return _processes.leads


def process_count() -> int:
    """How many processes run together."""
    return _processes.count


def in_step(items: Iterable[T]) -> Iterator[T]:
    """`items`, each made when all processes have come as far as this one."""
    iterator = iter(items)
    while True:
        _processes.step()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item


def publish(text: str) -> None:
    """Gives `text` of process 0 to the others, who have it from `published`."""
    _processes.publish(text)


def published() -> str:
    """What process 0 has given to `publish`, for the others."""
    return _processes.published()


@contextmanager
def _devices_shared() -> Iterator[None]:
    """JAX has the devices of all. The standard output is Python's alone: gloo, in C++, greets."""
    import jax

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the reference needs room
    sys.stdout.flush()
    kept, ours = os.dup(1), sys.stdout
    os.dup2(2, 1)
    with os.fdopen(os.dup(kept), "w", encoding=ours.encoding) as ours_alone:
        sys.stdout = ours_alone
        try:
            try:
                jax.devices()  # waits for all: later, one that has failed would be waited for
            except RuntimeError as error:
                raise not_joined(error) from error
            yield
        finally:
            sys.stdout = ours
            os.dup2(kept, 1)
            os.close(kept)


def _leave(code: int) -> None:
    """Ends this process without waiting for others, which may wait for it; JAX would, 300 s."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
