"""Closed forms of MaxText's pull requests 3592 and 3904 and of an MFU audit, written out here.

Sizes are typed in from the published configs, and formulas from their sources, so that nothing of
the counter but its total is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import models
import pytest

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.flops.attention import Reach
from gemma_convert.flops.count import count
from gemma_convert.flops.model import DecoderLayer, Dense, GroupedQuery, Model
from gemma_convert.flops.source import read_model
from gemma_convert.flops.workload import prefill, train

VOCAB = 262144
BATCH = 3


@dataclass(frozen=True)
class Sizes:
    folder: str
    layers: int
    period: int
    embed: int
    heads: int
    kv_heads: int
    full_kv_heads: int
    mlp: int
    window: int
    shared: int = 0
    double_wide: bool = False
    key_as_value: bool = False
    ple: int = 0
    experts: int = 0
    active: int = 0
    expert_mlp: int = 0


E2B = Sizes(models.E2B, 35, 5, 1536, 8, 1, 1, 6144, 512, 20, double_wide=True, ple=256)
E4B = Sizes(models.E4B, 42, 6, 2560, 8, 2, 2, 10240, 512, 18, ple=256)
A4B = Sizes(
    models.A4B,
    *(30, 6, 2816, 16, 8, 2, 2112, 1024),
    key_as_value=True,
    experts=128,
    active=8,
    expert_mlp=704,
)
DENSE = Sizes(models.DENSE, 60, 6, 5376, 32, 16, 4, 21504, 1024, key_as_value=True)

CASES = [(E2B, 2048), (E4B, 2048), (A4B, 8192), (DENSE, 8192), (E2B, 300), (DENSE, 1024)]


def closed_form(one: Sizes, tokens: int) -> int:
    """The forward pass by the pull requests' formulas; three times it is a training step."""
    embed, total = one.embed, 0
    for layer in range(one.layers):
        full = (layer + 1) % one.period == 0
        shared = layer >= one.layers - one.shared
        head_dim = 512 if full else 256
        kv_heads = one.full_kv_heads if full else one.kv_heads
        window = tokens if full else min(one.window, tokens)
        attention = 4 * (tokens * window - window**2 / 2) * one.heads * head_dim
        assert attention == int(attention)
        copies = 0 if shared else 1 if full and one.key_as_value else 2
        projections = 2 * tokens * embed * (one.heads + copies * kv_heads) * head_dim
        out = 2 * tokens * embed * one.heads * head_dim
        mlp = 2 * one.mlp if shared and one.double_wide else one.mlp
        total += int(attention) + projections + out + 6 * tokens * embed * mlp
        if one.experts:
            total += 2 * tokens * embed * one.experts
            total += one.active * 6 * tokens * embed * one.expert_mlp
        total += 2 * tokens * embed * one.ple + 2 * tokens * one.ple * embed
    total += 2 * tokens * embed * one.layers * one.ple
    return BATCH * (total + 2 * tokens * embed * VOCAB)


@pytest.mark.parametrize(("one", "tokens"), CASES)
def test_the_pull_requests_formulas(one, tokens):
    model = read_model(models.FOLDER / one.folder)
    work = replace(train(BATCH, tokens), rule="customary")
    assert count(model, work).total == 3 * closed_form(one, tokens)
    assert count(model, replace(prefill(BATCH, tokens), rule="customary")).total == closed_form(
        one, tokens
    )


@pytest.mark.parametrize(("one", "tokens"), CASES)
def test_exact_is_above_customary_by_half_the_diagonal(one, tokens):
    """A full layer by T/2 pairs and a sliding one by W/2, in scores and in values."""
    full = one.layers // one.period
    window = min(one.window, tokens)
    channels = one.heads * (full * 512 * tokens + (one.layers - full) * 256 * window)
    exact = count(read_model(models.FOLDER / one.folder), train(BATCH, tokens)).total
    assert exact - 3 * closed_form(one, tokens) == 3 * BATCH * 2 * channels


@pytest.mark.parametrize("one", [E2B, A4B])
def test_the_vision_scaling(one):
    """Patch embedding, layers and projector for n · pooling² patches; three times in training.

    The pixels have no gradient, so that the exact count has the patch embedding twice.
    """
    vision = models.load_architecture(one.folder).vision
    soft, images = 280, 2
    patches = 9 * soft
    heads = vision.heads * vision.head_dim
    embedding = 2 * patches * (3 * 16 * 16) * vision.embed
    layer = 4 * 2 * patches * vision.embed * heads + 4 * patches**2 * heads
    layer += 3 * 2 * patches * vision.embed * vision.mlp
    whole = embedding + vision.layers * layer + 2 * soft * vision.embed * one.embed
    model = read_model(models.FOLDER / one.folder)
    step = train(BATCH, 1000)
    seeing = replace(step, images=images, image_tokens=soft)
    seen = count(model, seeing).total - count(model, step).total
    assert seen == BATCH * images * (3 * whole - embedding)
    frozen = replace(seeing, frozen=frozenset({"vision", "vision-projector"}))
    assert count(model, frozen).total - count(model, step).total == BATCH * images * whole


@pytest.mark.parametrize("one", [E2B, E4B, A4B, DENSE])
def test_weights_meet_every_token_once(one):
    """Without attention a forward pass is two FLOPs for each weight of a matrix and each token."""
    tensors = models.load_tensors(one.folder)
    weights = 0
    for name, tensor in tensors.items():
        lookup = "embed_tokens_per_layer" in name
        text = "language_model" in name and not lookup
        if not text or len(tensor.shape) < 2:
            continue
        size = math.prod(tensor.shape)
        weights += size * one.active // one.experts if ".experts." in name else size
    found = count(read_model(models.FOLDER / one.folder), prefill(1, 1000))
    pairs = sum(one.operation.flops for one in found.operations if not one.operation.weighted)
    assert found.total - pairs == 2 * 1000 * (weights - unused(one, tensors))


def unused(one: Sizes, tensors: Mapping[str, TensorSpec]) -> int:
    """Weights that are stored for KV-shared layers and never used."""
    layers = range(one.layers - one.shared, one.layers)
    return sum(
        math.prod(tensors[name].shape)
        for layer in layers
        for kind in ("k", "v")
        if (name := f"model.language_model.layers.{layer}.self_attn.{kind}_proj.weight") in tensors
    )


def decoder(heads: int, kv_heads: int, head_dim: int, vocab: int) -> Model:
    mixer = GroupedQuery(heads, kv_heads, head_dim, Reach())
    return Model("", vocab, heads * head_dim, (DecoderLayer(mixer, (Dense(3072),)),))


def parts(model: Model, length: int) -> dict[str, int]:
    found = count(model, replace(prefill(1, length), rule="dense")).components
    return {name: flops for (_, name), flops in found.items()}


class TestAudit:
    """The mistakes that the audit corrected, each made here beside the count without it."""

    LENGTH, HEADS, HEAD_DIM, VOCAB = 2048, 16, 128, 151643

    def test_the_attention_term_has_no_heads_over_two(self):
        found = parts(decoder(self.HEADS, self.HEADS, self.HEAD_DIM, self.VOCAB), self.LENGTH)
        embed = self.HEADS * self.HEAD_DIM
        right = 2 * self.LENGTH**2 * embed
        mistake = right * self.HEADS // 2
        assert found["attention scores"] == found["attention values"] == right != mistake

    @pytest.mark.parametrize("group", [1, 2, 8, 16])
    def test_grouped_queries_have_smaller_projections(self, group):
        """2·S·E²·(2 + 2/G), not the formula for as many KV heads as query heads.

        For G = 8 that is 4.5·S·E², against 8 with all four projections of full width: 78 % too
        high. A formula of 6·S·E², without the output projection, is 33 % too high; the audit's
        "77 %" beside it mixes the two.
        """
        model = decoder(self.HEADS, self.HEADS // group, self.HEAD_DIM, self.VOCAB)
        found, embed = parts(model, self.LENGTH), self.HEADS * self.HEAD_DIM
        projections = sum(found[f"{name} projection"] for name in "qkvo")
        right = 2 * self.LENGTH * embed**2 * (2 * group + 2) // group
        assert projections == right
        assert (projections == 8 * self.LENGTH * embed**2) == (group == 1)
        if group == 8:
            assert 8 * self.LENGTH * embed**2 / projections == pytest.approx(16 / 9)
            assert 6 * self.LENGTH * embed**2 / projections == pytest.approx(4 / 3)

    def test_the_vocabulary_is_there(self):
        """2·2048·2048·151643 is 1.27 TFLOP; the audit prints GFLOP."""
        found = parts(decoder(self.HEADS, 2, self.HEAD_DIM, self.VOCAB), self.LENGTH)
        assert found["vocabulary"] == 2 * 2048 * 2048 * 151643
        assert round(found["vocabulary"] / 10**12, 2) == 1.27
