"""Odd values in the config.json of every family that FLOPs are counted for."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from outcome import command

from gemma_convert.errors import SourceError
from gemma_convert.flops.families import families
from gemma_convert.flops.source import read_model

DEEP = json.loads("[" * 200 + "]" * 200)
ODD: tuple[Any, ...] = (
    None, [], {}, "", "odd", "7", True, False, 0, 1, 3, 64, -1, 1.5, 1e300, 2**31 - 1, 10**30,
    [1], [None], [[1]], [{"a": []}], {"a": 1}, "full_attention", ["full_attention"] * 4,
    "\x1b[2J", DEEP,
)  # fmt: skip
MODEL_TYPES = sorted(families())
STEP = 97
"""An ordinary run takes every 97th case, --every all of them."""


@cache
def config(model_type: str) -> dict[str, Any]:
    """A config.json of that family, as transformers writes it."""
    from transformers import AutoConfig

    family = families()[model_type]
    values = AutoConfig.for_model(family.model_type).to_dict()
    if family.model_type == "deepseek_v2":
        values["num_experts_per_tok"] = 6  # without one transformers does not run it either
    wrapped = model_type in family.wrappers
    return {"model_type": model_type, "text_config": values} if wrapped else values


def places(values: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The path of every key, those of the text model too."""
    for key, value in values.items():
        yield (key,)
        if key == "text_config":
            yield from ((key, inner) for inner in value)


def text(model_type: str, path: tuple[str, ...], value: Any) -> str:
    changed = copy.deepcopy(config(model_type))
    level = changed
    for key in path[:-1]:
        level = level[key]
    level[path[-1]] = value
    return json.dumps(changed)


@pytest.mark.share(3)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_key_with_odd_values(model_type, tmp_path, request):
    path = tmp_path / "config.json"
    cases = [(place, value) for place in places(config(model_type)) for value in ODD]
    first = MODEL_TYPES.index(model_type)
    codes = set()
    for place, value in cases if request.config.getoption("--every") else cases[first::STEP]:
        path.write_text(text(model_type, place, value))
        codes.add(command("flops", path, "--seq-len", 16)[0])
    assert codes == {0, 3}


@pytest.mark.parametrize(
    ("model_type", "place", "value"),
    [
        ("llama4_text", "moe_layers", [None]),
        ("llama4_text", "moe_layers", [1.5]),
        ("llama4_text", "no_rope_layers", ["yes"] * 48),
        ("llama4", "text_config", []),
        ("qwen3_moe", "mlp_only_layers", [[1]]),
        ("qwen3_next", "mlp_only_layers", [True]),
        ("qwen3_next", "num_experts", DEEP),
        ("gemma2", "layer_types", [{}] * 26),
        ("llama", "model_type", DEEP),
    ],
)
def test_what_is_no_size_is_named(model_type, place, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, place: value}))
    with pytest.raises(SourceError, match=rf"(?m)key {place}$"):
        read_model(tmp_path)
