"""Small Gemma 4 models of transformers, and MaxText trees of them built by plain numpy.

Written apart from the package: no mapping table, no store of ours, so that both can be compared
with it. All sizes differ and none is square.
"""

import json
from pathlib import Path

import numpy as np

PERIOD = 3
KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 1_000_000.0,
        "partial_rotary_factor": 0.25,
    },
}
COMMON = {
    "vocab_size": 94,
    "num_hidden_layers": 6,
    "layer_types": KINDS * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "global_head_dim": 16,
    "sliding_window": 7,
    "final_logit_softcapping": 4.0,
    "max_position_embeddings": 256,
    "rope_parameters": ROPE,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 94,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
CONFIGS = {
    "dense": COMMON
    | {
        "hidden_size": 40,
        "intermediate_size": 52,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "moe": COMMON
    | {
        "hidden_size": 44,
        "intermediate_size": 36,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 5,
        "top_k_experts": 2,
        "moe_intermediate_size": 20,
    },
    "ple": COMMON
    | {
        "hidden_size": 38,
        "intermediate_size": 26,
        "num_hidden_layers": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 6,
    },
}


def make_model(kind, seed=0):
    """A Gemma4ForCausalLM with random weights: no norm, scalar or scale is near 1."""
    import torch
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(seed)
    config = Gemma4TextConfig(**CONFIGS[kind])
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = Gemma4ForCausalLM(config).float().eval()
    scalars = [buffer for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]
    assert len(scalars) == config.num_hidden_layers
    with torch.no_grad():
        for parameter in [*model.parameters(), *scalars]:
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape))
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def save_model(model, folder, dtype=None):
    """The model as a Hugging Face checkpoint."""
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder)
    return folder


def logits_of(model, ids):
    """transformers' own logits [batch length vocab] in float32."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits.float().numpy()


def maxtext_tree(model, scanned=False):
    """The nested dict below params/params that MaxText has for `model`, float32."""
    config = model.config
    weights = {
        name.removeprefix("model."): value.float().numpy()
        for name, value in model.state_dict().items()
    }
    layers = [_layer(weights, config, index) for index in range(config.num_hidden_layers)]
    decoder = {"decoder_norm": {"scale": weights["norm.weight"]}}
    if config.hidden_size_per_layer_input:
        decoder["per_layer_embedder"] = {
            "embed_tokens_per_layer": weights["embed_tokens_per_layer.weight"],
            "per_layer_model_projection": {
                "kernel": weights["per_layer_model_projection.weight"].T
            },
            "per_layer_projection_norm": {"scale": weights["per_layer_projection_norm.weight"]},
        }
    if scanned:
        decoder["scanned_blocks"] = _scanned(layers)
    else:
        decoder |= {f"layers_{index}": layer for index, layer in enumerate(layers)}
    factor = np.float32(np.sqrt(config.hidden_size))
    embedding = weights["embed_tokens.weight"] * factor
    return {"token_embedder": {"embedding": embedding}, "decoder": decoder}


def _layer(weights, config, index):
    prefix = f"layers.{index}."
    own = {name.removeprefix(prefix): value for name, value in weights.items() if prefix in name}
    heads = config.num_attention_heads
    attention = {
        "query": {"kernel": _split_heads(own["self_attn.q_proj.weight"], heads)},
        "query_norm": {"scale": own["self_attn.q_norm.weight"]},
        "out": {"kernel": own["self_attn.o_proj.weight"].T.reshape(heads, -1, config.hidden_size)},
    }
    if "self_attn.k_proj.weight" in own:
        head_dim = len(own["self_attn.k_norm.weight"])
        kv_heads = len(own["self_attn.k_proj.weight"]) // head_dim
        attention["key"] = {"kernel": _split_heads(own["self_attn.k_proj.weight"], kv_heads)}
        attention["key_norm"] = {"scale": own["self_attn.k_norm.weight"]}
        if "self_attn.v_proj.weight" in own:
            attention["value"] = {"kernel": _split_heads(own["self_attn.v_proj.weight"], kv_heads)}
    layer = {
        "self_attention": attention,
        "pre_self_attention_norm": {"scale": own["input_layernorm.weight"]},
        "post_self_attention_norm": {"scale": own["post_attention_layernorm.weight"]},
        "pre_ffw_norm": {"scale": own["pre_feedforward_layernorm.weight"]},
        "post_ffw_norm": {"scale": own["post_feedforward_layernorm.weight"]},
        "layer_scalar": own["layer_scalar"],
        "mlp": _feed_forward(own),
    }
    if "per_layer_input_gate.weight" in own:
        layer["per_layer_input_gate"] = {"kernel": own["per_layer_input_gate.weight"].T}
        layer["per_layer_projection"] = {"kernel": own["per_layer_projection.weight"].T}
        layer["post_per_layer_input_norm"] = {"scale": own["post_per_layer_input_norm.weight"]}
    return layer


def _split_heads(weight, heads):
    """[(heads head_dim) embed] -> [embed heads head_dim]."""
    rows, embed = weight.shape
    out = np.empty((embed, heads, rows // heads), weight.dtype)
    for head in range(heads):
        for place in range(rows // heads):
            out[:, head, place] = weight[head * (rows // heads) + place]
    return out


def _feed_forward(own):
    dense = {
        "wi_0": {"kernel": own["mlp.gate_proj.weight"].T},
        "wi_1": {"kernel": own["mlp.up_proj.weight"].T},
        "wo": {"kernel": own["mlp.down_proj.weight"].T},
    }
    if "router.scale" not in own:
        return dense
    gate_up = own["experts.gate_up_proj"]
    width = gate_up.shape[1] // 2
    routed = {
        "wi_0": np.stack([expert[:width].T for expert in gate_up]),
        "wi_1": np.stack([expert[width:].T for expert in gate_up]),
        "wo": np.stack([expert.T for expert in own["experts.down_proj"]]),
        "gate": {"kernel": own["router.proj.weight"].T},
        "per_expert_scale": own["router.per_expert_scale"],
    }
    return {
        "moe_block": {"MoeBlock_0": routed, "shared_experts": dense},
        "pre_forward_scale_2": own["router.scale"],
        "pre_feedforward_layernorm_2": {"scale": own["pre_feedforward_layernorm_2.weight"]},
        "post_feedforward_layernorm_1": {"scale": own["post_feedforward_layernorm_1.weight"]},
        "post_feedforward_layernorm_2": {"scale": own["post_feedforward_layernorm_2.weight"]},
    }


def _scanned(layers):
    """Blocks of PERIOD layers: scan axes after the first axis of every array."""
    blocks = [layers[start : start + PERIOD] for start in range(0, len(layers), PERIOD)]
    local = _stack([_stack(block[:-1]) for block in blocks])
    return {"local_layers": local, "global_layer": _stack([block[-1] for block in blocks])}


def _stack(trees):
    first = trees[0]
    if isinstance(first, dict):
        return {name: _stack([tree[name] for tree in trees]) for name in first}
    return np.stack(trees, axis=1)


def write_maxtext(tree, folder, step=0, rest=None):
    """The tree as an Orbax checkpoint in `folder`, written by Orbax; returns `folder`."""
    import orbax.checkpoint as ocp

    content = {"params": {"params": tree}} | (rest or {})
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(Path(folder).resolve() / str(step) / "items", content)
    return folder


def change(tree, path, function):
    """A copy of the tree with the array at `path` (slashes) replaced by `function` of it."""
    name, _, below = path.partition("/")
    new = function(tree[name]) if not below else change(tree[name], below, function)
    return tree | {name: new}


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def facts_for_maxtext(folder):
    """MaxText's key → value of what layers of this Hugging Face checkpoint compute with."""
    config = config_of(folder)
    text = config.get("text_config", config)
    sliding, full = (text["rope_parameters"][f"{kind}_attention"] for kind in ("sliding", "full"))
    chosen = {"num_experts_per_tok": text["top_k_experts"]} if text.get("top_k_experts") else {}
    return {
        "sliding_window_size": text["sliding_window"],
        "final_logits_soft_cap": text["final_logit_softcapping"] or 0.0,
        "normalization_layer_epsilon": text["rms_norm_eps"],
        "local_rope_max_timescale": sliding["rope_theta"],
        "global_rope_max_timescale": full["rope_theta"],
        "local_rope_proportion": sliding.get("partial_rotary_factor", 1.0),
        "global_rope_proportion": full.get("partial_rotary_factor", 1.0),
    } | chosen


def tell_maxtext(native, hf):
    """Writes the settings that a checkpoint of MaxText is run by; returns its folder."""
    text = config_of(hf)
    text = text.get("text_config", text)
    small = "e4b" if len(text["layer_types"]) % 6 == 0 else "e2b"
    model = "26b" if text.get("num_experts") else small if text["num_kv_shared_layers"] else "31b"
    models = Path(native) / "models"
    models.mkdir()
    (models / f"gemma4-{model}.yml").write_text(json.dumps(facts_for_maxtext(hf)))
    (Path(native) / "maxtext.yml").write_text(json.dumps({"model_name": f"gemma4-{model}"}))
    return native
