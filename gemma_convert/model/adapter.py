"""adapter_config.json of PEFT → the facts of one low-rank adapter, or one clear message.

An adapter changes weight [out in] by scaling · B [out rank] · A [rank in], and scaling is
alpha / rank, or alpha / √rank for rsLoRA. Batched experts, which `target_parameters` names, have a
pair each. Keys and their meaning: `LoraConfig` in `peft/tuners/lora/config.py`, PEFT 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError, short
from gemma_convert.files.json_file import read_object
from gemma_convert.model.adapter_targets import Targets, read_targets, refuse_untargeted, unlike
from gemma_convert.model.huggingface_files import ADAPTER, INDEX, SINGLE

ADAPTER_CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 16 << 20
MAX_RANK = 1 << 16
MAX_ALPHA = 1e9

_OTHERS: Mapping[str, str] = {
    "use_dora": "DoRA scales every row by a magnitude of its own, for which no layout has a place",
    "use_qalora": "QA-LoRA pools the input of an adapter, which no framework here computes",
    "lora_bias": "biases of an adapter have no place in a Gemma 4 checkpoint",
    "fan_in_fan_out": "no weight of Gemma 4 is stored the other way around",
    "modules_to_save": "the adapter holds whole modules beside its matrices",
    "trainable_token_indices": "the adapter holds rows of the embedding",
    "layer_replication": "the adapter is for a model with copies of layers",
    "rank_pattern": "a native adapter has one rank",
    "alpha_pattern": "a native adapter has one alpha",
    "megatron_config": "the adapter is for Megatron's layers",
    "use_bdlora": "BD-LoRA stores the blocks of a block-diagonal matrix",
    "arrow_config": "Arrow chooses among several adapters for each token",
    "kasa_config": "KaSA changes the base weights, and has singular values between the matrices",
    "monteclora_config": "MonteCLoRA draws its matrices at random around the stored ones",
    "alora_invocation_tokens": "an activated adapter changes only tokens behind its invocation",
}
"""Key of adapter_config.json that says an adapter is more than two matrices a weight → why not."""

_MOVING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` with which PEFT changes the base model's own weights."""

_BESIDE_MATRICES: Mapping[str, str] = {
    "lora_magnitude_vector": "the magnitudes of DoRA",
    "lora_embedding_A": "an adapter of the embedding",
    "lora_embedding_B": "an adapter of the embedding",
    "modules_to_save": "a whole module",
    "base_layer": "weights of the base model",
    "bias": "a bias",
}


_MATRIX = re.compile(r"(.*)\.lora_[AB]\.weight")
_OF_EXPERTS = re.compile(r"(.*\.experts)((?:\.base_layer)*)")


@dataclass(frozen=True)
class Adapter:
    """One adapter: the rank of its matrices, and alpha, so that it is scaled by alpha / rank.

    `parameters` are the names, or ends of names, of parameters that it changes by themselves.
    """

    rank: int
    alpha: float
    parameters: tuple[str, ...] = ()
    targets: Targets | None = field(default=None, compare=False)
    """None where no config says which modules it changes."""

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class StoredAdapter:
    """What a native adapter says of itself; alpha is None where nobody has written it down."""

    rank: int
    alpha: float | None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT, in safetensors, and no weights of a model."""
    whole = any((folder / name).exists() for name in (SINGLE, INDEX))
    return (folder / ADAPTER).is_file() and not whole


def read_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`, by its adapter_config.json.

    Raises SourceError where it is no LoRA of PEFT, or is more than two matrices a weight.
    """
    config, where = _read(folder), folder / ADAPTER_CONFIG
    kind = config.get("peft_type")
    if kind != "LORA":
        raise unlike(where, "peft_type", "LORA: two matrices for each weight", kind)
    for key, why in _OTHERS.items():
        if config.get(key):
            raise unlike(where, key, f"no {key}: {why}", config[key])
    if config.get("bias", "none") != "none":
        raise unlike(where, "bias", "none: biases have no place", config["bias"])
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_MOVING_THE_BASE):
        raise unlike(where, "init_lora_weights", "an adapter of unchanged base weights", start)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= MAX_RANK:
        raise unlike(where, "r", f"a rank from 1 to {MAX_RANK}", rank)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < MAX_ALPHA:
        raise unlike(where, "lora_alpha", f"a number above 0 and below {MAX_ALPHA:g}", alpha)
    stabilised = config.get("use_rslora", False)
    if not isinstance(stabilised, bool | None):
        raise unlike(where, "use_rslora", "true or false", stabilised)
    named = config.get("target_parameters") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise unlike(where, "target_parameters", "a list of names", named)
    scale = rank**0.5 if stabilised else 1.0
    return Adapter(rank, alpha * scale, tuple(named), read_targets(config, where))


def named_base(folder: Path) -> str | None:
    """What adapter_config.json says the base model is: a path, or a name on the hub."""
    base = _read(folder).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def check_matrices(adapter: Adapter, names: Iterable[str], where: Path) -> None:
    """Nothing where there are matrices A and B alone, of modules that the adapter's config names.

    SourceError names the first other tensor.
    """
    listed = list(names)
    if not listed:
        raise SourceError("The adapter holds no tensor.", where=where)
    modules: dict[str, None] = {}
    for name in listed:
        matrix = _MATRIX.fullmatch(name)
        if matrix is not None and of_experts(matrix[1]) is not None:
            continue
        modules |= {} if matrix is None else {matrix[1]: None}
        found = next((why for part, why in _BESIDE_MATRICES.items() if part in name.split(".")), "")
        if found or matrix is None:
            raise SourceError(
                "The adapter holds more than the two matrices of each weight.",
                where=where,
                expected="names that end in lora_A.weight or lora_B.weight",
                found=f"{short(name)}{', ' if found else ''}{found}",
                do="merge it into its base model with merge_and_unload() of PEFT, and convert that",
            )
    if adapter.targets is not None:
        refuse_untargeted(adapter.targets, list(modules))


def of_experts(module: str) -> tuple[str, int] | None:
    """Where experts stand, and how many adapters of theirs lie around this one, by a pair's name.

    None where `module`, the name before `.lora_A`, is no batched experts'. Each parameter of a
    module is adapted around those before it (`ParamWrapper` in PEFT's `tuners/lora/layer.py`).
    """
    found = _OF_EXPERTS.fullmatch(module)
    return None if found is None else (found[1], found[2].count("."))


def adapter_config(adapter: Adapter, base: str, modules: Iterable[str]) -> dict[str, Any]:
    """adapter_config.json for an adapter that no file describes; `modules` are the adapted ones."""
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
    }


def _read(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / ADAPTER_CONFIG, ADAPTER_CONFIG, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise SourceError(
            "There is no adapter_config.json, so nothing says how the adapter is scaled.",
            where=folder / ADAPTER_CONFIG,
            do="give the whole folder that save_pretrained() of PEFT wrote",
        ) from None
