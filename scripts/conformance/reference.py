"""What transformers computes, as it is or as a framework's release does, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH, LENGTH, GRID = 2, 40, (42, 60)
"""Of the tokens, and of the image in patches: the 2,520 that become 280 soft tokens."""


def tokens() -> np.ndarray:
    """Made-up tokens of every tiny vocab, without the special ones, int64 [batch, length]."""
    return np.random.default_rng(3).integers(20, 290, (BATCH, LENGTH))


def picture(patch_size: int) -> np.ndarray:
    """A made-up image in 0 to 1, float32 [height, width, 3]."""
    height, width = (one * patch_size for one in GRID)
    return np.random.default_rng(5).random((height, width, 3)).astype(np.float32)


def load(checkpoint: Path) -> Any:
    """The transformers model of a checkpoint, in float32."""
    import torch
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()


def adapted(model: Any, adapter: Path) -> Any:
    """The model with the adapter that PEFT loads from a folder."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter)).eval()


def logits(
    checkpoint: Path, deviation: str | None = None, adapter: Path | None = None
) -> np.ndarray:
    """Logits of `tokens`, [batch, length, vocab], with what a framework computes otherwise.

    With `adapter` they are those of the model with it, in PEFT.
    """
    import torch

    model = load(checkpoint)
    if deviation is not None:
        DEVIATIONS[deviation](model)
    if adapter is not None:
        model = adapted(model, adapter)
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens()), use_cache=False).logits.float().numpy()


def features(checkpoint: Path) -> np.ndarray:
    """What the language model gets of `picture`, [tokens, hidden]."""
    import torch

    model = load(checkpoint)
    size = model.config.vision_config.patch_size
    rows, columns = GRID
    patches = picture(size).reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
    positions = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1)
    with torch.no_grad():
        seen = model.model.get_image_features(
            torch.tensor(patches.reshape(1, rows * columns, -1)),
            torch.tensor(positions.reshape(1, -1, 2)),
        )
    found = getattr(seen, "pooler_output", seen)
    found = found[0] if isinstance(found, list | tuple) else found
    return found.float().numpy().reshape(-1, found.shape[-1])


def worst_kl(expected: np.ndarray, found: np.ndarray) -> float:
    """The KL divergence of the worst token, in nats: nan where a logit is none."""
    one, other = (_log_softmax(each.astype(np.float64)) for each in (expected, found))
    return float((np.exp(one) * (one - other)).sum(-1).max())


def worst_log(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest difference of a log-probability."""
    one, other = (_log_softmax(each.astype(np.float64)) for each in (expected, found))
    return float(abs(one - other).max())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _output_table_in_bfloat16(model: Any) -> None:
    """MaxText 0.2.5, `attend_on_embedding`: the stored table, × √hidden, is cast whatever dtype."""
    import torch

    table = model.get_input_embeddings().weight.detach()
    scale = torch.tensor(float(table.shape[1])).sqrt()
    model.lm_head.weight = torch.nn.Parameter((table * scale).bfloat16().float() / scale)


def _router_normalised_twice(model: Any) -> None:
    """gemma 4.0.1 and Tunix 0.1.7: the router gets what the norm before the experts gives."""
    for layer in model.model.language_model.layers:
        norm = layer.pre_feedforward_layernorm_2
        layer.router.register_forward_pre_hook(lambda _, given, norm=norm: (norm(given[0]),))


DEVIATIONS: dict[str, Callable[[Any], None]] = {
    "output table in bfloat16": _output_table_in_bfloat16,
    "router normalised twice": _router_normalised_twice,
}
"""What releases compute otherwise than transformers, done to a transformers model."""
