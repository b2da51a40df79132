"""The tokens of a report in HTML: text coloured by KL, its legend, and tables of predictions."""

from __future__ import annotations

import math
from html import escape
from itertools import groupby

from gemma_convert.logits.scale import NOT_A_NUMBER, figure, level, level_ends
from gemma_convert.logits.tokens import Candidate, CheckedSequence, Prediction
from gemma_convert.logits.visible import visible
from gemma_convert.output import printable

MOST_TOKENS = 5000
"""Of one sequence that are shown, those around its worst."""

_CONTEXT = 12


def strip(sequence: CheckedSequence, limit: float) -> str:
    """The sequence's text, a background a token by the level of its KL; soft tokens are one run."""
    start = max(0, min((sequence.worst or 0) - MOST_TOKENS // 2, len(sequence.ids) - MOST_TOKENS))
    shown = range(start, min(start + MOST_TOKENS, len(sequence.ids)))
    parts = []
    for compared, places in groupby(shown, lambda place: sequence.kl[place] is not None):
        run = list(places)
        if compared:
            parts += [_token(sequence, place, limit) for place in run]
        else:
            what = escape(sequence.medium or "not compared")
            parts.append(f'<span class="soft">{what}, {len(run)} soft tokens</span> ')
    text = f'<div class="strip">{"".join(parts)}</div>'
    if len(shown) == len(sequence.ids):
        return text
    return (
        f'<p class="note">Tokens {shown[0]} to {shown[-1]} of {len(sequence.ids)}, those around '
        f"the worst one.</p>{text}"
    )


def _token(sequence: CheckedSequence, place: int, limit: float) -> str:
    kl, id = sequence.kl[place], sequence.ids[place]
    kl = math.nan if kl is None else kl
    title = f"position {place}, id {id}, KL {figure(kl)}"
    if sequence.pieces is None:
        return f'<bdi class="k{level(kl, limit)}" title="{title}">{id}</bdi> '
    piece = sequence.pieces[place]
    line = "<br>" if piece.endswith("\n") else ""
    return f'<bdi class="k{level(kl, limit)}" title="{title}">{escape(visible(piece))}</bdi>{line}'


def legend(limit: float) -> str:
    """What the backgrounds mean, with the numbers."""
    ends = level_ends(limit)
    entries = [
        (number, f"≤ {end:.0e}" if number == 0 else _between(ends[number - 1], end))
        for number, end in enumerate(ends)
    ]
    items = "".join(
        f'<li><bdi class="k{number}">token</bdi> {text}</li>'
        for number, text in entries
        if limit or number in {0, *range(5, NOT_A_NUMBER)}
    )
    nan = f'<li><bdi class="k{NOT_A_NUMBER}">token</bdi> NaN: a logit was not finite</li>'
    return (
        '<ul class="legend" aria-label="Background of a token by its KL in nats">'
        f'{items}{nan}</ul><p class="note">Underlined: beyond the limit of {limit:.0e} nats.</p>'
    )


def _between(low: float, high: float) -> str:
    return f"&gt; {low:.0e}" if math.isinf(high) else f"up to {high:.0e}"


def prediction(one: Prediction, number: int, sequence: CheckedSequence | None, names: str) -> str:
    """The tables of one worst token: what each side holds for likely behind it."""
    behind = one.behind
    rows = "".join(
        _row(rank, *pair)
        for rank, pair in enumerate(zip(one.reference, one.native, strict=True), 1)
    )
    reference, native = (escape(name) for name in names.split("\n"))
    context = "" if sequence is None else _context(sequence, behind.position)
    return (
        f'<article class="prediction"><h3 id="worst-{number}">{number}. '
        f"{escape(printable(behind.sequence))}, position {behind.position}</h3>"
        f'<p class="figures">KL <b>{figure(behind.kl)}</b> after the token with id '
        f"{behind.token}</p>{context}"
        '<div class="scroll" tabindex="0" role="region" '
        f'aria-label="Likeliest next tokens, number {number}"><table><thead><tr>'
        '<th scope="col" rowspan="2"><span class="hidden">rank</span></th>'
        f'<th scope="colgroup" colspan="2">{reference}</th>'
        '<th scope="col" rowspan="2"><span class="hidden">same token</span></th>'
        f'<th scope="colgroup" colspan="2">{native}</th></tr><tr>'
        '<th scope="col">next token</th><th scope="col" class="number">probability</th>'
        '<th scope="col">next token</th><th scope="col" class="number">probability</th>'
        f"</tr></thead><tbody>{rows}</tbody></table></div></article>"
    )


def _row(rank: int, ours: Candidate, theirs: Candidate) -> str:
    same = ours.token == theirs.token
    sign = '<span class="hidden">the same</span>=' if same else "≠"
    return (
        f'<tr{"" if same else " class=differs"}><th scope="row">{rank}</th>{_candidate(ours)}'
        f'<td class="sign">{sign}</td>{_candidate(theirs)}</tr>'
    )


def _candidate(one: Candidate) -> str:
    text = "" if one.text is None else f"<bdi>{escape(visible(one.text))}</bdi> "
    p = one.probability
    shown = "NaN" if math.isnan(p) else f"{p:.2%}" if p >= 1e-3 or p == 0 else f"{p:.1e}"
    width = 0.0 if math.isnan(p) else 100 * p
    return (
        f'<td>{text}<span class="id">{one.token}</span></td>'
        f'<td class="number bar" style="--p:{width:.1f}%">{shown}</td>'
    )


def _context(sequence: CheckedSequence, position: int) -> str:
    """The text that ends with the token, which is marked."""
    if sequence.pieces is None:
        return ""
    first = max(0, position - _CONTEXT)
    before = "".join(
        f"<bdi>{escape(visible(sequence.pieces[place]))}</bdi>"
        for place in range(first, position)
        if sequence.kl[place] is not None
    )
    dots = "… " if first else ""
    return (
        f'<p class="context">{dots}{before}<mark><bdi>'
        f"{escape(visible(sequence.pieces[position]))}</bdi></mark></p>"
    )
