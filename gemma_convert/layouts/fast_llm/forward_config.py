"""metadata.yaml of a Fast-LLM checkpoint → typed facts that its forward pass runs from.

Facts: Fast-LLM 0.4.0, whose loader takes a default for almost every key that is missing, in
silence. So here a key that Gemma 4 needs must be there, a value that the forward pass does not
compute is refused, and so is a key of the model that is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from gemma_convert.errors import SourceError
from gemma_convert.files.yaml_file import read_yaml
from gemma_convert.layouts.fast_llm.section import Section

METADATA = "metadata.yaml"
MAX_BYTES = 2 << 20
"""Largest metadata.yaml that is read: the published models need less than a tenth."""

_BLOCKS = ("sliding_attention", "full_attention")


@dataclass(frozen=True)
class Rotary:
    """Base of the angles, and the share of the head's pairs that turn."""

    theta: float
    fraction: float


@dataclass(frozen=True)
class Attention:
    """One attention mixer. `window` is None where it reaches back to the first token.

    With `shared_key_value` the projected keys before their norm are the values.
    """

    heads: int
    head_groups: int
    head_size: int
    rotary: Rotary
    window: int | None
    shared_key_value: bool
    query_epsilon: float
    key_epsilon: float
    value_epsilon: float


@dataclass(frozen=True)
class Mlp:
    """A gated feed-forward of this width with a norm before it, GELU in its tanh approximation."""

    width: int
    pre_epsilon: float


@dataclass(frozen=True)
class Routed:
    """The experts of a mixture, each of this width, and their router."""

    experts: int
    experts_per_token: int
    width: int
    router_input_scale: float
    router_epsilon: float
    pre_epsilon: float
    post_epsilon: float


@dataclass(frozen=True)
class HybridMoe:
    """A dense feed-forward and experts side by side; each branch has norms before and after it."""

    dense: Mlp
    dense_post_epsilon: float
    routed: Routed


@dataclass(frozen=True)
class Block:
    """One decoder layer: a mixer and a feed-forward with their norms, then the layer's scale."""

    attention: Attention
    mlp: Mlp | HybridMoe
    pre_mixer_epsilon: float
    post_mixer_epsilon: float
    post_mlp_epsilon: float


@dataclass(frozen=True)
class FastLLMConfig:
    """The model of metadata.yaml: one block per layer, and `state_index`, tensor name → file."""

    hidden_size: int
    vocab_size: int
    embedding_scale: float
    tied_embedding_weight: bool
    layers: tuple[Block, ...]
    final_epsilon: float
    final_logit_softcap: float | None
    fast_llm_version: str
    state_index: Mapping[str, str]


def read_fast_llm_config(folder: Path) -> FastLLMConfig:
    """The facts of `folder`/metadata.yaml.

    Raises SourceError that names the key where one is missing, unknown, of the wrong type, or asks
    for what Gemma 4 has not.
    """
    path = folder / METADATA
    if not path.is_file():
        raise SourceError("This is not a Fast-LLM checkpoint.", where=path, expected=METADATA)
    with Section(read_yaml(path, METADATA, MAX_BYTES), path, "") as top:
        top.must_be("model", "gpt")
        top.must_be("format", "fast_llm")
        shards = top.take("shards")
        if shards != ["weights"]:
            top.refuse("shards", ["weights"], shards)
        version = top.text("fast_llm_version")
        with top.section("metadata", others=True) as metadata:
            state_index = _state_index(metadata)
        with top.section("config", others=True) as config:
            config.must_be("type", "gpt", default="gpt")
            with config.section("base_model") as model:
                return _model(model, version, state_index)


def _state_index(metadata: Section) -> Mapping[str, str]:
    index = metadata.take("state_index")
    if not isinstance(index, Mapping) or not index:
        metadata.refuse("state_index", "a mapping of tensor names to files", index)
    for name, file in index.items():
        if not isinstance(name, str) or not isinstance(file, str) or not _is_plain(file):
            metadata.refuse("state_index", "names of files inside the folder", {name: file})
    return dict(index)


def _is_plain(file: str) -> bool:
    plain = PurePath(file).name == file and not set(file) & set("\\:\0")
    return plain and file not in {"", ".."}


def _model(model: Section, version: str, state_index: Mapping[str, str]) -> FastLLMConfig:
    with model.section("peft", default={"type": "none"}) as peft:
        peft.must_be("type", "none")
    with model.section("embeddings") as embeddings:
        vocab_size = embeddings.integer("vocab_size")
        embedding_scale = embeddings.number("embedding_scale")
    with model.section("head") as head:
        final_epsilon = head.norm("normalization")
        no_cap = head.is_none("final_logit_softcap")
        softcap = None if no_cap else head.number("final_logit_softcap")
    with model.section("decoder") as decoder:
        layers = _layers(decoder)
    return FastLLMConfig(
        hidden_size=model.integer("hidden_size"),
        vocab_size=vocab_size,
        embedding_scale=embedding_scale,
        tied_embedding_weight=model.flag("tied_embedding_weight"),
        layers=layers,
        final_epsilon=final_epsilon,
        final_logit_softcap=softcap,
        fast_llm_version=version,
        state_index=state_index,
    )


def _layers(decoder: Section) -> tuple[Block, ...]:
    """One block per layer: `pattern` names the block of every layer."""
    decoder.must_be("type", "pattern")
    layers = decoder.integer("num_blocks")
    pattern = decoder.take("pattern")
    known = isinstance(pattern, list) and all(name in _BLOCKS for name in pattern)
    if not known or len(pattern) != layers:
        decoder.refuse("pattern", f"{layers} names out of {', '.join(_BLOCKS)}", pattern)
    with decoder.section("blocks") as sections:
        blocks = {}
        for name in dict.fromkeys(pattern):
            with sections.section(name) as block:
                blocks[name] = _block(block)
    return tuple(blocks[name] for name in pattern)


def _block(block: Section) -> Block:
    block.must_be("type", "decoder")
    with block.section("output_scale") as scale:
        scale.must_be("enabled", True)
        scale.must_be("lr_scale", 0)
    with block.section("mixer") as mixer:
        attention = _attention(mixer)
    with block.section("mlp") as mlp:
        kind = mlp.take("type")
        if kind == "hybrid_moe":
            feed: Mlp | HybridMoe = _hybrid(mlp)
            with block.section("pre_mlp_normalization") as norm:
                norm.must_be("type", "none")
        else:
            if kind != "mlp":
                mlp.refuse("type", "mlp or hybrid_moe", kind)
            feed = Mlp(_width(mlp), block.norm("pre_mlp_normalization"))
    return Block(
        attention=attention,
        mlp=feed,
        pre_mixer_epsilon=block.norm("normalization"),
        post_mixer_epsilon=block.norm("post_mixer_normalization"),
        post_mlp_epsilon=block.norm("post_mlp_normalization"),
    )


def _attention(mixer: Section) -> Attention:
    mixer.must_be("type", "attention")
    mixer.must_be("add_linear_biases", False)
    mixer.must_be("softmax_scale_power", 0)
    mixer.must_be("dropout", 0, default=0)
    heads = mixer.integer("heads")
    groups = mixer.integer("head_groups")
    if heads % groups:
        mixer.refuse("head_groups", f"a divisor of {heads} heads", groups)
    head_size = mixer.integer("head_size")
    if head_size % 2:
        mixer.refuse("head_size", "an even number", head_size)
    with mixer.section("rotary") as rotary:
        turned = _rotary(rotary)
    return Attention(
        heads=heads,
        head_groups=groups,
        head_size=head_size,
        rotary=turned,
        window=None if mixer.is_none("window_size", None) else mixer.integer("window_size"),
        shared_key_value=mixer.flag("shared_key_value", default=False),
        query_epsilon=mixer.norm("query_norm"),
        key_epsilon=mixer.norm("key_norm"),
        value_epsilon=mixer.norm("value_norm", "fixed_rms_norm"),
    )


def _rotary(rotary: Section) -> Rotary:
    kind = rotary.take("type")
    theta = rotary.number("theta")
    if kind == "default":
        return Rotary(theta, 1.0)
    if kind != "proportional":
        rotary.refuse("type", "default or proportional", kind)
    fraction = rotary.number("partial_rotary_factor")
    if fraction > 1:
        rotary.refuse("partial_rotary_factor", "at most 1", fraction)
    return Rotary(theta, fraction)


def _hybrid(mlp: Section) -> HybridMoe:
    with mlp.section("dense") as dense:
        dense.must_be("type", "mlp")
        branch = Mlp(_width(dense), dense.norm("pre_norm"))
        dense_post_epsilon = dense.norm("post_norm")
    with mlp.section("routed") as routed:
        return HybridMoe(branch, dense_post_epsilon, _routed(routed))


def _routed(routed: Section) -> Routed:
    routed.must_be("type", "moe")
    experts = routed.integer("experts")
    chosen = routed.integer("experts_per_token")
    if chosen > experts:
        routed.refuse("experts_per_token", f"at most {experts}", chosen)
    for scale in ("router_scale", "router_per_expert_scale"):
        with routed.section(scale) as section:
            section.must_be("enabled", True)
    return Routed(
        experts=experts,
        experts_per_token=chosen,
        width=_width(routed),
        router_input_scale=routed.number("router_input_scale"),
        router_epsilon=routed.norm("router_normalization", "fixed_rms_norm"),
        pre_epsilon=routed.norm("pre_norm"),
        post_epsilon=routed.norm("post_norm"),
    )


def _width(mlp: Section) -> int:
    """Width of a gated feed-forward with GELU and without biases."""
    mlp.must_be("gated", True)
    mlp.must_be("activation", "gelu")
    mlp.must_be("add_linear_biases", False)
    return mlp.integer("intermediate_size")
