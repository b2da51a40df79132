"""Where the Orbax trees of a folder lie: in it, in its items, or in those of its highest step.

Names of items: MaxText's `items`, `default` of Orbax' CheckpointManager, `model_params` of Tunix
0.1.7 and of MaxText 0.2.5 after its training, and whatever else somebody has chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemma_convert.errors import SourceError, some
from gemma_convert.files.unfinished import refuse_unfinished

METADATA = "_METADATA"

NO_PARAMETERS = ("optimizer_state", "opt_state", "accumulated_grads", "accumulated_metrics")
"""Items beside the parameters, whose trees may look like theirs."""

RUN = ("checkpoints", "checkpoints/actor", "actor")
"""Where the steps of a run of MaxText and Tunix lie; `actor` is the model that is trained by RL."""


def find_trees(path: Path) -> list[Path]:
    """The folders of Orbax trees that `path` may mean: more than one where it has several items.

    That is `path` itself, or its items, or, in a folder of steps or of a run, those of the highest
    step. The paths are absolute, as Orbax asks for. Raises SourceError where there are none.
    """
    path = path.absolute()
    for folder in (path, *path.parents[:2]):
        refuse_unfinished(folder)
    trees = _in_step(path)
    for steps in (path, *(path / name for name in RUN)):
        trees = trees or _in_highest_step(steps)
    if trees:
        return trees
    found = some(sorted(entry.name for entry in path.iterdir()), 5) if path.is_dir() else None
    raise SourceError(
        "There is no Orbax checkpoint here.",
        where=path,
        expected=f"{METADATA} in it, in an item folder in it, or in one of a step: "
        f"<step>/items/{METADATA}",
        found=found or "nothing",
        do="give the folder that was written, its step folder, or the item folder in that",
    )


def step_of(tree: Path) -> Path | None:
    """The step folder that an Orbax tree is, or is an item of."""
    return next((folder for folder in (tree, tree.parent) if _is_step(folder)), None)


def passed_over(path: Path, tree: Path) -> list[Path]:
    """The step folders higher than that of `tree`, in which `path` has no tree of parameters."""
    step, path = step_of(tree), path.absolute()
    if step is None or path == step or not step.is_relative_to(path):
        return []
    return [
        one for one in _folders(step.parent) if _is_step(one) and int(one.name) > int(step.name)
    ]


def _in_step(folder: Path) -> list[Path]:
    """The folder itself, or the items in it that may be parameters."""
    if (folder / METADATA).is_file():
        return [folder]
    return [item for item in _folders(folder) if (item / METADATA).is_file() and _is_item(item)]


def _is_item(item: Path) -> bool:
    return item.name not in NO_PARAMETERS and not _is_step(item)


def _in_highest_step(folder: Path) -> list[Path]:
    for step in sorted(filter(_is_step, _folders(folder)), key=lambda one: -int(one.name)):
        if trees := _in_step(step):
            return trees
    return []


def _is_step(folder: Path) -> bool:
    return folder.name.isascii() and folder.name.isdecimal()


def _folders(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(entry for entry in folder.iterdir() if entry.is_dir())
