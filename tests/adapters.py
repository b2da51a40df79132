"""Adapters of PEFT in tests: random matrices for the linear weights of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from trees import read_safetensors

PER_LAYER = ("per_layer_input_gate", "per_layer_projection")
"""Modules of E2B and E4B that Tunix adapts and MaxText does not."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 3, 6


def weights(model: Path, targets=TARGETS) -> dict[str, tuple[int, ...]]:
    """Name without `.weight` → shape, of the text model's linear weights of these modules."""
    return {
        name.removesuffix(".weight"): array.shape
        for name, array in read_safetensors(model).items()
        if "tower" not in name and name.split(".")[-2] in targets
    }


def matrices(model: Path, targets=TARGETS, seed: int = 0) -> dict[str, np.ndarray]:
    """Name, as the model has it, → matrix A [rank in] or B [out rank], float32."""
    random = np.random.default_rng(seed)
    found = {}
    for name, (outputs, inputs) in weights(model, targets).items():
        found[f"{name}.lora_A.weight"] = random.normal(size=(RANK, inputs)).astype(np.float32)
        found[f"{name}.lora_B.weight"] = random.normal(size=(outputs, RANK)).astype(np.float32)
    return found


def one_a(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The adapter with one matrix A for the keys and the values of a layer, as Tunix has it."""
    return {name: found[name.replace("v_proj.lora_A", "k_proj.lora_A")] for name in found}


def save(folder: Path, model: Path, found: dict[str, np.ndarray], **config) -> Path:
    """The folder as save_pretrained() of PEFT leaves it."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    named = {f"base_model.model.{name}": matrix for name, matrix in found.items()}
    modules = {name.partition(".lora_")[0].rpartition(".")[2] for name in found}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    facts = {
        "base_model_name_or_path": str(model),
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted(modules),
    }
    (folder / "adapter_config.json").write_text(json.dumps(facts | config))
    (folder / "README.md").write_text("An adapter.\n")
    return folder


def expert_matrices(model: Path, seed: int = 1) -> dict[str, np.ndarray]:
    """The same for the batched experts [experts out in], as PEFT stores both parameters' pairs.

    A is [(experts rank) in], B [out (rank experts)], and the first parameter's lie within the
    second's.
    """
    random = np.random.default_rng(seed)
    found = {}
    for name, array in read_safetensors(model).items():
        module, _, parameter = name.rpartition(".")
        if not module.endswith(".experts"):
            continue
        inner = ".base_layer" if parameter == "gate_up_proj" else ""
        experts, outputs, inputs = array.shape
        a = random.normal(size=(experts * RANK, inputs))
        b = random.normal(size=(outputs, RANK * experts))
        found[f"{module}{inner}.lora_A.weight"] = a.astype(np.float32)
        found[f"{module}{inner}.lora_B.weight"] = b.astype(np.float32)
    return found
