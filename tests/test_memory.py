"""Peak memory does not depend on the number of layers, in either direction."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.mapping.inventory import huggingface_tensors
from gemma_convert.model.config import parse_architecture
from gemma_convert.stores.safetensors.header import safetensors_header


def wide_checkpoint(folder: Path, layers: int) -> int:
    """A dense text-only checkpoint with large matrices, all of one random block; its bytes."""
    folder.mkdir()
    config = {
        "model_type": "gemma4_text",
        "vocab_size": 4096,
        "hidden_size": 768,
        "intermediate_size": 3072,
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


def peak(source: Path, target: Path, options: str) -> int:
    """Peak memory of a conversion in bytes, in a process of its own."""
    code = (
        f"report = gemma_convert.to_native({str(source)!r}, {str(target)!r}, {options})\n"
        "print(report.peak_memory_bytes)\n"
    )
    return measured(code)


def export_peak(source: Path, target: Path) -> int:
    """Peak memory of an export in bytes; rusage would count this process, which was forked, too."""
    code = (
        f"assert gemma_convert.to_hf({str(source)!r}, {str(target)!r}).bit_for_bit\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "print(int(next(line.split()[1] for line in lines if line.startswith('VmHWM:'))) << 10)\n"
    )
    return measured(code)


def measured(code: str) -> int:
    """What `code` prints, in a process that waits for no disk."""
    code = f"import gemma_convert, os\nos.fsync = lambda _: None\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.share(2)
@pytest.mark.parametrize("scanned", [False, True])
def test_three_times_the_layers_take_the_same_memory(tmp_path, scanned):
    """Of a conversion, and of the export of what it made; threads and allocator vary."""
    sizes, native, back = [], [], []
    for layers in (6, 18):
        source, out = tmp_path / f"hf{layers}", tmp_path / f"native{layers}"
        sizes.append(wide_checkpoint(source, layers))
        native.append(peak(source, out, f"scan_layers={scanned}"))
        shutil.rmtree(source)
        if sys.platform.startswith("linux"):
            back.append(export_peak(out, tmp_path / f"back{layers}"))
            shutil.rmtree(tmp_path / f"back{layers}")
        shutil.rmtree(out)
    assert sizes[1] - sizes[0] > 170 << 20
    assert native[1] - native[0] < 90 << 20, native
    if back:
        assert back[1] - back[0] < 90 << 20, back
        assert back[1] < 700 << 20, back
