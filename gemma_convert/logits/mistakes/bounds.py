"""Mistakes in the bounds between which a tower's linear layers keep what they take and make.

Module: `Gemma4ClippableLinear` in `transformers/models/gemma4/modeling_gemma4.py` (5.23).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gemma_convert.logits.mistakes.trial import REACH, Subject, Trial, neighbours

_BOUNDS: Mapping[str, tuple[str, float]] = {
    "input_min": ("the lower bound of its inputs", -float("inf")),
    "input_max": ("the upper bound of its inputs", float("inf")),
    "output_min": ("the lower bound of its outputs", -float("inf")),
    "output_max": ("the upper bound of its outputs", float("inf")),
}
"""Name of a bound → what it is called, and what it is where it bounds nothing."""

_EXCHANGED = {
    "lower and upper bound of its inputs are exchanged": {"input_min": "input_max"},
    "lower and upper bound of its outputs are exchanged": {"output_min": "output_max"},
    "the bounds of its inputs and of its outputs are exchanged": {
        "input_min": "output_min",
        "input_max": "output_max",
    },
}


def of_bounds(subject: Subject, path: str, names: Mapping[str, str]) -> Iterator[Trial]:
    """In the bounds of the linear layer at `path`, if it has any; layers go by their `names`."""
    import torch

    found = {name: subject.weight(f"{path}.{name}") for name in _BOUNDS}
    own = {name: value for name, value in found.items() if value is not None}
    if not own:
        return
    name = names[path]

    def trial(words: str, bounds: Mapping[str, torch.Tensor | None]) -> Trial:
        return Trial(f"{name}: {words}", {f"{path}.{one}": bounds[one] for one in bounds})

    lost = {one: torch.full_like(own[one], none) for one, (_, none) in _BOUNDS.items()}
    for one, (words, _) in _BOUNDS.items():
        yield trial(f"{words} is lost", {one: lost[one]})
    yield trial("its bounds are lost", lost)
    for words, pairs in _EXCHANGED.items():
        both = {**pairs, **{there: here for here, there in pairs.items()}}
        yield trial(f"{words}", {here: own[there] for here, there in both.items()})
    for other, module in subject.layer.named_modules():
        if other != path and other in names and hasattr(module, "input_min"):
            theirs = {one: getattr(module, one) for one in _BOUNDS}
            yield trial(f"its bounds are those of {names[other]}", theirs)
    for number in neighbours(subject, REACH):
        layer = {one: subject.other(number, f"{path}.{one}") for one in _BOUNDS}
        if all(value is not None for value in layer.values()):
            yield trial(f"its bounds are those of layer {number}", layer)
