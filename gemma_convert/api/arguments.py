"""What all functions of the Python API share: arguments of the right kind, errors in its words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache, wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from gemma_convert.errors import GemmaConvertError, UsageError, short

P = ParamSpec("P")
T = TypeVar("T")

_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    bool: "True or False",
    NoneType: "None",
}


def public(function: Callable[P, T]) -> Callable[P, T]:
    """The function, whose errors name its own parameters.

    It raises UsageError for an argument that is not what its annotation says: text where a number
    belongs, or a word that is no choice.
    """
    signature = inspect.signature(function)
    takes = {name: one.default for name, one in signature.parameters.items()}

    @wraps(function)
    def asked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                _check(name, value, _hints(function)[name])
            return function(*args, **kwargs)
        except GemmaConvertError as error:
            error.takes = takes
            raise

    return asked


@cache
def _hints(function: Callable[..., object]) -> dict[str, Any]:
    return get_type_hints(function)


def _check(name: str, value: object, hint: Any) -> None:
    if not _fits(value, hint):
        raise UsageError(
            f"{name} does not take this value.",
            expected=", or ".join(_words(hint)),
            found=short(repr(value)),
        )


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: object, hint: Any) -> bool:
    return any(_is(value, kind) for kind in _kinds(hint))


def _is(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is Sequence:
        (item,) = get_args(kind)
        if isinstance(value, str | bytes) or not isinstance(value, Collection):
            return False
        return all(_fits(one, item) for one in value)
    if kind in (int, float):
        return not isinstance(value, bool) and hasattr(
            value, "__index__" if kind is int else "__float__"
        )
    return kind not in _WORDS or isinstance(value, kind)


def _words(hint: Any) -> Iterable[str]:
    """What an argument may be, for people."""
    for kind in _kinds(hint):
        if get_origin(kind) is Literal:
            yield ", ".join(map(repr, get_args(kind)))
        elif get_origin(kind) is Sequence:
            yield f"a list, each item {' or '.join(_words(get_args(kind)[0]))}"
        elif kind in _WORDS:
            yield _WORDS[kind]
