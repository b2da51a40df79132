"""What several parts of one command read of a checkpoint, read once: a tokenizer, an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_found: ContextVar[dict[Any, Any] | None] = ContextVar("found", default=None)


@contextmanager
def reading_once() -> Iterator[None]:
    """Within it a `once` function of the same arguments is called once, and read anew behind it."""
    token = _found.set({})
    try:
        yield
    finally:
        _found.reset(token)


def once(read: Callable[P, T]) -> Callable[P, T]:
    """`read`, whose arguments are hashable and whose result nobody changes."""

    @wraps(read)
    def found(*arguments: P.args, **named: P.kwargs) -> T:
        before = _found.get()
        if before is None:
            return read(*arguments, **named)
        key = (read, arguments, *sorted(named.items()))
        if key not in before:
            before[key] = read(*arguments, **named)
        result: T = before[key]
        return result

    return found
