"""A mistake in a forward pass: `logit-check` finds every one, says which part and what is wrong.

JAX compiles the model anew for each, so an ordinary run plants every twelfth of those, and every
third of Fast-LLM's; all of them are planted where GEMMA_CONVERT_MUTATIONS asks for the report
(scripts/mutations.sh).
"""

from __future__ import annotations

import os
import re

import pytest
from planting import planted
from record import REPORT, TOKENS

from gemma_convert import logit_check

DEPTHS = {"e2b": 10, "26b-a4b": 6}

ARITHMETIC = {
    "window one too long": ("visible", "key > query - window", "key >= query - window"),
    "window one too short": ("visible", "key > query - window", "key > query - window + 1"),
    "a token sees the next one": ("visible", "key <= query", "key <= query + 1"),
    "rotary: every pair turns": ("rotary", "rope.fraction * head_dim // 2", "head_dim // 2"),
    "rotary: frequencies spread over the turning pairs": (
        "rotary",
        "/ np.float32(head_dim)",
        "/ np.float32(2 * turning)",
    ),
    "rotary: turned the other way": (
        "rotary",
        "first * cosine - second * sine, second * cosine + first * sine",
        "first * cosine + second * sine, second * cosine - first * sine",
    ),
    "rotary: neighbours for halves": (
        "rotary",
        "jnp.split(x.astype(jnp.float32), 2, axis=-1)",
        "(x.astype(jnp.float32)[..., ::2], x.astype(jnp.float32)[..., 1::2])",
    ),
    "norms times one plus their weight": ("rms_norm", "jnp.asarray(scale)", "(1 + scale)"),
    "scores divided by the root of head_dim": (
        "attend",
        "grouped, key, jnp.float32)",
        "grouped, key, jnp.float32) * head_dim**-0.5",
    ),
    "query heads of the wrong groups": (
        "attend",
        "query.reshape(batch, length, kv_heads, -1, head_dim)",
        "query.reshape(batch, length, -1, kv_heads, head_dim).swapaxes(2, 3)",
    ),
    "SiLU for GELU": ("gelu", "jax.nn.gelu(x, approximate=True)", "jax.nn.silu(x)"),
    "soft-cap lost": ("_head", "softcap is None", "True"),
}
DECODER = {
    "every layer has the window": (
        "kind_of",
        "text.window if facts.sliding else None",
        "text.window",
    ),
    "rotary bases exchanged": (
        "kind_of",
        "text.rope_sliding if facts.sliding else text.rope_full",
        "text.rope_full if facts.sliding else text.rope_sliding",
    ),
    "epsilon of the norms": ("kind_of", "text.norm_epsilon", "100 * text.norm_epsilon"),
    "norm of values lost": ("attention", "rms_norm(value, None, kind.norm_epsilon)", "value"),
    "norm of queries lost": (
        "attention",
        '_norm(weights, kind, "query", weights.query(hidden))',
        "weights.query(hidden)",
    ),
    "layers' scalars lost": ("layer", "hidden * weights.scalar().astype(hidden.dtype)", "hidden"),
    "norm behind attention lost": ("layer", 'norm("post_attention", attended)', "attended"),
    "residual taken behind the norm": (
        "layer",
        'hidden = hidden + tap("norm behind attention"',
        'hidden = normed + tap("norm behind attention"',
    ),
}
PER_LAYER = {
    "per-layer embeddings not scaled": (
        "decoder.per_layer_inputs",
        "np.sqrt(text.ple).astype(np.float32)",
        "np.float32(1)",
    ),
    "per-layer inputs without the context": (
        "decoder.per_layer_inputs",
        "(context + token)",
        "token",
    ),
    "per-layer inputs without the token": (
        "decoder.per_layer_inputs",
        "(context + token)",
        "context",
    ),
    "per-layer input of the layer before": (
        "decoder._run_layer",
        "ple[:, :, facts.index]",
        "ple[:, :, facts.index - 1]",
    ),
    "per-layer gate without GELU": (
        "decoder_layer.layer",
        "gelu(weights.per_layer_gate(hidden))",
        "weights.per_layer_gate(hidden)",
    ),
    "shared keys and values of the first layer": (
        "decoder._run_layer",
        "kept[number, facts.kv_source]",
        "kept[number, min(key for _, key in kept)]",
    ),
}
MIXTURE = {
    "router: root lost": ("decoder_layer.router", "hidden.shape[-1] ** -0.5", "1"),
    "router: sees the normed state": (
        "decoder_layer.layer",
        "router(weights, hidden, kind)",
        'router(weights, norm("pre_experts", hidden), kind)',
    ),
    "one expert too few": (
        "arithmetic.routing",
        "probability, experts_per_token)",
        "probability, experts_per_token - 1)",
    ),
    "scales of experts lost": (
        "arithmetic.routing",
        "best * per_expert_scale.astype(jnp.float32)[chosen]",
        "best",
    ),
    "dense branch lost": ("decoder_layer.layer", "dense + sparse", "sparse"),
}
FAST_LLM = {
    "window one too long": ("visible", "back < window", "back <= window"),
    "a token sees the next one": (
        "visible",
        "(back >= 0) & (back < window)",
        "(back >= -1) & (back < window)",
    ),
    "rotary: every pair turns": ("rotate", "rotary.fraction * head_size // 2", "head_size // 2"),
    "rotary: turned the other way": (
        "rotate",
        "first * cosine - second * sine, second * cosine + first * sine",
        "first * cosine + second * sine, second * cosine - first * sine",
    ),
    "values before keys": ("attend", "both.chunk(2, dim=-1)", "both.chunk(2, dim=-1)[::-1]"),
    "norm of values lost": ("attend", "rms_norm(value, facts.value_epsilon)", "value"),
    "up before gate": ("_gated", "gate, up =", "up, gate ="),
    "exact GELU gate left out": ("_gated", 'functional.gelu(gate, approximate="tanh")', "gate"),
    "soft-cap lost": ("FastLLM.head", "logits if softcap is None else", "logits if True else"),
    "layers' scalars lost": ("layer", 'weights["output_scale"].to(hidden.dtype)', "1"),
    "router: scale lost": ("router", "* facts.router_input_scale", ""),
    "scales of experts lost": (
        "router",
        'best * weights["mlp.routed.router_per_expert_scale"].float()[chosen]',
        "best",
    ),
    "norms times one plus their weight": (
        "rms_norm",
        "normed * weight.float()",
        "normed * (1 + weight.float())",
    ),
}

CASES = [
    *[
        (("maxtext", "gemma-jax")[number % 2], "26b-a4b", name, (f"arithmetic.{place}", *text))
        for number, (name, (place, *text)) in enumerate(ARITHMETIC.items())
    ],
    *[
        (("gemma-jax", "maxtext")[number % 2], "26b-a4b", name, (f"decoder_layer.{place}", *text))
        for number, (name, (place, *text)) in enumerate(DECODER.items())
    ],
    *[
        (("maxtext", "gemma-jax")[number % 2], "e2b", name, mistake)
        for number, (name, mistake) in enumerate(PER_LAYER.items())
    ],
    *[
        (("maxtext", "gemma-jax")[number % 2], "26b-a4b", name, mistake)
        for number, (name, mistake) in enumerate(MIXTURE.items())
    ],
    *[
        ("fast-llm", "26b-a4b", name, (f"fast_llm.{place}", *text))
        for name, (place, *text) in FAST_LLM.items()
    ],
]


IN_JAX = [case for case in CASES if case[0] != "fast-llm"]
if not os.environ.get(REPORT):
    CASES = [*IN_JAX[::12], *[case for case in CASES if case[0] == "fast-llm"][::3]]


NORMS = {
    "norm before attention",
    "queries",
    "keys",
    "norm behind attention",
    "norm before the MLP",
    "norm behind the dense MLP",
    "norm before the experts",
    "norm behind the experts",
    "norm behind the MLP",
}
MLPS = {"dense MLP", "experts"}
SAID = {
    "window one too long": ({"attention"}, "window is one token too long"),
    "window one too short": ({"attention"}, "window is one token too short"),
    "a token sees the next one": ({"attention"}, "a token sees the next one"),
    "rotary: every pair turns": ({"attention"}, "every pair of its rotary embedding turns"),
    "rotary: frequencies spread over the turning pairs": ({"attention"}, "over the turning pairs"),
    "rotary: turned the other way": ({"attention"}, "turns the other way"),
    "rotary: neighbours for halves": ({"attention"}, "pairs neighbours instead of halves"),
    "norms times one plus their weight": (
        NORMS | {"router", "final norm"},
        "too large by one",
    ),
    "scores divided by the root of head_dim": ({"attention"}, "divided by the root of head_dim"),
    "query heads of the wrong groups": ({"attention"}, "wrong groups"),
    "SiLU for GELU": (MLPS, "activation is SiLU"),
    "soft-cap lost": ({"head"}, "soft-cap is lost"),
    "every layer has the window": ({"attention"}, "the window of sliding layers"),
    "rotary bases exchanged": ({"attention"}, "rotary embedding of full layers"),
    "epsilon of the norms": (NORMS | {"values", "router"}, "epsilon is 0.0001"),
    "norm of values lost": ({"values"}, "norm of the values is lost"),
    "norm of queries lost": ({"queries"}, "the norm is lost"),
    "layers' scalars lost": ({"output"}, "scalar is lost"),
    "norm behind attention lost": ({"norm behind attention"}, "the norm is lost"),
    "residual taken behind the norm": ({"sum behind attention"}, "taken behind the norm"),
    "per-layer embeddings not scaled": ({"per-layer inputs"}, "not multiplied by √ple"),
    "per-layer inputs without the context": ({"per-layer inputs"}, "projection is lost"),
    "per-layer inputs without the token": ({"per-layer inputs"}, "embedding is lost"),
    "per-layer input of the layer before": ({"per-layer gate"}, r"input of layer \d$"),
    "per-layer gate without GELU": ({"per-layer gate"}, "activation is lost"),
    "shared keys and values of the first layer": ({"attention"}, None),
    "router: root lost": ({"router"}, "√embed is lost"),
    "router: sees the normed state": ({"router"}, "behind the norm before the experts"),
    "one expert too few": ({"router"}, "one expert too few"),
    "scales of experts lost": ({"router"}, "scales are lost"),
    "dense branch lost": ({"sum of both branches"}, "dense branch is lost"),
    "values before keys": ({"keys", "values"}, "keys and values are exchanged"),
    "up before gate": (MLPS, "gate and up are exchanged"),
    "exact GELU gate left out": (MLPS, "activation is lost"),
    "router: scale lost": ({"router"}, "√embed is lost"),
}
"""Mistake → the parts that fail, and a pattern of what is said to be wrong; None: not known."""


def check(tiny, converted, layout, family):
    source = tiny(family, layers=DEPTHS[family])
    return logit_check(source, converted(source, layout), tokens=TOKENS)


@pytest.mark.parametrize(
    ("layout", "family", "mistake", "how"), CASES, ids=[" ".join(case[:3]) for case in CASES]
)
def test_logit_check_finds_it(tiny, converted, caught, layout, family, mistake, how):
    with planted(*how):
        report = check(tiny, converted, layout, family)
    parts, words = SAID[mistake]
    if layout == "fast-llm" and mistake.startswith("norms"):
        parts = parts - {"router"}  # its scale is no norm's weight there
    said = [one.mistake for one in report.local.failed if one.mistake is not None]
    assert not report.passed and {one.part for one in report.local.failed} == parts
    assert bool(said) == (words is not None)
    assert all(re.search(words, one) for one in said), said
    caught("forward", layout, mistake, "logit-check", report.divergence.kl_max)


@pytest.mark.share(2)
@pytest.mark.parametrize(
    ("layout", "family"),
    [
        ("maxtext", "e2b"),
        ("gemma-jax", "e2b"),
        ("maxtext", "26b-a4b"),
        ("gemma-jax", "26b-a4b"),
        ("fast-llm", "26b-a4b"),
    ],
)
def test_without_a_mistake_it_passes(tiny, converted, layout, family):
    assert check(tiny, converted, layout, family).passed
