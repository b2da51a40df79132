"""Where a native adapter has no original: the one of PEFT that it would be, by its base model."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.checkpoint.native import NativeSource
from gemma_convert.checkpoint.original import Original
from gemma_convert.errors import SourceError, UsageError, some
from gemma_convert.mapping.adapted import adapter_table
from gemma_convert.mapping.inventory import hf_tensors
from gemma_convert.model.adapter import ADAPTER_CONFIG, Adapter, StoredAdapter, adapter_config
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import read_architecture, read_config
from gemma_convert.model.huggingface_files import ADAPTER
from gemma_convert.stores.safetensors.naming import Naming
from gemma_convert.stores.safetensors.writer import output_shard
from gemma_convert.stores.tensor_folder import Shard

_WRAPPER = "base_model.model."
_A = ".lora_A.weight"


@dataclass(frozen=True)
class AdapterBase:
    """The base model of a native adapter: the folder with its config.json, and what it is called.

    `alpha` is that of the adapter, if it does not say it itself.
    """

    folder: Path
    name: str
    alpha: float | None = None


def adapter_original(native: NativeSource, base: AdapterBase | None, stack: ExitStack) -> Original:
    """The adapter of PEFT that the matrices in `native` are; its folder goes with `stack`.

    Raises SourceError without a base model, without an alpha, and where the matrices are not those
    of that model.
    """
    if base is None or native.adapter is None:
        raise SourceError(
            "Nothing says which model this adapter belongs to: it has no sidecar.",
            where=native.folder,
            do="name the Hugging Face checkpoint of its base model with --base; config.json is "
            "enough",
        )
    adapter = scaled_adapter(native.adapter, base.alpha, native.folder)
    architecture = replace(read_architecture(base.folder), adapter=adapter)
    specs = _specs(native, architecture)
    modules = [name.removesuffix(_A) for name in specs if name.endswith(_A)]
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="gemma-convert-")))
    config = adapter_config(adapter, base.name, modules)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    names = {name: _WRAPPER + name for name in specs}
    made = output_shard(ADAPTER, specs, {"format": "pt"}, names)
    shard = Shard(made.file, made.header, made.tensors, made.size, 0)
    naming, files = Naming(names, (_WRAPPER,)), [Path(ADAPTER_CONFIG)]
    described = read_config(base.folder)
    return Original(
        folder, architecture, (shard,), naming, files, None, base_config=described, made=True
    )


def scaled_adapter(stored: StoredAdapter, alpha: float | None, where: Path) -> Adapter:
    """The native adapter in `where`, with `alpha` if that is given.

    Raises SourceError where nobody says one, UsageError where it is no positive number.
    """
    if alpha is not None and not 0 < alpha < math.inf:
        raise UsageError("--alpha is a positive number.", found=alpha)
    alpha = stored.alpha if alpha is None else alpha
    if alpha is None:
        raise SourceError(
            "Nothing says how this adapter is scaled: its metadata has no alpha.",
            where=where,
            do="say to to-hf or logit-check what it was trained with: --alpha NUMBER",
        )
    return Adapter(stored.rank, alpha)


def _specs(native: NativeSource, architecture: Architecture) -> dict[str, TensorSpec]:
    """The tensors of PEFT that the arrays of a native adapter are, in its own dtypes."""
    table = adapter_table(native.layout, native.version)
    found: dict[str, TensorSpec] = {}
    left = set(native.specs)
    for tensor in hf_tensors(architecture, table.inventory):
        for row in table.rows_of(tensor.row):
            array = row.native.pattern.render(tensor.index, table.spellings)
            if array in native.specs and row.when.holds(architecture, tensor.index):
                found[tensor.name] = TensorSpec(native.specs[array].dtype, tensor.shape)
                left.discard(array)
    if left:
        targets = () if table.adapter is None else table.adapter.targets
        raise SourceError(
            "The adapter has matrices that are not converted, or its model lacks their weights.",
            where=native.folder,
            expected=f"matrices of {some(list(targets), 3)}",
            found=min(left),
            do="name the model that it was trained on with --base, or merge it in its framework",
        )
    return found
