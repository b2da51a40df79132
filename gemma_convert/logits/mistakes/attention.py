"""Mistakes in attention between its projections: what is seen, how it turns, heads and scores.

Modules: `transformers/models/gemma4/modeling_gemma4.py` (5.23).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gemma_convert.forward.parts import Part
from gemma_convert.logits.mistakes.trial import (
    Subject,
    Trial,
    regrouped,
)

if TYPE_CHECKING:
    import torch

_BASES = (1e4, 5e5, 1e6)
_FRACTIONS = (0.125, 0.25, 0.5, 1.0)


def of_attention(subject: Subject, exact: Mapping[Part, Any]) -> Iterator[Trial]:
    """Between the projections, whose parts rightly make `exact`."""
    yield from _of_mask(subject)
    yield from _of_rotary(subject)
    head_dim = subject.layer.self_attn.head_dim
    yield Trial("scores are divided by the root of head_dim", {"self_attn.scaling": head_dim**-0.5})
    yield Trial(
        "heads attend to keys and values of the wrong groups",
        functions={"repeat_kv": lambda states, count: states.repeat(1, count, 1, 1)},
    )
    queries = exact["queries"]
    groups = subject.layer.self_attn.num_key_value_groups
    if 1 < groups < queries.shape[2]:
        yield Trial(
            "queries are told apart into the wrong groups",
            given={"queries": regrouped(queries, queries.shape[2] // groups, 2)},
        )
        yield Trial(
            "queries are told apart into the wrong groups",
            given={"queries": regrouped(queries, groups, 2)},
        )


def _of_mask(subject: Subject) -> Iterator[Trial]:
    import torch

    mask = subject.named.get("attention_mask")
    if mask is None:
        return
    length = mask.shape[-1]
    place = torch.arange(length, device=mask.device)
    back = place[:, None] - place[None, :]
    seen = mask if mask.dtype == torch.bool else mask == 0
    window = subject.layer.self_attn.sliding_window

    def trial(words: str, sees: torch.Tensor) -> Trial:
        changed = sees if mask.dtype == torch.bool else torch.where(sees, 0.0, mask.min())
        return Trial(words, called={"attention_mask": changed.to(mask.dtype)})

    if window is not None and window < length:
        yield trial("its window is one token too long", seen | (back == window))
        yield trial("its window is one token too short", seen & (back != window - 1))
        yield trial("its window is lost", seen | (back >= window))
    if window is None:
        sliding = subject.layer.self_attn.config.sliding_window
        if sliding is not None and sliding < length:
            yield trial("it has the window of sliding layers", seen & (back < sliding))
    yield trial("a token sees the next one", seen | (back == -1))
    yield trial("a token sees all that follow", seen | (back < 0))


def _of_rotary(subject: Subject) -> Iterator[Trial]:
    import torch

    cosine, sine = subject.named["position_embeddings"]
    config, kinds = subject.layer.self_attn.config, set(subject.layer.self_attn.config.layer_types)
    own = config.rope_parameters[subject.layer.self_attn.layer_type]
    base, fraction = own["rope_theta"], own.get("partial_rotary_factor", 1.0)
    length, head_dim = cosine.shape[-2:]
    place = torch.arange(length, device=cosine.device).float()[:, None]

    def turned(base: float, fraction: float, spread: bool = False) -> tuple[Any, Any]:
        turning = int(fraction * head_dim // 2)
        over = 2 * turning if spread else head_dim
        frequency = torch.zeros(head_dim // 2, device=cosine.device)
        exponent = torch.arange(0, 2 * turning, 2, device=cosine.device).float() / max(1, over)
        frequency[:turning] = 1.0 / base**exponent
        angle = (place * frequency).repeat(1, 2)[None].to(cosine.dtype)
        return angle.cos(), angle.sin()

    def trial(words: str, both: tuple[Any, Any]) -> Trial:
        return Trial(words, called={"position_embeddings": both})

    for kind in sorted(kinds):
        theirs = config.rope_parameters[kind]
        if theirs["rope_theta"] != base:
            both = turned(theirs["rope_theta"], theirs.get("partial_rotary_factor", 1.0))
            words = kind.removesuffix("_attention")
            yield trial(f"it has the rotary embedding of {words} layers", both)
            yield trial(
                f"its rotary base is that of {words} layers", turned(theirs["rope_theta"], fraction)
            )
    yield trial("its rotary embedding turns the other way", (cosine, -sine))
    yield trial("its rotary embedding is lost", (cosine * 0 + 1, sine * 0))
    if fraction != 1:
        yield trial("every pair of its rotary embedding turns", turned(base, 1.0))
        yield trial(
            "its rotary frequencies are spread over the turning pairs alone",
            turned(base, fraction, spread=True),
        )
    yield Trial(
        "its rotary embedding pairs neighbours instead of halves",
        functions={"apply_rotary_pos_emb": paired_neighbours},
    )
    for other in _BASES:
        if other != base:
            yield trial(f"its rotary base is {other:,.0f}", turned(other, fraction))
    for other in _FRACTIONS:
        if other != fraction:
            yield trial(f"its rotary fraction is {other:g}", turned(base, other))


def paired_neighbours(x: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    """Rotary embedding of the pairs (2i, 2i + 1), where (i, i + head_dim / 2) is right."""
    import torch

    first, second = x[..., ::2], x[..., 1::2]
    halves, turned = torch.cat([first, second], dim=-1), torch.cat([-second, first], dim=-1)
    return halves * cos.unsqueeze(unsqueeze_dim) + turned * sin.unsqueeze(unsqueeze_dim)
