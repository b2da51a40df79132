"""A folder as layouts are asked about it: what is in it is looked up once for all of them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from gemma_convert.errors import SourceError
from gemma_convert.stores.orbax.finding import find_trees
from gemma_convert.stores.orbax.reader import array_names


class NativeFolder:
    """A folder that may hold a native checkpoint of some layout."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def trees(self) -> dict[Path, tuple[str, ...]]:
        """The Orbax trees that may be meant, and the names of the arrays of each, none opened.

        None where there is no checkpoint that is complete. Raises SourceError where metadata are
        broken.
        """
        try:
            found = find_trees(self.path)
        except SourceError:
            return {}
        return {tree: tuple(array_names(tree)) for tree in found}
