"""The parts of a report in HTML: a picture of layers × parts by their errors, and what is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from gemma_convert.forward.parts import Part
from gemma_convert.logits.part_check import FACTOR, LocalCheck, PartCheck
from gemma_convert.logits.scale import figure

_LEFT, _TOP, _ROW, _WIDTH = 190, 22, 15, 760
_LEVELS = ((1.0, 1), (2.0, 2), (4.0, 3), (FACTOR, 4), (1e2, 6), (1e4, 8))
_WORST, _NAN = 9, 10
_MOST_NAMED = 18


def parts_pictures(local: LocalCheck) -> dict[str, str]:
    """Kind of layers → their picture: those of each tower that was run, and the decoder's."""
    pictures = {}
    for tower in dict.fromkeys(one.tower for one in local.parts):
        kind = "layer" if tower is None else f"{tower} layer"
        pictures[kind] = _picture([one for one in local.parts if one.tower == tower], kind)
    return {kind: picture for kind, picture in pictures.items() if picture}


def _picture(parts: Sequence[PartCheck], kind: str) -> str:
    """SVG with a row a part and a column a layer, coloured by the error over the rounding."""
    inside = [one for one in parts if one.layer is not None]
    rows: list[Part] = list(dict.fromkeys(one.part for one in inside))
    layers = 1 + max((one.layer or 0 for one in inside), default=-1)
    if not layers:
        return ""
    width = (_WIDTH - _LEFT) / layers
    step = math.ceil(layers / _MOST_NAMED)
    names = "".join(
        f'<text x="{_LEFT - 8}" y="{_TOP + number * _ROW + 11}" text-anchor="end">{part}</text>'
        for number, part in enumerate(rows)
    )
    numbers = f'<text x="{_LEFT - 8}" y="14" text-anchor="end">{kind}</text>'
    numbers += "".join(
        f'<text x="{_LEFT + (number + 0.5) * width:.1f}" y="14" text-anchor="middle">'
        f"{number}</text>"
        for number in range(0, layers, step)
    )
    cells = "".join(_cell(one, rows.index(one.part), width) for one in inside)
    title = f"Error of each part of each of {layers} {kind}s in units of its rounding error"
    if failed := [one for one in parts if not one.passed]:
        title += f": {len(failed)} of {len(parts)} parts beyond {FACTOR:g}"
    height = _TOP + len(rows) * _ROW
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{names}{numbers}{cells}</svg>"
    )


def parts_legend() -> str:
    """What the colours of the pictures mean."""
    items = [(level, f"up to {end:,.0f} ×") for end, level in _LEVELS]
    items += [(_WORST, f"over {_LEVELS[-1][0]:,.0f} ×"), (_NAN, "NaN: not finite")]
    entries = "".join(f'<li><span class="k{level}"></span> {text}</li>' for level, text in items)
    return (
        '<ul class="legend" aria-label="Colour of a part by its error in units of its rounding '
        f'error">{entries}</ul><p class="note">A part is coloured by its error in units of its '
        f"rounding error. A cross marks one that fails: it is beyond {FACTOR:g} ×.</p>"
    )


def part_rows(local: LocalCheck) -> list[tuple[str, str, str, str, str]]:
    """Name, mistake, error, rounding error and ratio, of what is in no layer or failed."""
    shown = [one for one in local.parts if one.layer is None or not one.passed]
    return [
        (one.name, one.mistake or "", figure(one.error), figure(one.noise), _times(one))
        for one in shown
    ]


def _cell(one: PartCheck, row: int, width: float) -> str:
    x, y = _LEFT + (one.layer or 0) * width, _TOP + row * _ROW
    text = f"{one.name}: {_times(one)} × its rounding error"
    if one.mistake is not None:
        text += f"; {one.mistake}"
    cross = f'<path class="cross" d="M{x + width / 2 - 3:.1f} {y + 4}l6 6m0 -6l-6 6"/>'
    return (
        f'<g><title>{escape(text)}</title><rect class="k{_level(one)}" x="{x:.1f}" y="{y}" '
        f'width="{max(width - 1, 0.5):.1f}" height="{_ROW - 1}"/>{"" if one.passed else cross}</g>'
    )


def _times(one: PartCheck) -> str:
    if math.isinf(one.times):
        return "NaN"
    return f"{one.times:,.1f}" if one.times >= 0.05 else "< 0.1"


def _level(one: PartCheck) -> int:
    if math.isinf(one.times):
        return _NAN
    return next((level for end, level in _LEVELS if one.times <= end), _WORST)
