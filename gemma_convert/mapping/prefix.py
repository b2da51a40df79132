"""How names that a table does not know differ from those that it knows, for a message."""

from __future__ import annotations

from collections.abc import Iterable


def difference(names: Iterable[str], expected: Iterable[str], count: int) -> str | None:
    """In words, what stands before every one of `names` or is missing there; None for neither.

    `names` are those that are not expected, of the `count` that there are.
    """
    listed, wanted = list(names), set(expected)
    for part in _heads(listed):
        if all(name.removeprefix(part) in wanted for name in listed if name.startswith(part)):
            wrapped = [name for name in listed if name.startswith(part)]
            if len(wrapped) == count:
                return f"all {count} names have `{part}` before the expected one"
            return f"{len(wrapped)} of the {count} names have `{part}` before them"
    first = next(iter(listed), "")
    for name in wanted:
        part = name.removesuffix(first)
        if first and name.endswith(f".{first}") and all(part + one in wanted for one in listed):
            return f"all {len(listed)} names are expected with `{part}` before them"
    return None


def _heads(names: list[str]) -> list[str]:
    """What may be a prefix: the beginnings of the first name."""
    parts = next(iter(names), "").split(".")
    return [".".join(parts[:count]) + "." for count in range(1, len(parts))]
