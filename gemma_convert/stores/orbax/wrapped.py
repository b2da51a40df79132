"""The parameters of a model in a tree that holds more, or holds them below names of its own.

Training states wrap a model's tree (`params`, `model`, `base` of MaxText's RL), NNX puts a `value`
below every parameter and random state beside it (flax 0.12). What is left is the tree of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TypeAlias

from gemma_convert.errors import SourceError, some

Keys: TypeAlias = tuple[str, ...]

DEEPEST = 4
"""Names that may stand above a model's tree."""

_STATE = frozenset(
    ("opt_state", "nnx_aux", "optimizer", "optimizer_state", "mu", "nu", "grads", "rngs")
)
"""Below these stands what is no parameter, though its names may be those of parameters."""

_RANDOM, _VALUE = "rngs", "value"


def unwrapped(paths: Iterable[Keys], roots: Collection[Keys]) -> dict[Keys, Keys]:
    """Path in the model's tree → path in the whole one, of all that stands beside a root.

    `roots` are how paths of the model begin. Empty where there is no such tree; raises SourceError
    where there are several.
    """
    listed = [path for path in paths if _RANDOM not in path]
    wrappers = {wrapper for path in listed if (wrapper := _above(path, roots)) is not None}
    if not wrappers:
        return {}
    if len(wrappers) > 1:
        raise SourceError(
            "An Orbax tree holds several trees of parameters.",
            expected="one",
            found=some(sorted("/".join(wrapper) or "the tree itself" for wrapper in wrappers)),
            do="save the one that is meant as a checkpoint of its own",
        )
    (wrapper,) = wrappers
    found: dict[Keys, Keys] = {}
    for path in listed:
        if path[: len(wrapper)] != wrapper:
            continue
        name = _named(path[len(wrapper) :])
        if name in found:
            raise SourceError(
                "An Orbax tree holds an array twice.",
                found=" and ".join("/".join(one) for one in (found[name], path)),
            )
        found[name] = path
    return found


def _above(path: Keys, roots: Collection[Keys]) -> Keys | None:
    """What stands above the first root in a path; None where there is none in reach."""
    for depth in range(min(DEEPEST, len(path) - 1) + 1):
        if depth and path[depth - 1] in _STATE:
            return None
        if any(path[depth : depth + len(root)] == root for root in roots):
            return path[:depth]
    return None


def _named(path: Keys) -> Keys:
    """A path as it is without NNX."""
    return path[:-1] if path[-1] == _VALUE and len(path) > 1 else path
