"""What is common to the planted mistakes: where each was caught, and by what."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from record import REPORT, TOKENS


@pytest.fixture
def caught() -> Callable[..., None]:
    """caught(sense, layout, mistake, by, kl): notes which check found a mistake, and at what KL."""

    def note(sense: str, layout: str, mistake: str, by: str, kl: float | None = None) -> None:
        file = os.environ.get(REPORT)
        if file:
            line = {"sense": sense, "layout": layout, "mistake": mistake, "by": by, "kl": kl}
            with Path(file).open("a", encoding="utf-8") as report:
                report.write(json.dumps(line) + "\n")

    return note


@pytest.fixture(scope="session")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """goldens(hf): transformers' logits of a checkpoint, made once."""
    from gemma_convert.logits.golden_writing import save_golden

    made: dict[Path, Path] = {}

    def make(hf: Path) -> Path:
        if hf not in made:
            file = tmp_path_factory.mktemp("golden") / "golden.safetensors"
            save_golden(hf, file, tokens=TOKENS)
            made[hf] = file
        return made[hf]

    return make
