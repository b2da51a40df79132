"""A Fast-LLM checkpoint's tensors in their files: found, checked by name and shape, and read.

Every parameter is written out by hand, from the metadata alone. Layout: Fast-LLM 0.4.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open

from gemma_convert.errors import SourceError, some
from gemma_convert.files.libraries import told_by_library
from gemma_convert.files.library_path import library_path
from gemma_convert.layouts.fast_llm.forward_config import Block, FastLLMConfig, Mlp

Shape: TypeAlias = tuple[int, ...]

EMBEDDING = "embeddings.word_embeddings_weight"
FINAL_NORM = "head.final_norm.weight"
OUTPUT = "head.output_weights"
_SUFFIX = "/weights"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class StoredTensors:
    """The tensors of one checkpoint, mapped into memory when they are asked for.

    Raises SourceError where one is missing, superfluous or of another shape than `config` says, or
    lies elsewhere than its state_index says. Values are not looked at.
    """

    def __init__(self, folder: Path, config: FastLLMConfig) -> None:
        self._folder, self._index = folder, config.state_index
        self._files = _open(folder, self._index)
        found, self.dtypes = _inventory(folder, self._files)
        _check(found, config, folder)

    def read(self, name: str) -> torch.Tensor:
        """The stored tensor of a parameter, mapped into memory rather than read."""
        stored = name + _SUFFIX
        file = self._index[stored]
        if file not in self._files:
            self._files[file] = _opened(self._folder / file)
        tensor: torch.Tensor = self._files[file].get_tensor(stored)
        return tensor

    def release(self) -> None:
        """Lets go of the memory that files are mapped into; they are opened when asked for."""
        self._files.clear()


def _open(folder: Path, index: Mapping[str, str]) -> dict[str, Any]:
    """The open safetensors files that `index` names."""
    files = {}
    for name in sorted(set(index.values())):
        path = folder / name
        if not path.is_file():
            raise SourceError("A file that state_index names is not there.", where=path)
        files[name] = _opened(path)
    return files


def _opened(path: Path) -> Any:
    with told_by_library("This is not a safetensors file that can be read.", path):
        return safe_open(library_path(path), framework="pt")


def _inventory(
    folder: Path, files: Mapping[str, Any]
) -> tuple[dict[str, tuple[str, Shape]], frozenset[str]]:
    """Name → file and shape of every tensor of every file, and the dtypes they are stored in."""
    found: dict[str, tuple[str, Shape]] = {}
    dtypes = set()
    for file, opened in files.items():
        for name in opened.keys():  # noqa: SIM118
            facts = opened.get_slice(name)
            stored = str(facts.get_dtype())
            if name in found or stored not in _DTYPES:
                raise SourceError(
                    "A tensor cannot be a weight of this checkpoint.",
                    where=f"{folder / file}, {name}",
                    expected=f"one tensor of this name, stored as {', '.join(_DTYPES.values())}",
                    found=f"another one in {found[name][0]}" if name in found else stored,
                )
            found[name] = (file, tuple(facts.get_shape()))
            dtypes.add(_DTYPES[stored])
    return found, frozenset(dtypes)


def _check(found: Mapping[str, tuple[str, Shape]], config: FastLLMConfig, folder: Path) -> None:
    """Nothing where the tensors are those of `config` and lie where its state_index says."""
    wanted = {name + _SUFFIX: shape for name, shape in shapes(config)}
    wrong = [
        f"{name} is {_shape_of(found.get(name))} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name not in found or found[name][1] != shape
    ]
    wrong += [f"{name} is not a parameter" for name in sorted(found.keys() - wanted.keys())]
    if not wrong:
        index = config.state_index
        wrong = [
            f"state_index has {index.get(name, 'nothing')} for {name}, which is in {file}"
            for name, (file, _) in found.items()
            if index.get(name) != file
        ]
        wrong += [f"state_index lists {name}" for name in sorted(index.keys() - found.keys())]
    if wrong:
        raise SourceError(
            "The tensors do not fit metadata.yaml.",
            where=folder,
            expected=f"the {len(wanted)} parameters of a model with {len(config.layers)} layers, "
            f"each named <parameter>{_SUFFIX}",
            found=some(wrong, between="; "),
            do="convert it again",
        )


def _shape_of(found: tuple[str, Shape] | None) -> str:
    return "missing" if found is None else str(list(found[1]))


def shapes(config: FastLLMConfig) -> Iterator[tuple[str, Shape]]:
    """Every parameter of the model and its shape, written out by hand."""
    yield EMBEDDING, (config.vocab_size, config.hidden_size)
    yield FINAL_NORM, (config.hidden_size,)
    if not config.tied_embedding_weight:
        yield OUTPUT, (config.vocab_size, config.hidden_size)
    for index, block in enumerate(config.layers):
        for name, shape in layer_shapes(block, config.hidden_size).items():
            yield f"decoder.{index}.{name}", shape


def layer_shapes(block: Block, embed: int) -> dict[str, Shape]:
    """Every parameter of one layer, named within it, and its shape."""
    attention = block.attention
    queries = attention.heads * attention.head_size
    keys = attention.head_groups * attention.head_size
    shared = {
        "mixer.query.weight": (queries, embed),
        "mixer.key_value.weight": (keys if attention.shared_key_value else 2 * keys, embed),
        "mixer.dense.weight": (embed, queries),
        "mixer.query_norm.weight": (attention.head_size,),
        "mixer.key_norm.weight": (attention.head_size,),
        "norm_1.weight": (embed,),
        "post_mixer_norm.weight": (embed,),
        "post_mlp_norm.weight": (embed,),
        "output_scale": (1,),
    }
    if isinstance(block.mlp, Mlp):
        return {
            **shared,
            "norm_2.weight": (embed,),
            "mlp.layer_1.weight": (2 * block.mlp.width, embed),
            "mlp.layer_2.weight": (block.mlp.width, embed),
        }
    dense, routed = block.mlp.dense, block.mlp.routed
    return {
        **shared,
        "mlp.dense.layer_1.weight": (2 * dense.width, embed),
        "mlp.dense.layer_2.weight": (dense.width, embed),
        "mlp.dense.pre_norm.weight": (embed,),
        "mlp.dense.post_norm.weight": (embed,),
        "mlp.routed.layer_1.weight": (routed.experts * 2 * routed.width, embed),
        "mlp.routed.layer_2.weight": (routed.experts * routed.width, embed),
        "mlp.routed.pre_norm.weight": (embed,),
        "mlp.routed.post_norm.weight": (embed,),
        "mlp.routed.router.weight": (routed.experts, embed),
        "mlp.routed.router_scale": (embed,),
        "mlp.routed.router_per_expert_scale": (routed.experts,),
    }
