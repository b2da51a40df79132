"""What `--help` calls a value: in the words of docs/commands.md, not of Python."""

from __future__ import annotations

import types
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from typer.core import TyperCommand
from typer.models import OptionInfo

WORDS = {int: "N", float: "NUMBER", Path: "PATH", str: "TEXT", bool: ""}
"""A type → the word for a value of it; a flag takes none."""


class Command(TyperCommand):
    """A command whose usage is `SRC OUT`, without the braces of some versions of typer."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters: `--help` is a flag like others, an argument shows its name alone."""
        found = super().get_params(ctx)
        for one in found:
            if one.name == "help":
                one.metavar = ""
            if one.param_type_name == "argument":
                vars(one)["display_type_rich"] = lambda ctx: None
        return found


def worded(function: Callable[..., None]) -> Callable[..., None]:
    """The function of a command, whose options have words for what they take."""
    function.__annotations__ = get_type_hints(function, include_extras=True)
    for hint in function.__annotations__.values():
        kind, *infos = get_args(hint) or (None,)
        for info in infos:
            if isinstance(info, OptionInfo) and info.metavar is None:
                info.metavar = _word(plain(kind)[0])
    return function


def plain(kind: Any) -> tuple[Any, bool]:
    """(the type of one value, whether there may be several): `list[Path] | None` → (Path, True)."""
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (one for one in get_args(kind) if one is not type(None))
    return (get_args(kind)[0], True) if get_origin(kind) is list else (kind, False)


def _word(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(one.value) for one in kind)
    return WORDS[kind]
