"""Adapters: what a framework computes, trains and saves of one, against PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import reference
from case import Case
from frameworks import Framework
from tensors import Arrays, different, furthest, tensors, tree

import gemma_convert

RANK, ALPHA = 4, 8
MOVED = 1e-3
MERGED = 2.0**-20
"""Eight units in the last place of a float32: PEFT multiplies and adds in it, we in float64."""
CONVERTERS = {"maxtext": ("e2b", "e4b", "26b-a4b", "31b")}
"""The framework that has converters of its own for adapters, and the models that they know."""


def tried(case: Case) -> bool:
    """Whether adapters are tried in this form of this model."""
    return case.model in case.framework.adapters and not case.scanned


def prepare(case: Case) -> None:
    """Makes an adapter with PEFT, and its conversion, and writes what the framework is told."""
    adapter, converted = case.folder / "adapter", case.folder / "adapter-converted"
    _make(case.original, adapter, case.framework)
    report = gemma_convert.to_native(adapter, converted, layout=case.framework.layout)
    case.tell("adapter", report.settings, converted, case.folder / case.framework.tuned)


def commands(case: Case) -> list[tuple[object, ...]]:
    """What the framework is asked."""
    given: list[tuple[object, ...]] = [
        ("adapted", "settings.json", "adapter.json", "input.npz", "adapted.npz"),
        ("train_adapter", "settings.json", "adapter.json", "tuned"),
        ("adapted", "settings.json", "adapter-trained.json", "input.npz", "tuned.npz"),
    ]
    if case.model in CONVERTERS.get(case.framework.name, ()):
        theirs = ("adapter_to_huggingface", "adapter-trained.json", case.original, "theirs-adapter")
        given.append(theirs)
    return given


def compare(case: Case) -> None:
    """The rows of what `commands` gave."""
    adapter, limit = case.folder / "adapter", case.framework.limit
    case.compare(
        "KL of the framework's logits with an adapter, against PEFT",
        limit,
        lambda: reference.worst_kl(_logits(case, adapter), case.array("adapted.npz")),
    )
    case.compare(
        "largest difference of a log-probability between those two",
        1e-4,
        lambda: reference.worst_log(_logits(case, adapter), case.array("adapted.npz")),
    )
    case.compare(
        "largest change of a logit by three training steps of the adapter alone",
        MOVED,
        lambda: float(abs(case.array("tuned.npz") - case.array("adapted.npz")).max()),
        least=True,
    )
    case.compare(
        "KL of the framework's logits with the trained adapter, against the export in PEFT",
        limit,
        lambda: reference.worst_kl(_logits(case, _exported(case)), case.array("tuned.npz")),
    )
    case.compare(
        "arrays of the trained adapter that differ in any bit when that export is converted again",
        0,
        lambda: different(tree(_items(case.folder / case.framework.tuned)), _again(case)),
    )
    case.compare(
        "tensors of that export that PEFT reports as missing or unexpected",
        0,
        lambda: _unlike(case.original, case.folder / "adapter-exported"),
    )
    case.compare(
        "largest difference of to-native --merge from PEFT's merge, relative to the largest value",
        MERGED,
        lambda: _apart(_merged_by_peft(_wide(case), adapter), _merged(case), tensors(adapter)),
    )
    if case.model in CONVERTERS.get(case.framework.name, ()):
        case.compare(
            "tensors of MaxText's to_huggingface that differ in any bit from to-hf, adapter",
            0,
            lambda: different(
                tensors(case.folder / "theirs-adapter"), tensors(case.folder / "adapter-exported")
            ),
        )


def _make(original: Path, out: Path, framework: Framework) -> None:
    """An adapter of PEFT of all modules that a framework adapts, every matrix random."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = reference.load(original)
    names = [
        name
        for name, _ in model.named_modules()
        if ".language_model." in name and name.endswith(framework.adapted)
    ]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    weights = dict(adapted.named_parameters())
    for name, weight in weights.items():
        if framework.one_a and "v_proj.lora_A" in name:
            weight.data = weights[name.replace("v_proj", "k_proj")].data.clone()
    with torch.no_grad():
        adapted.save_pretrained(out)
    file = out / "adapter_config.json"
    config_json = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config_json | {"base_model_name_or_path": str(original)}))


def _logits(case: Case, adapter: Path) -> np.ndarray:
    return reference.logits(case.original, case.deviation, adapter)


def _exported(case: Case) -> Path:
    """The adapter of PEFT that the framework's trained one is, proven against it."""
    trained, out = case.folder / case.framework.tuned, case.folder / "adapter-exported"
    gemma_convert.to_hf(trained, out, base=case.original, alpha=float(ALPHA))
    assert gemma_convert.verify(out, against=trained).passed
    return out


def _again(case: Case) -> Arrays:
    """What the export is in the framework's own form."""
    export, out = case.folder / "adapter-exported", case.folder / "adapter-again"
    gemma_convert.to_native(export, out, layout=case.framework.layout)
    return tree(_items(out))


def _items(folder: Path) -> Path:
    """The parameters of the last step below a folder."""
    found = (file.parent for file in folder.rglob("_METADATA"))
    return max(items for items in found if items.name != "optimizer_state")


def _unlike(original: Path, adapter: Path) -> float:
    """How many tensors of an adapter PEFT does not find, or finds without a place for them."""
    model = reference.adapted(reference.load(original), adapter)
    found = model.load_adapter(str(adapter), "again")
    missing = [name for name in found.missing_keys if "lora_" in name]
    return float(len(missing) + len(found.unexpected_keys))


def _wide(case: Case) -> Path:
    """The model in float32."""
    out = case.folder / "original-float32"
    if not out.exists():
        gemma_convert.to_hf(case.folder / "converted", out, dtype="float32")
    return out


def _merged(case: Case) -> Arrays:
    """The tensors of the model with the adapter merged on the way to the framework and back."""
    out = case.folder / "merged"
    gemma_convert.to_native(
        case.folder / "adapter", out, layout=case.framework.layout, merge=True, base=_wide(case)
    )
    gemma_convert.to_hf(out, case.folder / "merged-back")
    return tensors(case.folder / "merged-back")


def _apart(theirs: Arrays, ours: Arrays, adapter: Arrays) -> float:
    """How far the two are from one another, of all tensors that both call the same.

    Transformers names those of 12B's embedders otherwise than the files; adapted ones are there.
    """
    both = {name: array for name, array in theirs.items() if name in ours}
    matrices = {name.removeprefix("base_model.model.") for name in adapter}
    assert {name.replace(".lora_A", "") for name in matrices if ".lora_A" in name} <= both.keys()
    return furthest(both, ours)


def _merged_by_peft(model: Path, adapter: Path) -> Arrays:
    """The tensors of the model with the adapter merged by PEFT; the head is the embedding."""
    merged: Any = reference.adapted(reference.load(model), adapter).merge_and_unload()
    weights = {name: value.numpy() for name, value in merged.state_dict().items()}
    del weights["lm_head.weight"]
    return weights
