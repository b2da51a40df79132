"""Every count against torch's FlopCounterMode on transformers' model, to the last FLOP.

The models have their published sizes and no memory (fake tensors). Attention is counted dense,
since eager attention computes all pairs and masks them. What remains is work that transformers
does and a count of the model leaves out, or the other way round; each such amount is a function
here, and the equality is exact with it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import models
import pytest

from gemma_convert.flops.config_file import ConfigFile
from gemma_convert.flops.count import count
from gemma_convert.flops.families import families, read_family
from gemma_convert.flops.model import Experts, GatedDelta, Latent
from gemma_convert.flops.source import read_model
from gemma_convert.flops.workload import decode, prefill, train

BATCH, TOKENS = 2, 83

PUBLISHED = {
    "Llama-2-7b": {"model_type": "llama"},
    "Llama-3-8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
    },
    "Mixtral-8x7B": {"model_type": "mixtral"},
    "Qwen3-8B": {
        "model_type": "qwen3",
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
    "Qwen3-30B-A3B": {"model_type": "qwen3_moe", "head_dim": 128, "num_hidden_layers": 48},
    "gemma-2-9b": {
        "model_type": "gemma2",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "gemma-3-27b": {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "sliding_window": 1024,
    },
    "gpt-oss-20b": {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32},
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
    },
    "DeepSeek-V3": {"model_type": "deepseek_v3"},
    "Llama-4-Scout": {"model_type": "llama4_text"},
    "Llama-4-Maverick": {
        "model_type": "llama4_text",
        "num_local_experts": 128,
        "interleave_moe_layer_step": 2,
    },
    "Qwen3-Next-80B-A3B": {"model_type": "qwen3_next"},
}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@contextmanager
def counted():
    """A counter of what runs inside, on fake tensors."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        yield counter


def fake_model(config):
    """transformers' causal model of a configuration; call it under FakeTensorMode."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        config,
        attn_implementation="eager",
        experts_implementation="batched_mm",
        dtype=torch.bfloat16,
    )
    return model.eval()


def forward_flops(config, tokens: int = TOKENS) -> int:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model, ids = fake_model(config), torch.zeros(BATCH, tokens, dtype=torch.long)
        with counted() as counter, torch.no_grad():
            model(input_ids=ids, use_cache=False)
    return counter.get_total_flops()


def transformers_config(values: dict):
    from transformers import AutoConfig

    return AutoConfig.for_model(**values)


def described(values: dict):
    """Our model of the same keys, and no others: what is left out is up to the description."""
    config = ConfigFile(values, Path("config.json"))
    return read_family(config, families()[values["model_type"]])


def idle_experts(model, tokens: int = TOKENS) -> int:
    """Llama 4 runs every expert on every token, those that are not chosen on zeros."""
    if model.family != "llama4_text":
        return 0
    blocks = [block for layer in model.layers for block in layer.feed_forward]
    return sum(
        (block.experts - block.active) * 6 * BATCH * tokens * model.embed * block.expert_mlp
        for block in blocks
        if isinstance(block, Experts)
    )


def convolution_tail(model) -> int:
    """The causal convolution runs over kernel − 1 positions behind the end, and cuts them off."""
    return sum(
        2
        * BATCH
        * (mixer.kernel - 1)
        * mixer.kernel
        * (2 * mixer.k_heads * mixer.k_dim + mixer.v_heads * mixer.v_dim)
        for mixer in (layer.mixer for layer in model.layers)
        if isinstance(mixer, GatedDelta)
    )


def triangular_systems(model) -> int:
    """torch counts no FLOPs for solve_triangular; dense, it is a product with the whole matrix."""
    chunks = -(-TOKENS // 64)
    return sum(
        2 * BATCH * mixer.v_heads * chunks * 64 * 64 * (mixer.k_dim + mixer.v_dim)
        for mixer in (layer.mixer for layer in model.layers)
        if isinstance(mixer, GatedDelta)
    )


@pytest.mark.share(5)
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_family_equals_the_counter(name):
    values = {"num_hidden_layers": 13} | PUBLISHED[name]
    values["num_hidden_layers"] = min(values["num_hidden_layers"], 13)
    config = transformers_config(values)
    model = described(values)
    found = count(model, replace(prefill(BATCH, TOKENS), rule="dense")).total
    extra = idle_experts(model) + convolution_tail(model)
    assert forward_flops(config) == found + extra - triangular_systems(model)


def gemma4_text(name: str):
    """transformers' text configuration of a published Gemma 4."""
    return transformers_config(models.load_config(name)["text_config"])


TEXT_MODELS = [name for name in models.PUBLISHED if name != models.UNIFIED]
"""12B's text is counted beside its embedders, on a tiny model: test_flops_towers.py."""


@pytest.mark.share(4, 2)
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_gemma4_text_equals_the_counter(name):
    found = count(read_model(models.FOLDER / name), replace(prefill(BATCH, TOKENS), rule="dense"))
    assert forward_flops(gemma4_text(name)) == found.total


def step_flops(config, cached: int) -> int:
    """FLOPs of one token of each sequence behind a cache."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import DynamicCache

    with FakeTensorMode(), torch.no_grad():
        model, cache = fake_model(config), DynamicCache(config=config)
        model(input_ids=torch.zeros(BATCH, cached, dtype=torch.long), past_key_values=cache)
        with counted() as counter:
            model(input_ids=torch.zeros(BATCH, 1, dtype=torch.long), past_key_values=cache)
    return counter.get_total_flops()


def expanded_cache(model, cached: int) -> int:
    """transformers expands the whole latent cache, and attends in the expanded channels."""
    found = 0
    for mixer in (layer.mixer for layer in model.layers):
        if isinstance(mixer, Latent):
            expansion = mixer.kv_rank * (mixer.plain + mixer.value_dim) * cached
            attended = mixer.plain + mixer.rotated + mixer.value_dim
            latent = 2 * mixer.kv_rank + mixer.rotated
            found += 2 * BATCH * mixer.heads * (expansion + (attended - latent) * (cached + 1))
    return found


def recurrent_steps(model) -> int:
    """transformers writes a step of the delta rule as elementwise products and sums."""
    return sum(
        6 * BATCH * mixer.v_heads * mixer.k_dim * mixer.v_dim
        for mixer in (layer.mixer for layer in model.layers)
        if isinstance(mixer, GatedDelta)
    )


def convolution_head(model) -> int:
    """The convolution of a step also runs over the position before the new one."""
    return sum(
        2 * BATCH * mixer.kernel * (2 * mixer.k_heads * mixer.k_dim + mixer.v_heads * mixer.v_dim)
        for mixer in (layer.mixer for layer in model.layers)
        if isinstance(mixer, GatedDelta)
    )


SHORT_REACH = {
    "Mixtral-8x7B": {"sliding_window": 50},
    "Qwen3-8B": {"sliding_window": 50, "use_sliding_window": True, "max_window_layers": 3},
    "Qwen3-30B-A3B": {"sliding_window": 50, "use_sliding_window": True},
    "gemma-2-9b": {"sliding_window": 50},
    "gemma-3-27b": {"sliding_window": 50},
    "gpt-oss-20b": {"sliding_window": 50},
    "Llama-4-Scout": {"attention_chunk_size": 50},
}
"""Windows and chunks shorter than the cache."""


@pytest.mark.share(5, 1)
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_decode_step_equals_the_counter(name):
    values = PUBLISHED[name] | {"num_hidden_layers": 7} | SHORT_REACH.get(name, {})
    model = described(values)
    found = count(model, replace(decode(BATCH, TOKENS), rule="dense")).total
    extra = expanded_cache(model, TOKENS) + idle_experts(model, tokens=1)
    extra += convolution_head(model) - recurrent_steps(model)
    assert step_flops(transformers_config(values), TOKENS) == found + extra


@pytest.mark.share(2)
@pytest.mark.parametrize("name", ["gemma-4-E2B-it", "gemma-4-26B-A4B-it"])
def test_a_decode_step_of_gemma4_equals_the_counter(name):
    longer_than_the_window = 1500
    found = count(read_model(models.FOLDER / name), decode(BATCH, longer_than_the_window)).total
    assert step_flops(gemma4_text(name), longer_than_the_window) == found


def step_of_training(config, recomputed: bool = False) -> int:
    """FLOPs of a forward and a backward pass."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.checkpoint import set_checkpoint_early_stop

    with FakeTensorMode(), set_checkpoint_early_stop(False):
        model, ids = fake_model(config).train(), torch.zeros(BATCH, TOKENS, dtype=torch.long)
        if recomputed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with counted() as counter:
            model(input_ids=ids, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


TRAINED = [name for name in PUBLISHED if "Next" not in name]
"""Not Qwen3-Next: torch has no FLOPs of its own for a triangular system's backward pass."""


@pytest.mark.share(5, 2)
@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_equals_the_counter(name):
    values = PUBLISHED[name] | {"num_hidden_layers": 3}
    model = described(values)
    found = count(model, replace(train(BATCH, TOKENS), rule="dense")).total
    assert step_of_training(transformers_config(values)) == found + 3 * idle_experts(model)


@pytest.mark.share(2, 1)
@pytest.mark.parametrize(("family", "recomputation"), [("e2b", "full"), ("26b-a4b", "none")])
def test_a_training_step_of_gemma4_equals_the_counter(family, recomputation, tiny):
    folder = tiny(family, layers=10 if family == "e2b" else 6)
    values = json.loads((folder / "config.json").read_text())["text_config"]
    work = replace(train(BATCH, TOKENS), rule="dense", recomputation=recomputation)
    found = count(replace(read_model(folder), vision=None, audio=None), work)
    recomputed = recomputation == "full"
    assert step_of_training(transformers_config(values), recomputed) == found.hardware
    assert (found.hardware > found.total) == recomputed
