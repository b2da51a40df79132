"""Checkpoints of a published model's widths, with fewer layers or rows, and values made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.mapping.inventory import huggingface_tensors
from gemma_convert.model.config import read_architecture
from gemma_convert.model.huggingface_files import INDEX
from gemma_convert.stores.safetensors.header import safetensors_header
from gemma_convert.tiny.kinds import Repeated, tensor_bytes

CONFIGS = {
    "e2b": "gemma-4-E2B-it",
    "e4b": "gemma-4-E4B-it",
    "12b": "gemma-4-12B",
    "26b-a4b": "gemma-4-26B-A4B-it",
    "31b": "gemma-4-31B-it",
}
LAYER_BYTES = {"12b": 0.45e9, "26b-a4b": 1.62e9, "31b": 0.98e9}
SHARD_BYTES = 2 << 30
ROWS = 64 << 10


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


def write_checkpoint(folder: Path, config: dict[str, Any], weights: Repeated) -> int:
    """Bytes of the tensors of the checkpoint that is written into the new `folder`, in bfloat16.

    What kinds of `weights` there are is told in `gemma_convert.tiny.kinds`.
    """
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
                for piece in tensor_bytes(weights, name, spec, seed=0):
                    writer.write(piece)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(spec.nbytes for spec in specs.values())
