"""A folder as layouts are asked about it: what is in it is looked up once for all of them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from gemma_convert.errors import SourceError
from gemma_convert.stores.orbax.reader import array_names, find_items


class NativeFolder:
    """A folder that may hold a native checkpoint of some layout."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def items(self) -> Path | None:
        """The item folder of its Orbax checkpoint; None where it has none that is complete."""
        try:
            return find_items(self.path)
        except SourceError:
            return None

    @cached_property
    def arrays(self) -> tuple[str, ...]:
        """The names of that checkpoint's arrays, none of them opened; none without it.

        Raises SourceError where its metadata is broken.
        """
        return () if self.items is None else tuple(array_names(self.items))
