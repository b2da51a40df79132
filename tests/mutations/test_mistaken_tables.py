"""A mistake in a mapping table, which `verify` shares: something else finds every one.

First the table's own checks while it is read or planned, then `logit-check` at its default limit,
and where logits cannot see it (towers, keys that nobody reads), the arrays that numpy makes by
hand, without any table. An ordinary run plants every twelfth one, and all of them where
GEMMA_CONVERT_MUTATIONS asks for the report (scripts/mutations.sh).
"""

from __future__ import annotations

import os
import re
import tomllib

import numpy as np
import pytest
from fast_llm_by_hand import fast_llm_tensors
from gemma_jax_by_hand import gemma_jax_tree
from maxtext_by_hand import maxtext_tree
from native_checkpoints import arrays_of, differing
from record import REPORT
from trees import read_safetensors
from tunix_by_hand import tunix_tree

from gemma_convert import GemmaConvertError, SourceError, logit_check, to_native
from gemma_convert.mapping import table
from gemma_convert.model.config import read_architecture

DEPTHS = {"e2b": 10, "26b-a4b": 6, "31b": 12}

INVENTORY = {
    "q: (head_dim heads)": ("q_proj.weight [(heads head_dim)", "q_proj.weight [(head_dim heads)"),
    "k and v: (head_dim kv_heads)": (
        "{kv}_proj.weight [(kv_heads head_dim)",
        "{kv}_proj.weight [(head_dim kv_heads)",
    ),
    "o: (head_dim heads)": ("[embed (heads head_dim)]", "[embed (head_dim heads)]"),
    "k and v crossed": ('kv = ["k", "v"]', 'kv = ["v", "k"]'),
    "gate and up crossed": ('gate_up = ["gate", "up"]', 'gate_up = ["up", "gate"]'),
    "down: axes exchanged": (
        "mlp.down_proj.weight [embed mlp]",
        "mlp.down_proj.weight [mlp embed]",
    ),
    "an unknown axis": ("norm.weight [embed]", "norm.weight [width]"),
}
OF_MIXTURE = {
    "experts: (expert_mlp gate_up)": ("(gate_up expert_mlp)", "(expert_mlp gate_up)"),
    "router: axes exchanged": (
        "router.proj.weight [experts embed]",
        "router.proj.weight [embed experts]",
    ),
}
OF_SMALL = {
    "per-layer embeddings: (ple layers)": ("[ple_vocab (layers ple)]", "[ple_vocab (ple layers)]"),
    "their projection: (ple layers)": ("[(layers ple) embed]", "[(ple layers) embed]"),
}
MAXTEXT = {
    "scale of the embedding lost": (', scale = "embed" }', " }"),
    "embedding scaled by the vocabulary": ('scale = "embed"', 'scale = "vocab"'),
    "final norm scaled": (
        'decoder_norm/scale [embed]" }',
        'decoder_norm/scale [embed]", scale = "embed" }',
    ),
    "gate and up crossed": ('gate_up = ["0", "1"]', 'gate_up = ["1", "0"]'),
    "key and value crossed": ('kv = ["key", "value"]', 'kv = ["value", "key"]'),
    "query: heads and head_dim exchanged": (
        "query/kernel [embed heads head_dim]",
        "query/kernel [embed head_dim heads]",
    ),
    "norm rows crossed": (
        r'(hf = "input_layernorm.weight", +native = ")pre_self(.*\n.*native = ")post_self',
        r"\1post_self\2pre_self",
    ),
    "norms of the feed-forward crossed": (
        r'native = "pre_ffw_norm(.*\n.*native = ")post_ffw_norm',
        r'native = "post_ffw_norm\1pre_ffw_norm',
    ),
    "query norm stored as key norm": (
        "self_attention/query_norm/scale",
        "self_attention/key_norm/scale",
    ),
    "a row left out": (r'  \{ hf = "layer_scalar".*\n', ""),
    "a row twice": (r'(  \{ hf = "layer_scalar".*\n)', r"\1\1"),
    "a row of a name that does not exist": ('hf = "layer_scalar"', 'hf = "layer_scale"'),
    "output read as the per-layer projection": (
        "per_layer_projection/kernel [ple embed]",
        "per_layer_projection/kernel [embed ple]",
    ),
}
MAXTEXT_MIXTURE = {
    "norms of the branches crossed": (
        r"mlp/post_feedforward_layernorm_1/scale(.*\n.*)mlp/post_feedforward_layernorm_2/scale",
        r"mlp/post_feedforward_layernorm_2/scale\1mlp/post_feedforward_layernorm_1/scale",
    ),
    "router's scale stored as the norm before the experts": (
        r"mlp/pre_forward_scale_2(.*\n.*)mlp/pre_feedforward_layernorm_2/scale",
        r"mlp/pre_feedforward_layernorm_2/scale\1mlp/pre_forward_scale_2",
    ),
    "vision: norms crossed": (
        r"pre_attention_norm/scale( \[vit.*\n.*)post_attention_norm/scale( \[vit)",
        r"post_attention_norm/scale\1pre_attention_norm/scale\2",
    ),
}
SCANNED = {
    "stacking axes first": ("after = 1 ", "after = 0 "),
    "stack in the order of positions": ('index = "block position"', 'index = "position block"'),
    "full layers among the sliding ones": ('when = "!sliding", from', 'when = "sliding", from'),
}
GEMMA_JAX = {
    "query: heads and embed exchanged": (
        'q_einsum/w [heads embed head_dim]"',
        'q_einsum/w [embed heads head_dim]"',
    ),
    "kv behind the heads": (
        "kv_einsum/w [kv kv_heads embed head_dim]",
        "kv_einsum/w [kv_heads kv embed head_dim]",
    ),
    "gate_up behind mlp": (
        "mlp2/gating_einsum/w [gate_up mlp embed]",
        "mlp2/gating_einsum/w [mlp gate_up embed]",
    ),
    "norms of the branches crossed": (
        r"pre_ffw2_norm/scale(.*\n.*)post_ffw2_norm/scale",
        r"post_ffw2_norm/scale\1pre_ffw2_norm/scale",
    ),
    "norm of the experts stored as that of the dense branch": (
        r'native = "pre_ffw_norm/scale \[embed\]" \}(.*\n.*)post_ffw1_norm',
        r'native = "post_ffw1_norm/scale [embed]" }\1pre_ffw_norm',
    ),
    "embedding scaled": (
        'input_embedding [vocab embed]" }',
        'input_embedding [vocab embed]", scale = "embed" }',
    ),
    "router: axes exchanged": (
        "router_logits/w [embed experts]",
        "router_logits/w [experts embed]",
    ),
    "a row left out": (r'  \{ hf = "router.scale".*\n', ""),
    "vision: norms crossed": (
        r"pre_attention_norm/scale( \[vit_layers.*\n.*)post_attention_norm/scale( \[vit)",
        r"post_attention_norm/scale\1pre_attention_norm/scale\2",
    ),
    "vision: position axes exchanged": (
        "pos_emb [positions xy vit_embed]",
        "pos_emb [xy positions vit_embed]",
    ),
    "vision: standardization's scale and bias crossed": (
        r"standardize/scale(.*\n.*)standardize/bias",
        r"standardize/bias\1standardize/scale",
    ),
}
GEMMA_JAX_SMALL = {
    "filled with another number": (
        'kv_einsum/w [kv kv_heads embed head_dim]", fill = 0',
        'kv_einsum/w [kv kv_heads embed head_dim]", fill = 1',
    ),
    "vision: bounds of other projections": (
        r"attn/q_einsum/clip_\{bound\}(.*\n.*\n.*)attn/attn_vec_einsum/clip_\{bound\}",
        r"attn/attn_vec_einsum/clip_{bound}\1attn/q_einsum/clip_{bound}",
    ),
    "bounds crossed": (
        'bound = ["input_min", "input_max"',
        'bound = ["input_max", "input_min"',
    ),
    "audio: feed-forwards crossed": (
        r'"fflayer_start/ffn_layer1/kernel((?:.*\n){4}.*)"fflayer_end/ffn_layer1/kernel',
        r'"fflayer_end/ffn_layer1/kernel\1"fflayer_start/ffn_layer1/kernel',
    ),
    "audio: queries and keys crossed": (
        r"self_atten/query/kernel(.*\n.*)self_atten/key/kernel",
        r"self_atten/key/kernel\1self_atten/query/kernel",
    ),
    "audio: heads behind head_dim": (
        "pos_proj/kernel [audio_embed audio_heads audio_head_dim]",
        "pos_proj/kernel [audio_embed audio_head_dim audio_heads]",
    ),
    "audio: convolution's channels exchanged": (
        "[conv_time conv_frequency conv_in conv_out]",
        "[conv_frequency conv_time conv_in conv_out]",
    ),
}
TUNIX = {
    "query: heads and embed exchanged": (
        'q_einsum/w/value [heads embed head_dim]"',
        'q_einsum/w/value [embed heads head_dim]"',
    ),
    "kv behind the heads": (
        "kv_einsum/w/value [kv kv_heads embed head_dim]",
        "kv_einsum/w/value [kv_heads kv embed head_dim]",
    ),
    "gate and up crossed": ('gate_up = ["gate", "up"]', 'gate_up = ["up", "gate"]'),
    "down: axes exchanged": (
        "down_proj/kernel/value [mlp embed]",
        "down_proj/kernel/value [embed mlp]",
    ),
    "experts: gate_up behind their width": (
        "moe/gating_einsum/value [experts gate_up expert_mlp embed]",
        "moe/gating_einsum/value [experts expert_mlp gate_up embed]",
    ),
    "router: axes exchanged": (
        "router_logits/value [embed experts]",
        "router_logits/value [experts embed]",
    ),
    "router's scale stored as the norm before the experts": (
        r"moe/router_scale/value((?:.*\n){2}.*)moe_pre_ffw_norm/scale/value",
        r"moe_pre_ffw_norm/scale/value\1moe/router_scale/value",
    ),
    "norms of the branches crossed": (
        r"dense_post_ffw_norm(.*\n.*)moe_post_ffw_norm",
        r"moe_post_ffw_norm\1dense_post_ffw_norm",
    ),
    "norms around attention crossed": (
        r'"pre_attention_norm(.*\n.*)"post_attention_norm',
        r'"post_attention_norm\1"pre_attention_norm',
    ),
    "query norm stored as key norm": ("attn/_query_norm/scale", "attn/_key_norm/scale"),
    "embedding scaled": (
        'input_embedding/value [vocab embed]" }',
        'input_embedding/value [vocab embed]", scale = "embed" }',
    ),
    "a row left out": (r'  \{ hf = "router.scale".*\n', ""),
    "no leaf below a parameter": ("skip_scale/value [1]", "skip_scale [1]"),
}
TUNIX_SMALL = {
    "filled with another number": (
        'kv_einsum/w/value [kv kv_heads embed head_dim]", fill = 0',
        'kv_einsum/w/value [kv kv_heads embed head_dim]", fill = 1',
    ),
    "per-layer embeddings: layers behind ple": (
        "per_layer_input_embedding/value [ple_vocab layers ple]",
        "per_layer_input_embedding/value [ple_vocab ple layers]",
    ),
    "per-layer gate read as its projection": (
        r"per_layer_input_gate/w/value \[embed ple(.*\n.*)per_layer_projection/w/value \[ple embed",
        r"per_layer_projection/w/value [ple embed\1per_layer_input_gate/w/value [embed ple",
    ),
}
FAST_LLM = {
    "kv behind the heads": ("[(kv kv_heads head_dim) embed]", "[(kv_heads kv head_dim) embed]"),
    "query: head_dim before heads": (
        "query.weight/weights [(heads head_dim) embed]",
        "query.weight/weights [(head_dim heads) embed]",
    ),
    "output: head_dim before heads": ("[embed (heads head_dim)]", "[embed (head_dim heads)]"),
    "gate_up before experts": (
        "[(experts gate_up expert_mlp) embed]",
        "[(gate_up experts expert_mlp) embed]",
    ),
    "experts behind their width": ("[(experts expert_mlp) embed]", "[(expert_mlp experts) embed]"),
    "dense gate_up behind mlp": (
        "dense.layer_1.weight/weights [(gate_up mlp) embed]",
        "dense.layer_1.weight/weights [(mlp gate_up) embed]",
    ),
    "dense down transposed": (
        "dense.layer_2.weight/weights [mlp embed]",
        "dense.layer_2.weight/weights [embed mlp]",
    ),
    "norms around attention crossed": (
        r"norm_1\.weight(.*\n.*)post_mixer_norm\.weight",
        r"post_mixer_norm.weight\1norm_1.weight",
    ),
    "norms of the branches crossed": (
        r"mlp\.dense\.post_norm(.*\n.*)mlp\.routed\.pre_norm",
        r"mlp.routed.pre_norm\1mlp.dense.post_norm",
    ),
    "router's scale stored as a norm": (
        r"routed\.router_scale((?:.*\n){2}.*)routed\.post_norm\.weight",
        r"routed.post_norm.weight\1routed.router_scale",
    ),
    "embedding scaled": (
        'word_embeddings_weight/weights [vocab embed]" }',
        'word_embeddings_weight/weights [vocab embed]", scale = "embed" }',
    ),
}


def cases():
    """(layout, options, family, name, (table, old, new)) of every mistake."""
    everywhere = [
        ("maxtext", {}, "26b-a4b", {**INVENTORY, **OF_MIXTURE}, "huggingface"),
        ("maxtext", {"scan_layers": True}, "31b", INVENTORY, "huggingface"),
        ("maxtext", {}, "e2b", OF_SMALL, "huggingface"),
        ("gemma-jax", {}, "26b-a4b", {**INVENTORY, **OF_MIXTURE}, "huggingface"),
        ("gemma-jax", {}, "e2b", OF_SMALL, "huggingface"),
        ("fast-llm", {}, "26b-a4b", {**INVENTORY, **OF_MIXTURE}, "huggingface"),
        ("maxtext", {}, "e2b", MAXTEXT, "maxtext"),
        ("maxtext", {}, "26b-a4b", MAXTEXT_MIXTURE, "maxtext"),
        ("maxtext", {"scan_layers": True}, "31b", SCANNED, "maxtext"),
        ("gemma-jax", {}, "26b-a4b", GEMMA_JAX, "gemma-jax"),
        ("gemma-jax", {}, "e2b", GEMMA_JAX_SMALL, "gemma-jax"),
        ("fast-llm", {}, "26b-a4b", FAST_LLM, "fast-llm"),
        ("tunix", {}, "26b-a4b", {**INVENTORY, **OF_MIXTURE}, "huggingface"),
        ("tunix", {}, "e2b", OF_SMALL, "huggingface"),
        ("tunix", {}, "26b-a4b", TUNIX, "tunix"),
        ("tunix", {}, "e2b", TUNIX_SMALL, "tunix"),
    ]
    for layout, options, family, mistakes, file in everywhere:
        for name, how in mistakes.items():
            yield layout, options, family, name, (file, *how)


CASES = list(cases())[:: 1 if os.environ.get(REPORT) else 12]


@pytest.fixture
def mistaken(monkeypatch):
    """mistaken(table, old, new): from then on that table has `new` for `old`, text or pattern."""

    def plant(name, old, new):
        file = table.table_file(name)
        text = file.read_text(encoding="utf-8")
        changed = text.replace(old, new, 1) if old in text else re.sub(old, new, text, count=1)
        assert changed != text, f"{file.name} has no {old}"
        read = table.read_toml

        def read_mistaken(path):
            return (tomllib.loads(changed), path.name) if path == file else read(path)

        monkeypatch.setattr(table, "read_toml", read_mistaken)
        forget()

    def forget():
        table.load_table.cache_clear()
        table.load_inventory.cache_clear()

    yield plant
    monkeypatch.undo()
    forget()


def by_hand(source, layout, scanned):
    """The arrays that a conversion should make, those of text at the least."""
    hf, architecture = read_safetensors(source), read_architecture(source)
    if layout == "fast-llm":
        return fast_llm_tensors(hf, architecture)
    if layout == "gemma-jax":
        return gemma_jax_tree(hf, architecture)
    if layout == "tunix":
        return tunix_tree(hf, architecture)
    return maxtext_tree(hf, architecture, scanned) | _maxtext_vision_norms(hf, architecture)


def _maxtext_vision_norms(hf, architecture):
    if architecture.text.ple:
        return {}
    theirs = "model.vision_tower.encoder.layers.{}.{}_layernorm.weight"
    ours = "vision_encoder/Gemma4VisionEncoderLayer_0/layer_{}/{}_attention_norm/scale"
    return {
        ours.format(layer, our_name): hf[theirs.format(layer, their_name)]
        for layer in range(architecture.vision.layers)
        for our_name, their_name in (("pre", "input"), ("post", "post_attention"))
    }


@pytest.mark.parametrize(
    ("layout", "options", "family", "mistake", "how"),
    CASES,
    ids=[
        f"{layout}{'-scanned' if options else ''} {family} {how[0]}: {name}"
        for layout, options, family, name, how in CASES
    ],
)
def test_it_is_found(
    tiny, goldens, caught, mistaken, monkeypatch, tmp_path, layout, options, family, mistake, how
):
    kept = {"kv_shared": "omit"} if "filled" in mistake else {}
    source = tiny(family, layers=DEPTHS[family], **kept)
    golden = goldens(source)
    mistaken(*how)
    try:
        to_native(source, tmp_path / "out", layout=layout, **options)
    except GemmaConvertError as error:
        assert error.exit_code != 4
        return caught("table", layout, mistake, f"the table's checks: {error.what}")
    finally:
        monkeypatch.undo()
        table.load_table.cache_clear()
        table.load_inventory.cache_clear()
    try:
        report = logit_check(source, tmp_path / "out", golden=golden)
    except SourceError as error:
        return caught("table", layout, mistake, f"logit-check: {error.what}")
    if not report.passed:
        return caught("table", layout, mistake, "logit-check", report.divergence.kl_max)
    expected = by_hand(source, layout, bool(options))
    found = arrays_of(tmp_path / "out", layout)
    compared = {name: found[name] for name in expected if name in found}
    assert differing(compared, {name: np.asarray(expected[name]) for name in expected}), "a hole"
    return caught("table", layout, mistake, "arrays made by hand", report.divergence.kl_max)
