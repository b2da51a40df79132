"""Bytes of a step, against numbers counted by hand, published tensors, and what torch keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod

import models
import pytest

from gemma_convert.flops.attention import Reach
from gemma_convert.flops.count import count
from gemma_convert.flops.memory import memory
from gemma_convert.flops.model import DecoderLayer, Dense, Experts, GroupedQuery, Model
from gemma_convert.flops.source import read_model
from gemma_convert.flops.workload import Workload, decode, prefill, train

LAYER = DecoderLayer(GroupedQuery(6, 3, 5, Reach()), (Dense(13),))
TWO_LAYERS = Model("", vocab=11, embed=7, layers=(LAYER, LAYER))

UNUSED = {
    models.E2B: 16 * 2 * 256 * 1536 + 4 * 2 * 512 * 1536,
    models.E4B: 15 * 2 * 2 * 256 * 2560 + 3 * 2 * 2 * 512 * 2560,
}
"""Keys and values of KV-shared layers: in the files, though no step runs them."""


def whole(model: Model, work: Workload) -> Workload:
    """The step with an image and a sound where the model takes them, so that all weights count."""
    work = replace(work, images=int(model.vision is not None), image_tokens=model.image_tokens)
    return replace(work, sounds=int(model.audio is not None), sound_tokens=25)


def family(folder, **config: object) -> Model:
    (folder / "config.json").write_text(json.dumps(config))
    return read_model(folder)


@pytest.mark.parametrize("name", models.PUBLISHED)
def test_weights_are_all_matrices_and_tables_of_the_published_checkpoint(name):
    """Norms, biases and scalars have fewer than two axes, and are less than a ten-thousandth."""
    shapes = [spec.shape for spec in models.load_tensors(name).values()]
    matrices = sum(prod(shape) for shape in shapes if len(shape) > 1) - UNUSED.get(name, 0)
    assert sum(prod(shape) for shape in shapes if len(shape) < 2) < 1e-4 * matrices
    model = read_model(models.FOLDER / name)
    found = memory(count(model, whole(model, prefill(1, 1000))))
    assert (found.parameters, found.weights) == (matrices, 2 * matrices)
    assert (found.gradients, found.optimizer, found.activations) == (0, 0, None)


@pytest.mark.parametrize(
    ("model_type", "parameters"),
    [
        # Llama 2 7B has 6,738,415,616 parameters, 65 norms of 4,096 among them
        ("llama", 6_738_415_616 - 65 * 4096),
        # Mixtral 8x7B has 46,702,792,704, the same norms among them
        ("mixtral", 46_702_792_704 - 65 * 4096),
        # Gemma 2 2B has 2,614,341,888, four norms of 2,304 in each of 26 layers and one at the end
        ("gemma2", 2_614_341_888 - 105 * 2304),
        # DeepSeek-V3 has 671,026,419,200: norms of 7,168, 1,536 and 512, biases of 58 routers
        ("deepseek_v3", 671_026_419_200 - 123 * 7168 - 61 * (1536 + 512) - 58 * 256),
    ],
)
def test_other_families_have_the_parameters_that_they_are_known_for(
    model_type, parameters, tmp_path
):
    model = family(tmp_path, model_type=model_type)
    assert memory(count(model, decode(1, 9))).parameters == parameters


def test_a_head_of_its_own_is_counted_where_config_json_says_so(tmp_path):
    sizes = {"vocab_size": 1000, "hidden_size": 8}
    tied, own = (
        memory(count(family(tmp_path, model_type="gemma2", tie_word_embeddings=tie, **sizes), step))
        for tie, step in ((True, train(1, 9)), (False, train(1, 9)))
    )
    assert own.parameters - tied.parameters == 1000 * 8


def test_what_a_trained_weight_takes():
    """31B's text has 30,696,013,824 parameters: bf16 with fp32 masters, or fp32 alone."""
    found = count(read_model(models.FOLDER / models.DENSE), train(1, 8))
    mixed, single = memory(found), memory(found, "fp32")
    assert (mixed.weights, mixed.gradients) == (61_392_027_648, 61_392_027_648)
    assert mixed.optimizer == 30_696_013_824 * 12
    assert (single.weights, single.gradients) == (122_784_055_296, 122_784_055_296)
    assert single.optimizer == 30_696_013_824 * 8
    assert mixed.activations == single.activations
    assert mixed.total == 30_696_013_824 * 16 + mixed.activations


def test_frozen_parts_have_weights_alone():
    """31B's vision tower has 569,419,776 parameters, its projector 1152 · 5376."""
    model = read_model(models.FOLDER / models.DENSE)
    work = replace(whole(model, train(1, 600)), frozen=frozenset({"text", "vision"}))
    found = memory(count(model, work))
    assert found.parameters == 30_696_013_824 + 569_419_776 + 1152 * 5376
    assert (found.gradients, found.optimizer) == (2 * 1152 * 5376, 12 * 1152 * 5376)
    trained = memory(count(model, replace(work, frozen=frozenset())))
    assert 0 < found.activations < trained.activations


# Of each of 18 tokens a layer keeps: its input before and after the norm (2·7), q (30), k (15),
# v (15), attention's output (30), o (7), the MLP's input before and after its norm (2·7), gate, up
# and their product (3·13), and its output (7).
KEPT = 18 * (14 + 30 + 15 + 15 + 30 + 7 + 14 + 39 + 7)


def test_activations_by_hand():
    work = train(2, 9)
    found = memory(count(TWO_LAYERS, work))
    assert found.activations == 2 * (2 * KEPT) + 4 * 18 * 11
    again = memory(count(TWO_LAYERS, replace(work, recomputation="full")))
    assert again.activations == 2 * (2 * 18 * 7 + KEPT) + 4 * 18 * 11


def test_only_chosen_experts_keep_something_and_all_have_weights():
    blocks = (Experts(17, 4, 19, shared=23, shared_gate=True),)
    model = Model("", 11, 7, (DecoderLayer(LAYER.mixer, blocks),))
    found = memory(count(model, train(2, 9)))
    attention, experts = 7 * (30 + 15 + 15 + 30), 7 * (17 + 17 * 3 * 19 + 3 * 23 + 1)
    assert found.parameters == 11 * 7 + attention + experts
    kept = 14 + 30 + 15 + 15 + 30 + 7 + 14 + 17 + 4 * 3 * 19 + 7 + 3 * 23 + 1 + 7
    assert found.activations == 2 * 18 * kept + 4 * 18 * 11


def test_torch_keeps_a_third_more_of_a_llama(tmp_path):
    """In bfloat16, with its fused attention: transformers' norms and rotary embedding are float32.

    What is kept in bfloat16 is what the estimate says, but for 5 %.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 1000,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa")).bfloat16()
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(512).reshape(2, 256)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, labels=ids)
    found = {place: one.untyped_storage().nbytes() for place, one in kept.items()}
    found = {place: size for place, size in found.items() if place not in weights}
    half = sum(size for place, size in found.items() if kept[place].dtype == torch.bfloat16)
    estimate = memory(count(family(tmp_path, model_type="llama", **sizes), train(2, 256)))
    assert sum(found.values()) == pytest.approx(1.32 * estimate.activations, rel=0.02)
    assert half == pytest.approx(estimate.activations, rel=0.05)
