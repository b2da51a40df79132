"""Files that hold values of arrays, of which checksums of the values say all there is to say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ValuesFrom:
    """The byte from which on a file holds nothing but values; None where all of it says more."""

    byte: int | None
