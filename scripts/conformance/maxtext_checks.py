"""MaxText's own converters, vision tower and parameters-only checkpoints, against ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import reference
from case import Case
from tensors import Arrays, different, tensors, tree

import gemma_convert

TRIED = {("e2b", False), ("e4b", False), ("26b-a4b", True), ("31b", True)}
"""Models and forms whose converters are tried: one of each model that they know."""
STATE = "run/checkpoints/2/items"
UNIT = 2.0**-22
"""Two units in the last place of a float32: the two divide by √hidden in different ways."""
ROUNDED = 2.0**-7
"""MaxText rounds to bfloat16, by 2⁻⁸ of a value at most. Of the embedding, rounded × √hidden, to-hf
takes the bfloat16 that gives the same again, as the original had one: as much once more."""


def commands(case: Case) -> list[tuple[object, ...]]:
    """What MaxText is asked besides logits and training."""
    given: list[tuple[object, ...]] = []
    if case.sees:
        size = _patch_size(case.original)
        np.savez(case.folder / "picture.npz", image=reference.picture(size))
        given.append(("vision", "settings.json", "picture.npz", "seen.npz"))
    if (case.model, case.scanned) in TRIED:
        given.append(("to_huggingface", "settings-trained.json", case.original, "theirs"))
        given.append(("to_maxtext", "settings.json", case.original, "made"))
        given.append(("parameters_only", "settings.json", STATE, "alone"))
    return given


def compare(case: Case) -> None:
    """The rows of what `commands` gave."""
    if case.sees:
        case.compare(
            "largest difference of an image's features from transformers, relative to the largest",
            1e-5,
            lambda: _share(reference.features(case.original), case.array("seen.npz", "features")),
        )
    if (case.model, case.scanned) in TRIED:
        case.compare(
            "arrays of MaxText's to_maxtext that differ in any bit from to-native",
            0,
            lambda: different(
                tree(case.folder / "made/0/items"), tree(case.folder / "converted/0/items")
            ),
        )
        case.compare(
            "tensors of MaxText's to_huggingface that differ in any bit from to-hf, after training",
            1,
            lambda: different(tensors(case.folder / "theirs"), tensors(case.exported)),
        )
        case.compare(
            "largest relative difference of that one, the embedding",
            UNIT,
            lambda: _furthest(tensors(case.folder / "theirs"), tensors(case.exported)),
        )
        case.compare(
            "largest relative difference of a parameters-only checkpoint from the training one",
            ROUNDED,
            lambda: _furthest(_parameters_only(case), tensors(case.exported)),
        )


def _patch_size(checkpoint: Path) -> int:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return int(config["vision_config"]["patch_size"])


def _share(expected: np.ndarray, found: np.ndarray) -> float:
    return float(abs(found - expected).max() / abs(expected).max())


def _furthest(found: Arrays, expected: Arrays) -> float:
    """The largest difference of a value found, as a share of the expected one."""
    shares = [
        np.max(
            abs(array - expected[name]) / np.maximum(abs(expected[name]), np.finfo(np.float32).tiny)
        )
        for name, array in found.items()
    ]
    return float(max(shares))


def _parameters_only(case: Case) -> Arrays:
    out = case.folder / "alone-exported"
    alone = case.folder / "alone/run/checkpoints/0/items"
    gemma_convert.to_hf(alone, out, like=case.original, dtype="float32")
    return tensors(out)
