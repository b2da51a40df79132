"""Fast-LLM: loads a conversion as its config names it, and trains with its own trainer.

`python -P fast_llm.py logits SETTINGS INPUT OUTPUT` and `... train SETTINGS FOLDER`, in Fast-LLM's
environment; see frameworks.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

STEPS, LEARNING_RATE, LENGTH, BATCH = 3, 1e-3, 40, 2


def pretrained(settings: Path) -> dict[str, Any]:
    """The section `pretrained` of a config, by the printed settings."""
    told = json.loads(settings.read_text(encoding="utf-8"))
    return {key.removeprefix("pretrained."): value for key, value in told.items()} | {
        "model_weights": told["pretrained.model_weights"] == "true"
    }


def logits(settings: Path, given: Path, out: Path) -> None:
    """Writes the logits of the tokens in `given`."""
    import torch
    from fast_llm.engine.checkpoint.config import CheckpointLoadConfig, FastLLMCheckpointFormat
    from fast_llm.models.gpt.huggingface import HuggingfaceGPTModelForCausalLM

    told = pretrained(settings)
    assert told["format"] == FastLLMCheckpointFormat.name
    source = CheckpointLoadConfig(path=Path(told["path"]), format=FastLLMCheckpointFormat)
    model = HuggingfaceGPTModelForCausalLM.from_pretrained(
        source, {("distributed", "use_cuda"): False}
    )
    with torch.no_grad():
        found = model(input_ids=torch.as_tensor(np.load(given)["ids"])).logits
    np.savez(out, logits=found.float().numpy())


def train(settings: Path, folder: Path) -> None:
    """Three steps of its trainer on random tokens; it exports what it trained."""
    import yaml
    from fast_llm.cli import fast_llm_main

    config = {
        "training": {
            "logs": {"interval": 1},
            "train_iters": STEPS,
            "num_workers": 0,
            "export": {"interval": STEPS, "format": "fast_llm", "optimizer_state": False},
        },
        "pretrained": pretrained(settings),
        "model": {
            "distributed": {"use_cuda": False, "compute_dtype": "float32", "backend": "gloo"}
        },
        "data": {
            "maximum_document_length": LENGTH,
            "micro_batch_size": BATCH * LENGTH,
            "gpu": False,
            "datasets": {"training": {"type": "random"}},
        },
        "optimizer": {"learning_rate": {"base": LEARNING_RATE}},
        "run": {"experiment_dir": str((folder / "run").absolute())},
    }
    file = folder / "train.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    fast_llm_main(["train", "gpt", "--config", str(file)])


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    from asked import run

    sys.path.pop()  # where a module has the name of the framework
    sys.exit(run(sys.argv[1:], logits, train))
