"""Where there is no original: the text model that the settings of a checkpoint describe."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gemma_convert.arrays.dtypes import CONVERTED, TensorSpec
from gemma_convert.checkpoint.native import NativeSource
from gemma_convert.checkpoint.original import Original
from gemma_convert.mapping.inventory import hf_tensors
from gemma_convert.model.config import parse_architecture
from gemma_convert.model.huggingface_files import CONFIG, SINGLE
from gemma_convert.stores.safetensors.naming import Naming
from gemma_convert.stores.safetensors.writer import output_shard
from gemma_convert.stores.tensor_folder import Shard


def dtype_of(native: NativeSource) -> str:
    """The dtype that most values of a native checkpoint have."""
    sizes = Counter[str]()
    for spec in native.specs.values():
        sizes[spec.dtype] += spec.size if spec.dtype in CONVERTED else 0
    return sizes.most_common(1)[0][0]


def text_original(config: Mapping[str, Any], dtype: str, stack: ExitStack) -> Original:
    """The original of this config.json, in one file of `dtype`; its folder goes with `stack`."""
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="gemma-convert-")))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    architecture = parse_architecture(config, folder / CONFIG)
    specs = {
        tensor.name: TensorSpec(dtype, tensor.shape)
        for tensor in hf_tensors(architecture)
        if tensor.required
    }
    made = output_shard(SINGLE, specs, {"format": "pt"})
    shard = Shard(made.file, made.header, made.tensors, made.size, 0)
    naming, files = Naming({}, ()), [Path(CONFIG)]
    return Original(folder, architecture, (shard,), naming, files, None, made=True)
