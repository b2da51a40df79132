"""What an export writes: names, dtypes, shards and files, as near to the original as can be."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gemma_convert.arrays.dtypes import CONVERTED, Choice, TensorSpec
from gemma_convert.checkpoint.native import NativeSource
from gemma_convert.checkpoint.original import Original, index_metadata
from gemma_convert.errors import UsageError
from gemma_convert.mapping.inventory import hf_tensors
from gemma_convert.mapping.native_facts import NativeFacts
from gemma_convert.mapping.plan import Plan
from gemma_convert.mapping.reverse import Arrays, Wanted, reverse_plan
from gemma_convert.model.huggingface_files import CONFIG, INDEX, SINGLE
from gemma_convert.stores.remote.mirror import file_size
from gemma_convert.stores.safetensors.writer import OutputShard, output_shard
from gemma_convert.stores.tensor_folder import Shard

KVShared = Literal["keep", "omit"]

_DTYPE = re.compile(r'("(?:torch_)?dtype"\s*:\s*")(?:bfloat16|float16|float32)(")')


@dataclass(frozen=True)
class Export:
    """names: the original's → ours; stored: tensors copied from the original, ours → its name.

    equal: tensors that the native side has once, ours → the one that is written already.
    """

    shards: tuple[OutputShard, ...]
    names: Mapping[str, str]
    stored: Mapping[str, str]
    equal: Mapping[str, str]
    files: tuple[Path, ...]
    edited: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    def file_bytes(self, folder: Path) -> int:
        return sum(file_size(folder / file) for file in self.files)


@dataclass(frozen=True)
class ExportOptions:
    """What is asked of an export; `groups` is a division of its tensors into shards."""

    dtype: Choice = "keep"
    max_shard_size: int | None = None
    kv_shared: KVShared = "keep"
    text_only: bool = False
    groups: Sequence[Sequence[str]] | None = None


def plan_export(
    plan: Plan, original: Original, options: ExportOptions, facts: NativeFacts | None
) -> Export:
    """The shards and files of an export; `facts` are what config.json then says.

    Raises SourceError where a tensor is neither on the native side nor at hand in the original, and
    UsageError for options that leave nothing to do.
    """
    if options.max_shard_size is not None and options.max_shard_size < 1:
        raise UsageError("--max-shard-size is a size.", found=options.max_shard_size)
    if plan.architecture.adapter is not None:
        _check_of_adapter(options)
    cut = options.text_only and not plan.architecture.text_only
    names = dict(_names(plan, original, options.kv_shared, cut))
    stored = {name: origin for origin, name in names.items() if origin in plan.carried}
    for origin in stored.values():
        original.at_hand(origin)
    specs = {name: _cast(original.specs[origin], options.dtype) for origin, name in names.items()}
    edited: dict[str, str] = {}
    whole = options.max_shard_size is None and options.groups is None and specs == original.specs
    if whole:
        shards = tuple(OutputShard(s.file, s.header, s.tensors) for s in original.shards)
    else:
        renamed = {} if cut else original.naming.stored
        shards = tuple(_new_shards(original, names, specs, options, renamed))
        if len(shards) > 1:
            edited[INDEX] = _index(original, shards, renamed)
    files = [file for file in original.files if whole or str(file) != INDEX]
    adapter = plan.architecture.adapter is not None
    config = None if adapter else _config(original, options.dtype, options.text_only, facts)
    if config is not None:
        files = [file for file in files if str(file) != CONFIG]
        edited[CONFIG] = config
    equal = {names[name]: names[other] for name, other in plan.equal.items() if name in names}
    return Export(shards, names, stored, equal, tuple(files), edited)


def _check_of_adapter(options: ExportOptions) -> None:
    """Raises UsageError for options that an adapter cannot be exported with."""
    if options.text_only:
        raise UsageError("An adapter has no towers to leave out.", do="drop --text-only")
    if options.kv_shared != "keep":
        raise UsageError("All matrices of an adapter are exported.", do="drop --kv-shared")
    if options.max_shard_size is not None:
        raise UsageError(
            "An adapter is one file: PEFT reads no shards of it.", do="drop --max-shard-size"
        )


def reversed_plan(
    plan: Plan, native: NativeSource, original: Original, export: Export
) -> tuple[Plan, dict[str, int], dict[str, str]]:
    """The plan of the export, array → bytes to keep decoded, and tensor → the original's name.

    The name is that of the tensor whose values are written, where one stands for an equal one.
    """
    specs = {tensor.name: tensor.spec for shard in export.shards for tensor in shard.tensors}
    wanted = Wanted(specs, export.names, export.stored, export.equal)
    stored = {} if original.stored is None else original.stored.specs
    back, caches = reverse_plan(
        plan, Arrays(native.specs, native.chunks), wanted, stored, native.block_bytes
    )
    origins = {name: origin for origin, name in export.names.items()}
    return back, caches, origins | {name: origins[one] for name, one in export.equal.items()}


def _names(
    plan: Plan, original: Original, kv_shared: KVShared, cut: bool
) -> Iterator[tuple[str, str]]:
    """(name in the original, name in the export) of every exported tensor, in file order.

    `cut` says whether the text model of a whole one is exported alone.
    """
    tensors = {tensor.name: tensor for tensor in hf_tensors(plan.architecture)}
    for name in original.specs:
        tensor = tensors[name]
        leftover = not tensor.required and tensor.row.tied is None
        if leftover and kv_shared == "omit":
            continue
        if not cut:
            yield name, name
        elif name.startswith("model.language_model.") or tensor.row.tied is not None:
            yield name, name.replace("model.language_model.", "model.", 1)


def _cast(spec: TensorSpec, dtype: Choice) -> TensorSpec:
    keep = dtype == "keep" or spec.dtype not in CONVERTED
    return spec if keep else TensorSpec(dtype, spec.shape)


def _new_shards(
    original: Original,
    names: Mapping[str, str],
    specs: Mapping[str, TensorSpec],
    options: ExportOptions,
    stored: Mapping[str, str],
) -> Iterator[OutputShard]:
    """Shards with headers of our own: the original's division, or one by size.

    `stored` has the names of the original's files, where they are others than those of the tables.
    """
    limit = options.max_shard_size
    if options.groups is not None:
        groups = [list(group) for group in options.groups]
    elif limit is None:
        groups = [
            [names[tensor.name] for tensor in shard.tensors if tensor.name in names]
            for shard in original.shards
        ]
        groups = [group for group in groups if group]
    else:
        groups = list(_by_size(specs, limit))
    kept = limit is None and options.groups is None and len(groups) == len(original.shards)
    files = [shard.file for shard in original.shards] if kept else _file_names(len(groups))
    metadata = _metadata(original.shards[0])
    for file, group in zip(files, groups, strict=True):
        yield output_shard(file, {name: specs[name] for name in group}, metadata, stored)


def _by_size(specs: Mapping[str, TensorSpec], limit: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, spec in specs.items():
        if group and size + spec.nbytes > limit:
            yield group
            group, size = [], 0
        group.append(name)
        size += spec.nbytes
    yield group


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _metadata(shard: Shard) -> dict[str, str]:
    header = json.loads(shard.header[8:])
    metadata: dict[str, str] = header.get("__metadata__", {"format": "pt"})
    return metadata


def _index(original: Original, shards: Sequence[OutputShard], stored: Mapping[str, str]) -> str:
    total = sum(tensor.spec.nbytes for shard in shards for tensor in shard.tensors)
    metadata: dict[str, Any] = {**index_metadata(original.folder), "total_size": total}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(t.spec.size for s in shards for t in s.tensors)
    weight_map = {
        stored.get(tensor.name, tensor.name): shard.file
        for shard in shards
        for tensor in shard.tensors
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def _config(
    original: Original, dtype: Choice, text_only: bool, facts: NativeFacts | None
) -> str | None:
    """config.json where it must change: facts, the dtype in place, or text_config as the root."""
    text = edited = (original.folder / CONFIG).read_bytes().decode()
    if facts is not None and facts.changed:
        edited = _json(facts.config)
    if dtype != "keep":
        edited = _DTYPE.sub(rf"\g<1>{dtype}\g<2>", edited)
    if text_only and not original.architecture.text_only:
        config = json.loads(edited)
        root = {
            "architectures": [replace(original.architecture, text_only=True).reference_class],
            **config["text_config"],
            "model_type": original.architecture.text_model_type,
            "tie_word_embeddings": original.architecture.text.tied,
        }
        root.setdefault("dtype", config.get("dtype", "bfloat16"))
        if "transformers_version" in config:
            root["transformers_version"] = config["transformers_version"]
        edited = _json(root)
    return None if edited == text else edited


def _json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
