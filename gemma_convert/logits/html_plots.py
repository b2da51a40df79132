"""Plots of a report as inline SVG: KL over the positions of a sequence, drift over the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from gemma_convert.logits.drift import Drift
from gemma_convert.logits.scale import LogRange, figure, largest_of_bins, log_range
from gemma_convert.logits.tokens import CheckedSequence
from gemma_convert.output import printable

_WIDTH, _HEIGHT = 760, 204
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 38, 40
_NAN_HEIGHT = 23
_MOST_BINS = 600
_MOST_TICKS = 8


@dataclass(frozen=True)
class _Frame:
    """Where a plot of `count` positions over the decades of `span` puts things, in SVG's units."""

    count: int
    span: LogRange

    def x(self, position: float) -> float:
        """The middle of a position."""
        return _LEFT + (position + 0.5) * (_WIDTH - _LEFT - _RIGHT) / self.count

    def y(self, value: float) -> float:
        """The height of a value; NaN stands above all."""
        if math.isnan(value):
            return _NAN_HEIGHT
        return _HEIGHT - _BOTTOM - self.span.place(value) * (_HEIGHT - _TOP - _BOTTOM)


def kl_plot(sequence: CheckedSequence, span: LogRange, limit: float) -> str:
    """SVG of the KL of each token, or of the largest of a run of tokens where they are many."""
    values = largest_of_bins(sequence.kl, _MOST_BINS)
    frame = _Frame(len(values), span)
    first = [number * len(sequence.kl) // len(values) for number in range(len(values))]
    worst = sequence.worst
    title = f"KL of each token of {printable(sequence.name)}, in nats, on a logarithmic scale"
    if worst is not None:
        title += f": largest {figure(sequence.kl_max)} at position {worst}, limit {limit:.0e}"
    return _svg(
        title,
        _decades(frame),
        _tick_texts(frame, [(str(first[at]), at) for at in _ticks(len(values), _MOST_TICKS)]),
        _axis_names("position", "KL, nats"),
        _gaps(frame, values, sequence.medium),
        _stems(frame, values, limit),
        _limit_line(frame, limit, f"limit {limit:.0e}"),
        _dots(frame, values, limit, [f"position {place}" for place in first]),
    )


def drift_plot(drift: Drift) -> str:
    """SVG of the drift at each stage, with the tolerance and the first stage beyond it."""
    stages = drift.stages
    values = list(stages.values())
    frame = _Frame(len(values), log_range(values, drift.tolerance))
    title = "Drift of the hidden states at each stage, relative, on a logarithmic scale"
    if drift.first is not None:
        title += f": first beyond {drift.tolerance:.0e} is {drift.first}"
    layers = [(str(number), number + 1) for number in _ticks(len(drift.layers), 12)]
    return _svg(
        title,
        _decades(frame),
        _tick_texts(frame, [("in", 0), *layers, ("norm", len(values) - 1)]),
        _axis_names("layer", "relative drift"),
        _stems(frame, values, drift.tolerance),
        _limit_line(frame, drift.tolerance, f"tolerance {drift.tolerance or 0:.0e}"),
        _dots(frame, values, drift.tolerance, list(stages)),
        _first_beyond(frame, drift),
    )


def _svg(title: str, *parts: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _decades(frame: _Frame) -> str:
    span, lines = frame.span, []
    step = math.ceil((span.high - span.low) / 5)
    for exponent in range(span.low, span.high + 1, step):
        y = frame.y(10.0**exponent)
        lines.append(
            f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">1e{exponent}</text>'
        )
    return "".join(lines)


def _ticks(count: int, most: int) -> range:
    """Positions that are named: at most `most`, at round distances."""
    step = next(
        one
        for power in range(12)
        for one in (10**power, 2 * 10**power, 5 * 10**power)
        if count / one <= most
    )
    return range(0, count, step)


def _tick_texts(frame: _Frame, names: Sequence[tuple[str, int]]) -> str:
    y = _HEIGHT - _BOTTOM + 16
    return "".join(
        f'<text x="{frame.x(place):.1f}" y="{y}" text-anchor="middle">{name}</text>'
        for name, place in names
    )


def _axis_names(below: str, above: str) -> str:
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return (
        f'<text x="{middle:.0f}" y="{_HEIGHT - 5}" text-anchor="middle">{below}</text>'
        f'<text x="2" y="11">{above}</text>'
    )


def _limit_line(frame: _Frame, limit: float | None, name: str) -> str:
    if limit is None or not frame.span.low <= math.log10(limit or 1e-300) <= frame.span.high:
        return ""
    y = frame.y(limit)
    return (
        f'<path class="limit" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text class="limit-name" x="{_WIDTH - _RIGHT}" y="{y - 5:.1f}" text-anchor="end">'
        f"{name}</text>"
    )


def _stems(frame: _Frame, values: Sequence[float | None], limit: float | None) -> str:
    paths: dict[str, list[str]] = {"within": [], "beyond": [], "nan": []}
    floor = _HEIGHT - _BOTTOM
    for place, value in enumerate(values):
        if value is not None:
            stem = f"M{frame.x(place):.1f} {floor}V{min(frame.y(value), floor - 1):.1f}"
            paths[_kind(value, limit)].append(stem)
    nan = f'<text x="{_LEFT - 8}" y="{_NAN_HEIGHT + 4}" text-anchor="end">NaN</text>'
    return (nan if paths["nan"] else "") + "".join(
        f'<path class="stem {kind}" d="{"".join(stems)}"/>'
        for kind, stems in paths.items()
        if stems
    )


def _dots(
    frame: _Frame, values: Sequence[float | None], limit: float | None, names: Sequence[str]
) -> str:
    radius = 2.6 if len(values) <= 160 else 1.6
    return "".join(
        f'<circle class="{_kind(value, limit)}" cx="{frame.x(place):.1f}" '
        f'cy="{frame.y(value):.1f}" r="{radius}"><title>{names[place]}: {figure(value)}</title>'
        "</circle>"
        for place, value in enumerate(values)
        if value is not None
    )


def _kind(value: float, limit: float | None) -> str:
    if math.isnan(value):
        return "nan"
    return "within" if limit is None or value <= limit else "beyond"


def _gaps(frame: _Frame, values: Sequence[float | None], medium: str | None) -> str:
    """Bands where nothing was compared, with what stands there."""
    found, start = [], None
    for place, value in enumerate([*values, 0.0]):
        if value is None and start is None:
            start = place
        elif value is not None and start is not None:
            left, right = frame.x(start - 0.5), frame.x(place - 0.5)
            found.append(
                f'<rect class="gap" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" '
                f'height="{_HEIGHT - _TOP - _BOTTOM}"/><text x="{(left + right) / 2:.1f}" '
                f'y="{(_HEIGHT - _BOTTOM + _TOP) / 2:.0f}" text-anchor="middle">'
                f"{escape(medium or 'not compared')}</text>"
            )
            start = None
    return "".join(found)


def _first_beyond(frame: _Frame, drift: Drift) -> str:
    if drift.first is None:
        return ""
    place = list(drift.stages).index(drift.first)
    x, y = frame.x(place), frame.y(drift.stages[drift.first])
    anchor = "end" if place > len(drift.stages) / 2 else "start"
    return (
        f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="6.5"/>'
        f'<text class="mark-name" x="{x + (-11 if anchor == "end" else 11):.1f}" y="{y - 8:.1f}" '
        f'text-anchor="{anchor}">{drift.first}</text>'
    )
