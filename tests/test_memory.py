"""Peak memory does not depend on the number of layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma_convert.config import parse_architecture
from gemma_convert.dtypes import TensorSpec
from gemma_convert.mapping.inventory import huggingface_tensors
from gemma_convert.stores.safetensors_header import safetensors_header


def wide_checkpoint(folder: Path, layers: int) -> int:
    """A dense text-only checkpoint with large matrices, all of one random block; its bytes."""
    folder.mkdir()
    config = {
        "model_type": "gemma4_text",
        "vocab_size": 4096,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "global_head_dim": 128,
        "hidden_size_per_layer_input": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = huggingface_tensors(parse_architecture(config, folder), kv_leftovers=False)
    specs = {name: TensorSpec("bfloat16", shape) for name, shape in shapes.items()}
    noise = np.random.default_rng(0).normal(size=1 << 20).astype(ml_dtypes.bfloat16).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(safetensors_header(specs))
        for spec in specs.values():
            whole, rest = divmod(spec.nbytes, len(noise))
            file.write(noise * whole + noise[:rest])
    return sum(spec.nbytes for spec in specs.values())


def peak(source: Path, target: Path, scanned: bool) -> int:
    code = (
        "import sys, gemma_convert\n"
        f"report = gemma_convert.to_native({str(source)!r}, {str(target)!r},"
        f" scan_layers={scanned})\n"
        "print(report.peak_memory_bytes)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.parametrize("scanned", [False, True])
def test_four_times_the_layers_take_the_same_memory(tmp_path, scanned):
    few = wide_checkpoint(tmp_path / "few", 12)
    many = wide_checkpoint(tmp_path / "many", 48)
    small = peak(tmp_path / "few", tmp_path / "few-out", scanned)
    large = peak(tmp_path / "many", tmp_path / "many-out", scanned)
    assert many - few > 900 << 20
    assert large - small < 128 << 20, (small, large)  # of 1 GB more; threads and allocator vary
