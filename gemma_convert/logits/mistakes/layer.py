"""The mistakes that converters and forward passes make in a layer, part by part.

A mistake is named by making it on the reference: where that gives what the native side computes, it
is the one. So no layout need be known, and weights and arithmetic are looked at alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gemma_convert.forward.parts import Part
from gemma_convert.logits.mistakes.attention import of_attention
from gemma_convert.logits.mistakes.kernels import WEIGHTS, of_kernels, of_norm, of_scalar
from gemma_convert.logits.mistakes.mixture import of_experts, of_router
from gemma_convert.logits.mistakes.trial import Subject, Trial
from gemma_convert.logits.tapped import MADE_BY


def mistakes(subject: Subject, part: Part, exact: Mapping[Part, Any]) -> Iterator[Trial]:
    """The mistakes that may be made in a part, the commonest first; parts rightly make `exact`."""
    if part == "router":
        yield from of_router(subject)
    elif part == "experts":
        yield from of_experts(subject)
    elif part == "attention":
        yield from of_attention(subject, exact)
    elif part == "output":
        yield from of_scalar(subject)
    elif part in WEIGHTS:
        yield from of_kernels(subject, part)
    elif part in MADE_BY:
        yield from of_norm(subject, MADE_BY[part])
