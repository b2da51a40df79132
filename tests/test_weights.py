"""The made-up weights: trained ones keep rounding small and show mistakes, wild ones amplify it."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gemma_convert import logit_check
from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.tiny import make_tiny
from gemma_convert.tiny.kinds import BLOCK, tensor_bytes, weights_of
from gemma_convert.tiny.tokenizer import FIRST_BYTE

DEPTHS = {"e2b": 10, "26b-a4b": 12, "31b": 12}
NOISE = 1e-6
TEXT = "model.language_model."


@pytest.fixture(scope="module")
def model(tiny):
    """model(family, layers, weights): the transformers model in float32."""
    from transformers import Gemma4ForConditionalGeneration

    @cache
    def load(family, layers, weights="trained"):
        folder = tiny(family, layers=layers, weights=weights)
        return Gemma4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    return load


@torch.no_grad()
def run(loaded, noise=0.0):
    """Hidden states behind embedding, layers and norm, and logits, of one fixed sequence.

    With `noise` of this relative size behind the embedding.
    """
    generator = torch.Generator().manual_seed(1)
    vocab = loaded.config.text_config.vocab_size
    ids = torch.randint(FIRST_BYTE, vocab, (2, 48), generator=generator)

    def noisy(module, given, state):
        return state * (1 + noise * torch.randn(state.shape, generator=generator))

    hook = loaded.model.language_model.embed_tokens.register_forward_hook(noisy)
    try:
        found = loaded(input_ids=ids, output_hidden_states=True)
    finally:
        hook.remove()
    return found.hidden_states, found.logits


def gain(loaded):
    """How many times larger the relative noise is in the last hidden state."""
    exact, moved = run(loaded)[0][-1], run(loaded, NOISE)[0][-1]
    return float((exact - moved).norm() / exact.norm() / NOISE)


def divergence(logits, others):
    """The largest KL of a token."""
    one, other = (torch.log_softmax(given.double(), -1) for given in (logits, others))
    return float((one.exp() * (one - other)).sum(-1).max())


# What a model makes of them


@pytest.mark.parametrize("family", DEPTHS)
def test_trained_ones_keep_states_and_noise_bounded(family, model):
    loaded = model(family, DEPTHS[family])
    assert 1 < gain(loaded) < 12
    states, logits = run(loaded)
    assert all(0.5 < state.square().mean().sqrt() < 2 for state in states[:-1])
    assert 2 < logits.std() < 3.5 and logits.abs().max() < 25


def test_wild_ones_amplify_noise_at_full_depth_and_trained_ones_do_not(model):
    assert gain(model("e2b", 35)) < 20
    assert gain(model("e2b", 35, "wild")) > 500


def swap(first, second):
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


MISTAKES = {
    "gate and up swapped": ("e2b", lambda w: swap(w("8.mlp.gate_proj"), w("8.mlp.up_proj"))),
    "first layer scalar lost": ("31b", lambda w: w("0.layer_scalar").fill_(1)),
    "late layer scalar lost": ("31b", lambda w: w("10.layer_scalar").fill_(1)),
    "neighbours' scalars swapped": (
        "31b",
        lambda w: swap(w("9.layer_scalar"), w("10.layer_scalar")),
    ),
    "a norm lost": ("e2b", lambda w: w("9.pre_feedforward_layernorm").fill_(1)),
    "norms of queries and keys swapped": (
        "31b",
        lambda w: swap(w("9.self_attn.q_norm"), w("9.self_attn.k_norm")),
    ),
    "keys for values": (
        "31b",
        lambda w: w("9.self_attn.v_proj").copy_(w("9.self_attn.k_proj")),
    ),
    "heads swapped": (
        "e2b",
        lambda w: swap(w("3.self_attn.q_proj")[:16], w("3.self_attn.q_proj")[16:32]),
    ),
    "experts swapped": (
        "26b-a4b",
        lambda w: swap(w("10.experts.down_proj")[0], w("10.experts.down_proj")[1]),
    ),
    "router scale lost": ("26b-a4b", lambda w: w("10.router.per_expert_scale").fill_(1)),
    "neighbouring layers swapped": (
        "26b-a4b",
        lambda w: swap(w("9.mlp.down_proj"), w("10.mlp.down_proj")),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.share(1)
def test_mistakes_are_seen_in_trained_ones(mistake, model):
    family, make = MISTAKES[mistake]
    loaded = model(family, DEPTHS[family])
    _, logits = run(loaded)
    layers = loaded.model.language_model.layers
    tensors = dict(layers.named_parameters()) | dict(layers.named_buffers())
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        make(lambda name: tensors[name if name in tensors else f"{name}.weight"])
    found = divergence(logits, run(loaded)[1])
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(kept[name])
    assert found > 1e-4


@pytest.mark.share(3, 1)
@pytest.mark.parametrize(
    ("family", "layout"), [("e2b", "gemma-jax"), ("31b", "maxtext"), ("26b-a4b", "fast-llm")]
)
def test_trained_ones_convert_and_are_checked(family, layout, tiny, converted):
    layers = DEPTHS["e2b"] if family == "e2b" else 6
    source = tiny(family, layers=layers, weights="trained")
    report = logit_check(source, converted(source, layout), tokens=24)
    assert report.passed and 0 < report.divergence.kl_max < 1e-9
    assert report.local.passed and report.limit == 1e-5


# The values


def numbers(kind, name, shape, seed=0):
    spec = TensorSpec("bfloat16", shape)
    stored = b"".join(tensor_bytes(kind, name, spec, seed))
    return np.frombuffer(stored, ml_dtypes.bfloat16).reshape(shape).astype(np.float32)


def test_trained_ones_at_real_widths():
    """Matrices keep the size of their inputs, norms are about one, the key norm divides by √256."""

    def spread(name, *shape):
        return float(numbers("trained", TEXT + name, shape).std())

    assert spread("embed_tokens.weight", 5000, 1536) == pytest.approx(1536**-0.5, rel=0.01)
    assert spread("layers.3.mlp.down_proj.weight", 1536, 6144) == pytest.approx(
        6144**-0.5, rel=0.01
    )
    assert spread("layers.3.experts.down_proj", 4, 2816, 704) == pytest.approx(704**-0.5, rel=0.01)
    norm = numbers("trained", TEXT + "layers.3.input_layernorm.weight", (5376,))
    assert norm.mean() == pytest.approx(1, abs=0.02) and norm.std() == pytest.approx(0.25, abs=0.01)
    assert norm.min() > 0.1
    keys = numbers("trained", TEXT + "layers.3.self_attn.k_norm.weight", (256,))
    assert keys.mean() == pytest.approx(1.5 / 16, rel=0.05)
    scalars = [
        float(numbers("trained", f"{prefix}layers.{layer}.layer_scalar", (1,))[0])
        for prefix in (TEXT, "model.")
        for layer in range(60)
    ]
    assert scalars[:60] == scalars[60:], "the text model alone has the same"
    assert 0.15 < min(scalars) == scalars[0] < 0.2 and scalars[1] > 0.7
    assert 0.9 < max(scalars) < 0.999
    assert all(one != other for one, other in pairwise(scalars[:60]))


def test_wild_ones_are_from_half_to_two():
    values = numbers("wild", "model.layers.0.input_layernorm.weight", (5376,))
    assert 0.5 <= abs(values).min() < 0.51 and 1.98 < abs(values).max() < 2
    assert 0.45 < (values < 0).mean() < 0.55
    scalars = [numbers("wild", f"model.layers.{n}.layer_scalar", (1,))[0] for n in range(60)]
    assert 0.8125 <= min(map(abs, scalars)) < max(map(abs, scalars)) < 0.9375


@pytest.mark.parametrize("kind", ["trained", "wild"])
def test_a_large_tensor_is_streamed_and_none_of_its_parts_are_equal(kind):
    assert all(BLOCK % divisor for divisor in range(2, int(BLOCK**0.5) + 1))
    name, shape = TEXT + "layers.0.experts.gate_up_proj", (5, 1024, 1536)
    spec = TensorSpec("bfloat16", shape)
    pieces = [bytes(piece) for piece in tensor_bytes(kind, name, spec, 3)]
    assert len(pieces) == 4 and max(map(len, pieces)) == 2 * BLOCK
    whole = weights_of(kind, {name: shape}, 3, "bfloat16")[name]
    assert b"".join(pieces) == whole.tobytes()
    rows = whole.view(np.uint16).reshape(-1, 1536)
    assert len({row.tobytes() for row in rows}) == 5 * 1024
    assert b"".join(pieces) != b"".join(tensor_bytes(kind, name, spec, 4))


@pytest.mark.parametrize("kind", ["trained", "wild"])
@pytest.mark.parametrize("family", ["e2b", "12b", "26b-a4b"])
def test_no_two_tensors_are_equal_and_the_seed_decides_every_byte(family, kind, tmp_path):
    first, again = (
        make_tiny(family, tmp_path / name, weights=kind).path / "model.safetensors"
        for name in ("first", "again")
    )
    assert first.read_bytes() == again.read_bytes()
    other = load_file(make_tiny(family, tmp_path / "other", seed=1, weights=kind).path / first.name)
    seen = {}
    for name, tensor in load_file(first).items():
        assert torch.isfinite(tensor).all()
        if tensor.numel() > 4:
            values = tensor.view(torch.int16).numpy().tobytes()
            assert seen.setdefault(values, name) == name
            assert not torch.equal(tensor, other[name])
            assert tensor.unique().numel() > 4, name
        if kind == "trained" and (found := re.search(r"_(min|max)$", name)):
            assert 8 < tensor.item() * (1 if found[1] == "max" else -1) < 24
