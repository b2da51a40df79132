"""Tunix: loads a conversion with the lines that to-native printed, and trains as its users do.

`python -P tunix.py COMMAND PATH...`, in Tunix' environment; see frameworks.py. Besides `logits` and
`train` there is

    record ORIGINAL OUT   what Tunix' own loader makes of a Hugging Face checkpoint, and
                          its CheckpointManager saves: OUT.json.gz, dtype, shape and digest of
                          every array on disk, and OUT.npz, tokens and its own logits of them
    record_adapter ORIGINAL OUT
                          what its CheckpointManager saves of an adapter that qwix puts around every
                          weight but those of experts: OUT-adapter.json, path → shape

The recorded files are those of tests/data/tunix, of `gemma-convert tiny MODEL ORIGINAL --layers N`
with the N of tests/cases.py.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

STEPS, LEARNING_RATE = 3, 1e-3
RANK = 3
RECORDED, EVERY = (1, 24), 5
"""Of how many tokens logits are recorded, and of which part of the vocabulary."""


def load(settings: Path) -> Any:
    """The model with its parameters in float32, by the printed lines."""
    import jax
    from flax import nnx
    from tunix.models.gemma4.model import AttentionType, Gemma4, ModelConfig
    from tunix.sft.checkpoint_manager import CheckpointManager

    jax.config.update("jax_default_matmul_precision", "highest")
    lines = json.loads(settings.read_text(encoding="utf-8"))
    known: dict[str, Any] = {
        "dataclasses": dataclasses,
        "nnx": nnx,
        "AttentionType": AttentionType,
        "CheckpointManager": CheckpointManager,
        "Gemma4": Gemma4,
        "ModelConfig": ModelConfig,
    }
    for name in ("config", "model"):
        known[name] = eval(lines[name], known)
    eval(lines["params"], known)
    return known["model"]


def computed(model: Any, ids: Any) -> np.ndarray:
    """The logits [batch length vocab] of tokens that see all before them."""
    given = inputs(np.asarray(ids, np.int32))
    found, _ = model(given["input_tokens"], given["positions"], None, given["attention_mask"])
    return np.asarray(found, np.float32)


def inputs(ids: np.ndarray) -> dict[str, Any]:
    """What Tunix' loss is given of tokens [batch length]."""
    batch, length = ids.shape
    causal = np.tril(np.ones((length, length), bool))
    return {
        "input_tokens": ids,
        "input_mask": np.ones_like(ids),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape),
        "attention_mask": np.broadcast_to(causal, (batch, length, length)),
    }


def logits(settings: Path, given: Path, out: Path) -> None:
    """Writes the logits of the tokens in `given`."""
    np.savez(out, logits=computed(load(settings), np.load(given)["ids"]))


def with_adapter(model: Any, adapter: Path) -> Any:
    """The model with an adapter, by the lines that were printed of that."""
    import qwix
    from flax import nnx
    from tunix.sft.checkpoint_manager import CheckpointManager

    lines = json.loads(adapter.read_text(encoding="utf-8"))
    known = {"CheckpointManager": CheckpointManager, "model": model, "nnx": nnx, "qwix": qwix}
    known["model"] = eval(lines["model"], known)
    eval(lines["params"], known)
    return known["model"]


def adapted(settings: Path, adapter: Path, given: Path, out: Path) -> None:
    """Writes the logits of the tokens in `given`, of the model with an adapter."""
    model = with_adapter(load(settings), adapter)
    np.savez(out, logits=computed(model, np.load(given)["ids"]))


def train(settings: Path, folder: Path) -> None:
    """Three steps of Tunix' trainer on random tokens; its CheckpointManager saves the last."""
    train_model(load(settings), folder)


def train_adapter(settings: Path, adapter: Path, folder: Path) -> None:
    """The same of an adapter alone: Tunix' trainer trains and saves nothing else then."""
    train_model(with_adapter(load(settings), adapter), folder)


def train_model(model: Any, folder: Path) -> None:
    """Three steps of a model, saved below `folder`."""
    import optax
    from tunix.sft import peft_trainer

    random = np.random.default_rng(4)
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=10 * STEPS,
        max_steps=STEPS,
        checkpoint_root_directory=str((folder / "checkpoints").absolute()),
    )
    trainer = peft_trainer.PeftTrainer(model, optax.adam(LEARNING_RATE), config)
    trainer = trainer.with_gen_model_input_fn(lambda batch: batch)
    batches = [inputs(random.integers(20, 290, (2, 40)).astype(np.int32)) for _ in range(STEPS)]
    trainer.train(batches)
    trainer.close()


def record(original: Path, out: Path) -> None:
    """Writes what Tunix itself makes of the Hugging Face checkpoint `original`."""
    import jax
    from tunix.models.gemma4.params_safetensors import create_model_from_safe_tensors
    from tunix.sft.checkpoint_manager import CheckpointManager

    jax.config.update("jax_default_matmul_precision", "highest")
    config = config_of(original)
    with tempfile.TemporaryDirectory() as folder:
        manager = CheckpointManager(folder)
        manager.save(0, create_model_from_safe_tensors(str(original), config), force=True)
        manager.close()
        arrays = saved(Path(folder, "0", "model_params"))
    content = {
        "original": hashlib.sha256((original / "model.safetensors").read_bytes()).hexdigest(),
        "arrays": {
            name: [array.dtype.name, array.shape, hashlib.sha256(array.tobytes()).hexdigest()[:16]]
            for name, array in sorted(arrays.items())
        },
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    out.with_suffix(".json.gz").write_bytes(gzip.compress(text, mtime=0))
    wide = create_model_from_safe_tensors(str(original), config, dtype=jax.numpy.float32)
    ids = np.random.default_rng(1).integers(80, config.num_embed, RECORDED).astype(np.int32)
    np.savez_compressed(out.with_suffix(".npz"), ids=ids, logits=computed(wide, ids)[..., ::EVERY])


def record_adapter(original: Path, out: Path) -> None:
    """Writes which matrices qwix puts into Tunix' own model of a checkpoint, of which shapes."""
    import qwix
    from flax import nnx
    from tunix.models.gemma4.params_safetensors import create_model_from_safe_tensors
    from tunix.sft.checkpoint_manager import CheckpointManager

    model = create_model_from_safe_tensors(str(original), config_of(original))
    provider = qwix.LoraProvider(module_path="(?!.*moe).*", rank=RANK, alpha=1.0)
    adapted = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **model.get_model_input())
    with tempfile.TemporaryDirectory() as folder:
        manager = CheckpointManager(folder)
        manager.save(0, adapted, save_only_lora_params=True, force=True)
        manager.close()
        arrays = saved(Path(folder, "0", "model_params"))
    shapes = {name: array.shape for name, array in sorted(arrays.items())}
    file = out.with_name(f"{out.name}-adapter.json")
    file.write_text(json.dumps(shapes, separators=(",", ":")) + "\n", encoding="utf-8")


def saved(items: Path) -> dict[str, np.ndarray]:
    """Path → array of an item folder, read by tensorstore."""
    import tensorstore as ts

    entries = json.loads((items / "_METADATA").read_text(encoding="utf-8"))["tree_metadata"]
    base = {"driver": "file", "path": f"{items}/"}
    found = {}
    for entry in entries.values():
        keys = [key["key"] for key in entry["key_metadata"]]
        store = {"driver": "ocdbt", "base": base, "path": f"{'.'.join(keys)}/"}
        array = ts.open({"driver": "zarr", "kvstore": store}, open=True).result()
        found["/".join(keys)] = np.ascontiguousarray(array.read().result())
    return found


def config_of(original: Path) -> Any:
    """Tunix' config of the model in config.json."""
    from tunix.models.gemma4.model import AttentionType, ModelConfig

    content = json.loads((original / "config.json").read_text(encoding="utf-8"))
    text = content.get("text_config", content)
    kinds = {
        "full_attention": AttentionType.GLOBAL,
        "sliding_attention": AttentionType.LOCAL_SLIDING,
    }
    return ModelConfig(
        num_layers=text["num_hidden_layers"],
        num_embed=text["vocab_size"],
        embed_dim=text["hidden_size"],
        hidden_dim=text["intermediate_size"],
        num_heads=text["num_attention_heads"],
        head_dim=text["head_dim"],
        num_kv_heads=text["num_key_value_heads"],
        final_logit_softcap=text["final_logit_softcapping"],
        sliding_window_size=text["sliding_window"],
        per_layer_input_dim=text["hidden_size_per_layer_input"] or 0,
        num_global_kv_heads=text["num_global_key_value_heads"],
        global_key_size=text["global_head_dim"],
        attention_pattern=tuple(kinds[kind] for kind in text["layer_types"]),
        frac_shared_layers=text["num_kv_shared_layers"] / text["num_hidden_layers"],
        k_eq_v_global=text["attention_k_eq_v"],
        override_kv_shared_ffw_hidden=2 * text["intermediate_size"]
        if text["use_double_wide_mlp"]
        else None,
        enable_moe=bool(text["num_experts"]),
        num_experts=text["num_experts"],
        num_experts_per_tok=text["top_k_experts"],
        expert_dim=text["moe_intermediate_size"],
        moe_dense_hidden_dim=text["intermediate_size"] if text["num_experts"] else None,
    )


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    from asked import run

    commands = (logits, train, adapted, train_adapter, record, record_adapter)
    sys.exit(run(sys.argv[1:], *commands))
