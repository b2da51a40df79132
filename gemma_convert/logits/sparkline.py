"""Figures over positions as one line of block characters, as long as the terminal allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma_convert.logits.scale import LogRange, largest_of_bins

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-=+*%#"
NOT_A_NUMBER, NOT_COMPARED = "!", " "


@dataclass(frozen=True)
class Sparkline:
    """A renderable for rich: a character a value, or a run of them, high where it is large.

    NaN is `!`, and what was not compared (None) is blank. Beyond the limit it is red and bold.
    """

    values: Sequence[float | None]
    span: LogRange
    limit: float | None

    def text(self, width: int, blocks: str = BLOCKS) -> str:
        """The line, of at most `width` characters."""
        return "".join(
            self._character(value, blocks) for value in largest_of_bins(self.values, width)
        )

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        most = min(len(self.values), options.max_width)
        return Measurement(min(8, most), most)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        blocks = ASCII_BLOCKS if options.ascii_only else BLOCKS
        line = Text(no_wrap=True)
        for value in largest_of_bins(self.values, options.max_width):
            beyond = value is not None and self.limit is not None and not value <= self.limit
            line.append(self._character(value, blocks), "bold red" if beyond else "green")
        yield line

    def _character(self, value: float | None, blocks: str) -> str:
        if value is None:
            return NOT_COMPARED
        if math.isnan(value):
            return NOT_A_NUMBER
        return blocks[min(len(blocks) - 1, int(self.span.place(value) * len(blocks)))]
