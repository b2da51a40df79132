"""How names that a table does not know differ from those that it knows, for a message."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

_SAMPLE, _TRIED, _TOLD = 200, 16, 3
_DEEPEST = 16
"""Dots of a name that are looked at; no name of a table has as many."""


def difference(names: Iterable[str], wanted: Iterable[str], count: int) -> str | None:
    """In words, what stands before `names` in the place of what is wanted; None for nothing known.

    `names` are those that are not expected, of the `count` that there are; `wanted` those that are
    expected and not there.
    """
    listed, absent = list(names), set(wanted)
    before = _heads_by_end(absent)
    step = len(listed) // _SAMPLE + 1
    pairs = Counter(pair for name in listed[::step] for pair in _pairs(name, before))
    told: list[str] = []
    for (head, other), _ in pairs.most_common(_TRIED):
        begun = [name for name in listed if name.startswith(head)]
        alone = len(begun) == 1 and head and other
        if begun and not alone and all(other + name[len(head) :] in absent for name in begun):
            told.append(_words(head, other, len(begun), count))
            listed = [name for name in listed if not name.startswith(head)]
    return " and ".join(told[:_TOLD]) or None


def _heads_by_end(names: Iterable[str]) -> Mapping[str, list[str]]:
    """End of a name, at its dots → what stands before it, in all names that end so."""
    heads = defaultdict(list)
    for name in names:
        parts = name.split(".")
        for at in range(len(parts)):
            end = ".".join(parts[at:])
            heads[end].append(name.removesuffix(end))
    return heads


def _pairs(name: str, before: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    """What stands before the longest known end of `name`, and what is wanted there.

    Names of two layers are no two namings: a number is never what is wanted.
    """
    parts = name.rsplit(".", _DEEPEST)
    for at in range(len(parts)):
        end = ".".join(parts[at:])
        if end in before:
            head = name[: len(name) - len(end)]
            yield from ((head, other) for other in before[end] if not _numbered(other))
            return


def _numbered(head: str) -> bool:
    return any(part.isdigit() for part in head.split("."))


def _words(head: str, other: str, changed: int, count: int) -> str:
    which = f"all {count} names" if changed == count else f"{changed} of the {count} names"
    if not head:
        return f"{which} are expected with `{other}` before them"
    if other:
        return f"{which} have `{head}` where `{other}` is expected"
    return f"{which} have `{head}` before the expected one"
