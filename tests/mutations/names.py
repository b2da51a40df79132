"""What a logit check is to say of each planted mistake: which parts fail, and what is wrong."""

from __future__ import annotations

import re

import numpy as np
from weights import Tensors

PARTS = {
    r"layers\.(\d+)\.self_attn\.q_(proj|norm)\.": ("queries",),
    r"layers\.(\d+)\.self_attn\.k_(proj|norm)\.": ("keys",),
    r"layers\.(\d+)\.self_attn\.v_proj\.": ("values",),
    r"layers\.(\d+)\.self_attn\.o_proj\.": ("output projection",),
    r"layers\.(\d+)\.mlp\.": ("dense MLP",),
    r"layers\.(\d+)\.experts\.": ("experts",),
    r"layers\.(\d+)\.router\.": ("router",),
    r"layers\.(\d+)\.per_layer_input_gate\.": ("per-layer gate",),
    r"layers\.(\d+)\.per_layer_projection\.": ("per-layer projection",),
    r"layers\.(\d+)\.post_per_layer_input_norm\.": ("norm behind the per-layer input",),
    r"layers\.(\d+)\.layer_scalar": ("output",),
    r"layers\.(\d+)\.input_layernorm\.": ("norm before attention",),
    r"layers\.(\d+)\.post_attention_layernorm\.": ("norm behind attention",),
    r"layers\.(\d+)\.pre_feedforward_layernorm\.": ("norm before the MLP",),
    r"layers\.(\d+)\.post_feedforward_layernorm\.": ("norm behind the MLP",),
    r"layers\.(\d+)\.pre_feedforward_layernorm_2\.": ("norm before the experts",),
    r"layers\.(\d+)\.post_feedforward_layernorm_1\.": ("norm behind the dense MLP",),
    r"layers\.(\d+)\.post_feedforward_layernorm_2\.": ("norm behind the experts",),
    r"embed_tokens\.": ("embedding", "head"),
    r"(embed_tokens_per_layer|per_layer_model_projection|per_layer_projection_norm)\.": (
        "per-layer inputs",
    ),
    r"language_model\.norm\.": ("final norm",),
}
"""Pattern of a Hugging Face tensor's name → the parts that it is in; the head is tied."""

WORDS = {
    "q: (head_dim heads) for (heads head_dim)": "heads and head_dim are exchanged",
    "k: (head_dim kv_heads) for (kv_heads head_dim)": "heads and head_dim are exchanged",
    "v: (head_dim kv_heads) for (kv_heads head_dim)": "heads and head_dim are exchanged",
    "o: (head_dim heads) for (heads head_dim)": "heads and head_dim are exchanged",
    "a key head taken for the next": "heads are shifted by one",
    "K and V exchanged": "keys and values are exchanged",
    "q norm and k norm exchanged": "the weight of the norm of the (keys|queries)",
    "down read in the shape of its transpose": "read in the shape of its transpose",
    "o: a square block transposed": "a square block of it is transposed",
    "gate and up exchanged": "gate and up are exchanged",
    "neighbouring layers exchanged": "(that|those) of layer [01]$",
    "q of the neighbouring layer": "that of layer [01]$",
    "layers of a scan out of order": r"(that|those) of layer \d$",
    "a layer's scalar lost": "scalar is lost",
    "a layer's scalar zero": "scalar is zero",
    "norms around attention exchanged": "the weight of the norm (before|behind) attention",
    "norms around the MLP exchanged": "the weight of the norm (before|behind) the MLP",
    "a norm's weight less one": "too small by one",
    "final norm lost": "its weight is lost",
    "embedding divided by its root again": "(not multiplied|divided) by √embed",
    "embedding scaled twice": "multiplied by √embed|9.381 times",
    "vocabulary shifted by a row": "rows( of the table)? are shifted by one",
    "one bit of one value": r"differs in 1 of \d+ features",
    "one value NaN": "values are not finite",
    "one value's sign": None,
    "a chunk of zeros": "gate, up or down is zero",
    "experts rolled by one": "down kernels are rolled by one",
    "experts' gate and up exchanged": "gate and up are exchanged",
    "experts' gate and up interleaved": "gate and up are interleaved",
    "experts read in the shape of their transpose": "read in the shape of their transpose",
    "router read in the shape of its transpose": "read in the shape of its transpose",
    "router's experts reversed": "experts are in reverse order",
    "router's scale lost": "router's scale is lost",
    "scales of experts lost": "experts' scales are lost",
    "scales of experts rolled": "experts' scales are rolled",
    "norms of the two branches exchanged": "the weight of the norm behind the (dense MLP|experts)",
    "norm before the experts lost": "its weight is lost",
    "key norm of a layer without values lost": "its weight is lost",
    "per-layer embeddings shifted by a layer": "embedding is shifted by a layer",
    "per-layer embeddings: (ple layers) for (layers ple)": "layers and ple are exchanged",
    "their projection shifted by a layer": "projection is shifted by a layer",
    "their norm lost": "its norm has no weight",
    "a layer's input gate of the next layer": "that of layer [01]$",
    "norm behind the per-layer input lost": "its weight is lost",
}
"""Mistake → a pattern of what is said to be wrong; None where that is not known."""


def mistaken_parts(before: Tensors, after: Tensors) -> set[tuple[int | None, str]]:
    """Number of a layer, or None, and part, of all that has other values `after`."""
    found: set[tuple[int | None, str]] = set()
    for name, values in before.items():
        if np.array_equal(values.view(np.uint16), after[name].view(np.uint16)):
            continue
        (match,) = (one for pattern in PARTS if (one := re.search(pattern, name)))
        layer = int(match[1]) if match[0].startswith("layers") else None
        parts = PARTS[match.re.pattern]
        if parts == ("keys",) and "_proj" in name and name.replace("k_", "v_") not in before:
            parts = ("keys", "values")
        found |= {(layer, part) for part in parts}
    return found
