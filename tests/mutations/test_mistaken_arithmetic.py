"""A mistake in a forward pass: `logit-check` finds every one at its default limit.

JAX compiles the model anew for each, so an ordinary run plants every twelfth of those; all of them
are planted where GEMMA_CONVERT_MUTATIONS asks for the report (scripts/mutations.sh).
"""

from __future__ import annotations

import os

import pytest
from planting import planted
from record import REPORT

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
        "per_layer_inputs",
        "np.sqrt(text.ple).astype(np.float32)",
        "np.float32(1)",
    ),
    "per-layer inputs without the context": ("per_layer_inputs", "(context + token)", "token"),
    "per-layer inputs without the token": ("per_layer_inputs", "(context + token)", "context"),
    "per-layer input of the layer before": (
        "_run_layer",
        "ple[:, :, facts.index]",
        "ple[:, :, facts.index - 1]",
    ),
    "per-layer gate without GELU": (
        "layer",
        "gelu(weights.per_layer_gate(hidden))",
        "weights.per_layer_gate(hidden)",
    ),
    "shared keys and values of the first layer": (
        "_run_layer",
        "kept[number, facts.kv_source]",
        "kept[number, min(key for _, key in kept)]",
    ),
}
MIXTURE = {
    "router: root lost": ("decoder.router", "hidden.shape[-1] ** -0.5", "1"),
    "router: sees the normed state": (
        "decoder.layer",
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
    "dense branch lost": ("decoder.layer", "dense + sparse", "sparse"),
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
        (("gemma-jax", "maxtext")[number % 2], "26b-a4b", name, (f"decoder.{place}", *text))
        for number, (name, (place, *text)) in enumerate(DECODER.items())
    ],
    *[
        (("maxtext", "gemma-jax")[number % 2], "e2b", name, (f"decoder.{place}", *text))
        for number, (name, (place, *text)) in enumerate(PER_LAYER.items())
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
    CASES = [case for case in CASES if case[0] == "fast-llm" or case in IN_JAX[::12]]


def check(tiny, converted, goldens, layout, family):
    source = tiny(family, layers=DEPTHS[family])
    return logit_check(source, converted(source, layout), golden=goldens(source))


@pytest.mark.parametrize(
    ("layout", "family", "mistake", "how"), CASES, ids=[" ".join(case[:3]) for case in CASES]
)
def test_logit_check_finds_it(tiny, converted, goldens, caught, layout, family, mistake, how):
    with planted(*how):
        report = check(tiny, converted, goldens, layout, family)
    assert not report.passed
    caught("forward", layout, mistake, "logit-check", report.divergence.kl_max)


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
def test_without_a_mistake_it_passes(tiny, converted, goldens, layout, family):
    assert check(tiny, converted, goldens, layout, family).passed
