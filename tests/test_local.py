"""Every part of a native model by itself: noise does not fail it, and a mistake is where it is."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_convert import logit_check, to_native
from gemma_convert.logits.by_feature import is_by_feature, seen_by_feature, times_by_feature
from gemma_convert.logits.divergence import Divergence, WorstToken
from gemma_convert.logits.limit import choose_limit
from gemma_convert.logits.local import Probe, chosen_tokens
from gemma_convert.logits.other_runs import Calls, OtherRuns, decided, moved
from gemma_convert.logits.part_check import FACTOR, LocalCheck, PartCheck
from gemma_convert.logits.precision import computed_in
from gemma_convert.prompts.text import TokenSequence
from gemma_convert.tiny import make_tiny

MODELS = [
    (layout, model)
    for layout in ("maxtext", "gemma-jax", "fast-llm")
    for model in ("e2b", "e4b", "26b-a4b", "31b")
    if not (layout == "fast-llm" and model in ("e2b", "e4b"))
]


COMMON = {
    "norm before attention",
    "queries",
    "keys",
    "values",
    "attention",
    "output projection",
    "norm behind attention",
    "sum behind attention",
    "norm before the MLP",
    "dense MLP",
    "norm behind the MLP",
    "output",
}
MIXTURE = {
    "norm behind the dense MLP",
    "router",
    "norm before the experts",
    "experts",
    "norm behind the experts",
    "sum of both branches",
}
PER_LAYER = {
    "sum behind the MLP",
    "per-layer gate",
    "per-layer projection",
    "norm behind the per-layer input",
}
EVERY = {
    "31b": COMMON,
    "26b-a4b": COMMON | MIXTURE,
    "e2b": COMMON | PER_LAYER,
    "e4b": COMMON | PER_LAYER,
}


@pytest.mark.each(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("layout", "model"), MODELS)
def test_a_right_conversion_is_within_its_rounding(shallow, converted, layout, model, dtype):
    """In bfloat16 as in float32: the KL is many times larger there, the parts are not."""
    source = shallow(model, text_only=True)
    report = logit_check(source, converted(source, layout), tokens=24, dtype=dtype)
    assert report.passed and report.local.passed
    assert report.local.noise == dtype
    assert report.local.worst.times < FACTOR / 2
    names = [part.name for part in report.local.parts]
    assert names[0] == "the embedding" and names[-2:] == ["the final norm", "the head"]
    of_layers = [part for part in report.local.parts if part.layer is not None]
    layers = max(part.layer for part in of_layers) + 1
    assert [part.layer for part in of_layers] == sorted(part.layer for part in of_layers)
    by_layer = [{one.part for one in of_layers if one.layer == n} for n in range(layers)]
    shared = {"keys", "values"} if model.startswith("e") else set()
    assert all(by_layer[0] - shared <= parts <= EVERY[model] for parts in by_layer)
    assert by_layer[0] == EVERY[model] and len(set(names)) == len(names)
    size = 2.0**-24 if dtype == "float32" else 2.0**-9
    assert all(size <= part.noise < 200 * size for part in report.local.parts)
    assert report.divergence.kl_p99 < 10 * report.noise_floor


def mistaken(source, folder, edits):
    """A copy of a checkpoint with edited tensors, by the end of their names."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, edit in edits.items():
        (found,) = (one for one in tensors if one.endswith(name))
        tensors[found] = edit(tensors[found]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


MISTAKES = {
    "a turned matrix": (
        "layers.1.self_attn.o_proj.weight",
        lambda w: w.flip(0),
        "layer 1, output projection",
        "in reverse order",
    ),
    "a lost scalar": (
        "layers.2.layer_scalar",
        torch.ones_like,
        "layer 2, output",
        "scalar is lost",
    ),
    "a norm off by one": (
        "layers.4.input_layernorm.weight",
        lambda w: w + 1,
        "layer 4, norm before attention",
        "too large by one",
    ),
}


EDITS = {name: edit for name, edit, _, _ in MISTAKES.values()}
NAMED = {part: words for _, _, part, words in MISTAKES.values()}


@pytest.mark.share(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mistakes_are_named_where_they_are_and_nowhere_else(shallow, tmp_path, dtype):
    """Three at once: each part is run on the original's states, whatever is before it."""
    source = shallow("31b", text_only=True)
    wrong = mistaken(source, tmp_path / "wrong", EDITS)
    to_native(wrong, tmp_path / "out", layout="maxtext")
    report = logit_check(source, tmp_path / "out", tokens=24, dtype=dtype)
    assert not report.passed
    assert {one.name for one in report.local.failed} == NAMED.keys()
    assert min(one.times for one in report.local.failed) > 5 * FACTOR
    said = {one.name: one.mistake for one in report.local.failed if one.mistake is not None}
    assert list(said) == list(NAMED)[:2], "the first two stages that fail are looked into"
    assert all(NAMED[part] in mistake for part, mistake in said.items())


def changed(place, value):
    def edit(weight):
        weight[place] = value
        return weight

    return edit


def test_a_large_feature_hides_no_other(shallow, tmp_path):
    """In bfloat16, where its rounding is more than all that the others are."""
    name, words = "layers.0.input_layernorm.weight", "in 1 of 68 features, which are small"
    source = mistaken(shallow("31b", text_only=True), tmp_path / "in", {name: changed(5, 400)})
    wrong = mistaken(source, tmp_path / "wrong", {name: changed(9, 0)})
    for folder, out in ((source, "right"), (wrong, "out")):
        to_native(folder, tmp_path / out, layout="fast-llm")
    right = logit_check(source, tmp_path / "right", tokens=24, dtype="bfloat16").local
    assert right.passed and 1 < right.worst.by_feature < FACTOR / 2
    (failed,) = logit_check(source, tmp_path / "out", tokens=24, dtype="bfloat16").local.failed
    assert failed.name == "layer 0, norm before attention" and words in failed.mistake
    assert failed.error <= FACTOR * failed.noise and failed.times > 10 * FACTOR


def test_features_by_their_own_noise():
    exact = np.array([[1.0, 100.0, 0.0], [-1.0, 100.0, 0.0]])
    rounding = np.array([[0.01, -1.0, 0.0]])
    found = exact + np.array([[0.02, 0.0, 0.01], [0.02, 0.0, -0.01]])
    assert times_by_feature(exact, found, rounding, 2.0**-9) == pytest.approx([2, 0, 1])
    assert times_by_feature(exact, found, rounding * 0, 0.1) == pytest.approx([0.2, 0, np.inf])
    nan = seen_by_feature(
        PartCheck("output", 0, 0.0, 1.0), exact, found * np.nan, rounding, "float32"
    )
    assert not nan.passed
    parts = ["final norm", "norm behind the MLP", "sum behind attention", "output"]
    assert all(map(is_by_feature, parts))
    assert not any(map(is_by_feature, ["output projection", "dense MLP", "embedding", "router"]))


@pytest.mark.share(3, 1)
@pytest.mark.parametrize("layout", ["maxtext", "gemma-jax", "fast-llm"])
def test_what_kl_does_not_see_fails_by_itself(shallow, tmp_path, layout):
    """One per cent of one matrix, in bfloat16's sight too small for its limit of KL."""
    source = shallow("31b", text_only=True)
    edits = {"layers.3.mlp.down_proj.weight": lambda w: (w.float() * 1.02).to(w.dtype)}
    wrong = mistaken(source, tmp_path / "wrong", edits)
    to_native(wrong, tmp_path / "out", layout=layout)
    report = logit_check(source, tmp_path / "out", tokens=24)
    assert [one.name for one in report.local.failed] == ["layer 3, dense MLP"]
    loose = logit_check(source, tmp_path / "out", tokens=24, max_kl=1.0)
    assert loose.divergence.kl_max < 1.0 and not loose.passed


@pytest.mark.share(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lost_factor_is_named(shallow, tmp_path, dtype):
    source = shallow("31b", text_only=True)
    edits = {"layers.3.mlp.down_proj.weight": lambda w: w * 2}
    wrong = mistaken(source, tmp_path / "wrong", edits)
    to_native(wrong, tmp_path / "out", layout="fast-llm")
    (failed,) = logit_check(source, tmp_path / "out", tokens=24, dtype=dtype).local.failed
    assert failed.mistake.startswith("it is 2") and failed.name == "layer 3, dense MLP"


@pytest.mark.each(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_an_original_of_any_dtype_is_checked(tmp_path, stored, dtype):
    make_tiny("31b", tmp_path / "in", layers=6, text_only=True, dtype=stored)
    to_native(tmp_path / "in", tmp_path / "out", layout="fast-llm")
    assert logit_check(tmp_path / "in", tmp_path / "out", tokens=24, dtype=dtype).passed


def test_what_the_original_makes_not_finite_is_said_of_the_original(shallow, tmp_path):
    def broken(weight):
        weight = weight.clone()
        weight[3, 3] = float("nan")
        return weight

    source = mistaken(
        shallow("31b", text_only=True), tmp_path / "in", {"layers.1.mlp.up_proj.weight": broken}
    )
    to_native(source, tmp_path / "out", layout="fast-llm")
    failed = logit_check(source, tmp_path / "out", tokens=24).local.failed
    assert failed[0].name == "layer 1, dense MLP"
    assert failed[0].mistake == "the original itself computes values that are not finite"


def test_the_mistake_that_leaves_least_is_named_however_large_the_error(tiny, tmp_path):
    """In bfloat16 a scalar of a layer further away is as near as that of the next one."""
    source = tiny("31b", text_only=True)
    scalars = {
        int(name.split(".")[-2]): value
        for name, value in load_file(source / "model.safetensors").items()
        if name.endswith("layer_scalar")
    }
    other = max(range(1, 12), key=lambda layer: abs(scalars[layer] / scalars[0]).item())
    wrong = mistaken(
        source, tmp_path / "wrong", {"layers.0.layer_scalar": lambda w: scalars[other].clone()}
    )
    to_native(wrong, tmp_path / "out", layout="fast-llm")
    for dtype in ("float32", "bfloat16"):
        (failed,) = logit_check(source, tmp_path / "out", tokens=24, dtype=dtype).local.failed
        assert failed.mistake == f"the layer's scalar is that of layer {other}"


def noisy(share):
    def edit(weight):
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        return (weight.float() * (1 + share * noise)).to(weight.dtype)

    return edit


def test_what_is_wrong_everywhere_is_not_said_of_a_few(shallow, tmp_path):
    source = shallow("31b", text_only=True)
    edits = {"layers.2.self_attn.o_proj.weight": noisy(0.05)}
    wrong = mistaken(source, tmp_path / "wrong", edits)
    to_native(wrong, tmp_path / "out", layout="fast-llm")
    for dtype in ("float32", "bfloat16"):
        (failed,) = logit_check(source, tmp_path / "out", tokens=24, dtype=dtype).local.failed
        assert failed.name == "layer 2, output projection" and failed.mistake is None


@pytest.mark.share(2)
@pytest.mark.parametrize(
    ("name", "part"),
    [("model.norm.weight", "the final norm"), ("embed_tokens.weight", "the embedding")],
)
def test_what_stands_beside_the_layers_is_a_part_too(shallow, tmp_path, name, part):
    source = shallow("31b", text_only=True)
    wrong = mistaken(source, tmp_path / "wrong", {name: lambda w: w * 1.5})
    to_native(wrong, tmp_path / "out", layout="gemma-jax")
    report = logit_check(source, tmp_path / "out", tokens=24)
    tied = ["the head"] if name.startswith("embed") else []
    assert [one.name for one in report.local.failed] == [part, *tied]


def amplifying(source, folder):
    """A model whose sharp attention makes much of little: rounding moves its tokens visibly."""
    edits = {}
    for name in load_file(source / "model.safetensors"):
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            edits[name] = lambda w: w * 10
    return mistaken(source, folder, edits)


@pytest.fixture(scope="module")
def wild(tiny, tmp_path_factory):
    return amplifying(tiny("31b", text_only=True), tmp_path_factory.mktemp("wild") / "in")


@pytest.mark.share(3, 2)
@pytest.mark.parametrize("layout", ["maxtext", "gemma-jax", "fast-llm"])
def test_a_network_that_amplifies_rounding_passes_and_says_so(wild, converted, layout):
    report = logit_check(wild, converted(wild, layout))
    assert report.divergence.kl_max > 1e-5, "it must be beyond the limit to show anything"
    assert report.passed and report.local.passed and report.limit > 1e-5
    assert "effect of rounding" in report.limit_reason
    if layout == "fast-llm":
        hard = logit_check(wild, converted(wild, layout), max_kl=1e-5)
        assert not hard.passed and hard.local.passed and hard.limit == 1e-5


def test_mistakes_in_it_are_found_all_the_same(wild, tmp_path):
    wrong = mistaken(wild, tmp_path / "wrong", EDITS)
    to_native(wrong, tmp_path / "out", layout="maxtext")
    report = logit_check(wild, tmp_path / "out")
    assert not report.passed
    assert {one.name for one in report.local.failed} == NAMED.keys()


def test_noise_raises_the_limit_by_ten_and_of_single_tokens_by_a_hundred():
    def divergence(kl_max, kl_p99):
        worst = WorstToken("a", 0, 0, None, kl_max)
        return Divergence(100, 0.0, kl_p99, kl_max, worst, 1.0, 1.0, 0.0)

    base = choose_limit(None, "float32", ())
    assert base.above(None) == base and base.above(1e-8) == base
    raised = base.above(1e-3)
    assert (raised.kl, raised.kl_p99) == pytest.approx((0.1, 0.01))
    assert raised.allows(divergence(0.09, 0.009))
    assert not raised.allows(divergence(0.11, 0.009))
    assert not raised.allows(divergence(0.09, 0.011))
    assert not raised.allows(divergence(np.nan, 0.009))
    assert base.allows(divergence(9e-6, 9e-6)) and not base.allows(divergence(1.1e-5, 1e-9))


def test_experts_are_undecided_near_a_tie_alone():
    probabilities = torch.tensor(
        [
            [0.5, 0.3, 0.2, 0.0],
            [0.4, 0.3, 0.2999, 0.0001],
            [1.0, 0.0, 0.0, 0.0],
        ]
    )
    assert decided(probabilities, 2, 0.01).tolist() == [True, False, False]
    assert decided(probabilities, 2, 0.0001).tolist() == [True, True, False]
    assert decided(probabilities[1:2], 2, 0.01).tolist() == [True]  # the clearest always is


def test_what_nothing_is_left_of_moves_no_choice():
    exact = torch.tensor([[0.7, 0.2, 0.1, 0.0], [1.0, 0.0, 0.0, 0.0]])
    other = exact.double().clone()
    assert moved(exact, other, 2) < 1e-6
    other[0, 1] *= 1.5
    assert moved(exact, other, 2) == pytest.approx(np.log(1.5), rel=1e-6)
    other[0, 3] = 0.5  # of no expert that is chosen or next
    assert moved(exact, other, 1) == pytest.approx(np.log(1.5), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_products_are_computed_in_another_precision(dtype):
    layer = torch.nn.Linear(64, 64, bias=False)
    x = torch.randn(5, 64)
    with torch.no_grad():
        with computed_in(dtype):
            found = layer(x)
        assert found.dtype is dtype and layer.weight.dtype is torch.float32
        assert torch.equal(found, x.to(dtype) @ layer.weight.to(dtype).T)
        assert layer(x).dtype is torch.float32


def test_noise_has_the_size_of_the_errors():
    """Relative to each token's state, in any direction, and none where there was no error."""
    errors = [{"embedding": np.array([0.0, 1e-3, 1e-2])}]
    runs = OtherRuns(lambda _: Calls(), Probe({}, "float32", errors=errors), [], 0)
    state = torch.randn(1, 3, 4096) * torch.tensor([1.0, 10.0, 0.1])[None, :, None]
    runs.noisy = [state]
    runs.disturb_embedding()
    moved_by = (runs.noisy[0] - state).norm(dim=-1)[0] / state.norm(dim=-1)[0]
    assert moved_by.tolist() == pytest.approx([0.0, 1e-3, 1e-2], rel=0.05)


def test_noise_is_measured_on_the_shortest():
    def of(*lengths):
        return [TokenSequence(str(n), [1] * n, None) for n in lengths]

    assert chosen_tokens(of(500, 24, 30, 9)) == {1: 24, 2: 30, 3: 9}
    assert chosen_tokens(of(500, 60, 30)) == {2: 30}
    assert chosen_tokens(of(500)) == {0: 64}


def test_a_part_that_is_no_number_never_passes():
    part = PartCheck("keys", 0, float("nan"), 1e-7)
    assert not part.passed and part.times == np.inf
    assert LocalCheck((PartCheck("keys", 1, 1.0, 1e-7), part), "float32").worst is part
