"""How many keys the queries of a step attend to: full, sliding and chunked attention.

`exact` counts what the mask lets through, the diagonal included. `customary` is what MaxText and
most reports use: half a square for a full layer, T·W − W²/2 for a sliding one, which is less than
exact by W/2 (T/2 for a full layer). `dense` counts what is computed before masking, as
transformers' eager attention does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Rule = Literal["exact", "customary", "dense"]
Kind = Literal["full", "sliding", "chunked"]


@dataclass(frozen=True)
class Reach:
    """Which keys a query sees: all before it, the last `size` with itself, or those of its chunk.

    A sliding window is that of transformers' `sliding_window_overlay` (key > query − size), a chunk
    that of its `chunked_overlay` (the same quotient by size).
    """

    kind: Kind = "full"
    size: int = 0


def pair_flops(reach: Reach, queries: int, cached: int, rule: Rule) -> int:
    """FLOPs of one channel of one head's scores, 2 for each pair of a query and a key.

    The queries stand behind `cached` keys. Values take as many. The customary rule knows no cache:
    with one, it is the exact count.
    """
    if rule == "dense":
        return 2 * queries * (_kept(reach, cached) + queries)
    if rule == "customary" and not cached:
        return _customary(reach, queries)
    return 2 * (_pairs(reach, cached + queries) - _pairs(reach, cached))


def _pairs(reach: Reach, length: int) -> int:
    """Pairs of the first `length` queries and their keys."""
    if reach.kind == "chunked":
        chunks, rest = divmod(length, reach.size)
        return chunks * _triangle(reach.size) + _triangle(rest)
    if reach.kind == "sliding" and length > reach.size:
        return _triangle(reach.size) + (length - reach.size) * reach.size
    return _triangle(length)


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def _customary(reach: Reach, length: int) -> int:
    if reach.kind == "chunked":
        chunks, rest = divmod(length, reach.size)
        return chunks * reach.size**2 + rest**2
    window = min(reach.size, length) if reach.kind == "sliding" else length
    return 2 * length * window - window**2


def _kept(reach: Reach, cached: int) -> int:
    """Keys in the cache: transformers keeps one less than the window or chunk of such layers."""
    return cached if reach.kind == "full" else min(cached, reach.size - 1)


def image_pair_flops(tokens: int) -> int:
    """FLOPs as in `pair_flops` that `tokens` of one image add where they see each other both ways.

    A sliding window limits the past alone, so every later token of the image is seen, whatever the
    window (transformers 5.23, `create_masks_for_vision_model` in `models/gemma4`).
    """
    return tokens * (tokens - 1)
