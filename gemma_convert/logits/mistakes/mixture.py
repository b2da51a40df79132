"""Mistakes in a mixture: its experts and their router.

Modules: `transformers/models/gemma4/modeling_gemma4.py` (5.23).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from gemma_convert.logits.mistakes.kernels import of_activation
from gemma_convert.logits.mistakes.trial import (
    REACH,
    Subject,
    Trial,
    neighbours,
)


def of_experts(subject: Subject) -> Iterator[Trial]:
    """In the kernels of the experts, and in which of them is which."""
    import torch

    both = {"experts.gate_up_proj": "gate and up", "experts.down_proj": "down"}
    up, down = subject.layer.experts.gate_up_proj, subject.layer.experts.down_proj
    kernels = dict(zip(both, (up, down), strict=True))
    gate, linear = up.chunk(2, dim=1)
    yield Trial(
        "gate and up are exchanged", {"experts.gate_up_proj": torch.cat([linear, gate], dim=1)}
    )
    yield Trial(
        "gate and up are interleaved",
        {"experts.gate_up_proj": torch.stack([gate, linear], dim=2).reshape(up.shape)},
    )
    yield Trial(
        "gate and up are told apart as if they were interleaved",
        {"experts.gate_up_proj": torch.cat([up[:, ::2], up[:, 1::2]], dim=1)},
    )
    for count in (1, -1):
        rolled = {path: kernel.roll(count, 0) for path, kernel in kernels.items()}
        for path, name in both.items():
            yield Trial(f"the experts' {name} kernels are rolled by one", {path: rolled[path]})
        yield Trial("the experts are rolled by one", rolled)
    for path, name in both.items():
        weight = kernels[path]
        yield Trial(
            f"the experts' {name} kernels are read in the shape of their transpose",
            {path: weight.swapaxes(1, 2).reshape(weight.shape)},
        )
    yield Trial(
        "the experts are in reverse order",
        {path: kernel.flip(0) for path, kernel in kernels.items()},
    )
    for number in neighbours(subject, REACH):
        found = {path: subject.other(number, path) for path in both}
        if all(value is not None for value in found.values()):
            yield Trial(f"its weights are those of layer {number}", found)
    yield Trial("gate, up or down is zero", {"experts.down_proj": down * 0})
    yield from of_activation("experts.act_fn.forward")


def of_router(subject: Subject) -> Iterator[Trial]:
    """In the choice of experts, and in the share of each."""
    import torch

    router = subject.layer.router
    scale, each, kernel = router.scale, router.per_expert_scale, router.proj.weight
    yield Trial("the router's scale is lost", {"router.scale": torch.ones_like(scale)})
    yield Trial("the experts' scales are lost", {"router.per_expert_scale": torch.ones_like(each)})
    for count in (1, -1):
        yield Trial(
            "the experts' scales are rolled by one", {"router.per_expert_scale": each.roll(count)}
        )
        yield Trial(
            "the router's experts are rolled by one", {"router.proj.weight": kernel.roll(count, 0)}
        )
    yield Trial(
        "the router's kernel is read in the shape of its transpose",
        {"router.proj.weight": kernel.T.reshape(kernel.shape)},
    )
    yield Trial("the router's experts are in reverse order", {"router.proj.weight": kernel.flip(0)})
    yield Trial("its factor 1/√embed is lost", {"router.scalar_root_size": 1.0})
    for count, words in ((-1, "few"), (1, "many")):
        config = copy.copy(router.config)
        config.top_k_experts += count
        if config.top_k_experts > 0:
            yield Trial(f"it chooses one expert too {words}", {"router.config": config})
    normed = subject.layer.pre_feedforward_layernorm_2
    seen = type(router).forward
    yield Trial(
        "it is given the state behind the norm before the experts",
        {"router.forward": lambda state: seen(router, type(normed).forward(normed, state))},
    )
    paths = ("router.scale", "router.per_expert_scale", "router.proj.weight")
    for number in neighbours(subject, REACH):
        found = {path: subject.other(number, path) for path in paths}
        if all(value is not None for value in found.values()):
            yield Trial(f"its weights are those of layer {number}", found)
            for path, value in found.items():
                yield Trial(f"its {path.split('.')[1]} is that of layer {number}", {path: value})
