"""Checkpoints of a published model's widths, with fewer layers or rows, and values made up."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gemma_convert.arrays.dtypes import TensorSpec, numpy_dtype
from gemma_convert.mapping.inventory import huggingface_tensors
from gemma_convert.model.config import read_architecture
from gemma_convert.model.huggingface_files import INDEX
from gemma_convert.stores.safetensors.header import safetensors_header
from gemma_convert.tiny.weights import random_tensor

CONFIGS = {
    "e2b": "gemma-4-E2B-it",
    "e4b": "gemma-4-E4B-it",
    "26b-a4b": "gemma-4-26B-A4B-it",
    "31b": "gemma-4-31B-it",
}
LAYER_BYTES = {"26b-a4b": 1.62e9, "31b": 0.98e9}
SHARD_BYTES = 2 << 30
DRAWN_AT_ONCE = 1 << 21
ROWS = 64 << 10

SCALES = {
    "embed_tokens.weight": 0.2,
    "embed_tokens_per_layer.weight": 0.25,
    "layer_scalar": 1.12,
}
"""End of a name → what a tiny model's values are multiplied with, for widths a hundred times those.

Each token would predict itself if embeddings were as large there, whatever the layers do.
"""

Values = Callable[[str, TensorSpec], Iterable[bytes | memoryview]]
"""Name and spec of a tensor → its bytes, in pieces."""


def published_config(model: str) -> dict[str, Any]:
    """config.json of a published model."""
    published = Path(__file__).parents[1] / "tests" / "data" / "models" / CONFIGS[model]
    config: dict[str, Any] = json.loads((published / "config.json").read_text(encoding="utf-8"))
    return config


def slice_config(model: str, size: int) -> dict[str, Any]:
    """The same with fewer rows of the tables, no towers, and as many layers as `size` bytes hold.

    E2B and E4B keep all their layers.
    """
    config = _text_alone(model, ROWS)
    text = config["text_config"]
    if model in {"e2b", "e4b"}:
        return config
    period = text["layer_types"].index("full_attention") + 1
    table_bytes = ROWS * text["hidden_size"] * 2
    layers = max(2, round((size - table_bytes) / LAYER_BYTES[model]))
    block = ["sliding_attention"] * (min(layers, period) - 1) + ["full_attention"]
    text["layer_types"] = block * max(1, layers // period)
    text["num_hidden_layers"] = len(text["layer_types"])
    return config


def small_config(rows: int) -> dict[str, Any]:
    """E2B's widths in four layers, one of each kind: sliding or full, with its own keys or not."""
    config = _text_alone("e2b", rows)
    text = config["text_config"]
    text["layer_types"] = ["sliding_attention", "full_attention"] * 2
    text["num_hidden_layers"], text["num_kv_shared_layers"] = 4, 2
    return config


def _text_alone(model: str, rows: int) -> dict[str, Any]:
    config = published_config(model)
    text = config["text_config"]
    for tower in ("vision_config", "audio_config"):
        config[tower] = None
    text["vocab_size"] = rows
    if model in {"e2b", "e4b"}:
        text["vocab_size_per_layer_input"] = rows
    return config


def write_checkpoint(folder: Path, config: dict[str, Any], values: Values) -> int:
    """Bytes of the tensors of the checkpoint that is written into the new `folder`, in bfloat16."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = huggingface_tensors(read_architecture(folder), kv_leftovers=False)
    specs = {name: TensorSpec("bfloat16", shape) for name, shape in shapes.items()}
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, spec in specs.items():
        if sum(one.nbytes for one in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = spec
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with (folder / file).open("wb") as writer:
            writer.write(safetensors_header(shard))
            for name, spec in shard.items():
                for piece in values(name, spec):
                    writer.write(piece)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(spec.nbytes for spec in specs.values())


def like_trained(layers: int) -> Values:
    """Values with which neither the signal nor the rounding of bfloat16 grows from layer to layer.

    They are a tiny model's, but for `SCALES` and for what layers add: all of them together add
    about what one would. A few rows are drawn at a time, on all cores, each run from its own seed.
    """

    def values(name: str, spec: TensorSpec) -> Iterator[bytes]:
        scale = next((scale for end, scale in SCALES.items() if name.endswith(end)), 1.0)
        if ".post_" in name:
            scale = 1 / math.sqrt(3 * layers)
        first, *others = spec.shape or (1,)
        rows = max(1, DRAWN_AT_ONCE // prod(others))

        def draw(start: int) -> bytes:
            shape = (min(rows, first - start), *others) if spec.shape else ()
            drawn = random_tensor(name, shape, start, "float32") * np.float32(scale)
            return drawn.astype(numpy_dtype(spec.dtype)).tobytes()

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield from pool.map(draw, range(0, first, rows))

    return values
