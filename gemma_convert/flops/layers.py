"""FLOPs of the decoder, layer by layer, in the forward pass.

Formulas: ordinary matrix products; the latent attention and the gated delta rule follow
transformers 5.23 (`models/deepseek_v3`, `models/qwen3_next`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gemma_convert.flops.attention import Reach, image_pair_flops, pair_flops
from gemma_convert.flops.model import (
    Dense,
    FeedForward,
    GatedDelta,
    GroupedQuery,
    Latent,
    Mixer,
    Model,
)
from gemma_convert.flops.operations import Operation, Part, linear, matmul
from gemma_convert.flops.workload import Workload


def decoder(model: Model, work: Workload) -> Iterator[Operation]:
    """Everything behind the embedding of tokens, the vocabulary included."""
    rows, embed = work.batch * work.tokens, model.embed
    if model.ple:
        yield linear("PLE", rows, embed, len(model.layers) * model.ple)
    for index, layer in enumerate(model.layers):
        operations = [*_mixer(layer.mixer, model, work)]
        for block in layer.feed_forward:
            operations += _feed_forward(block, embed, rows)
        if model.ple:
            operations.append(linear("PLE", rows, embed, 2 * model.ple, keeps=embed))
        for operation in operations:
            yield replace(operation, layer=index)
    yield linear("vocabulary", work.batch * work.logits, embed, model.vocab)


def _mixer(mixer: Mixer, model: Model, work: Workload) -> Iterator[Operation]:
    if isinstance(mixer, GroupedQuery):
        return _grouped_query(mixer, model, work)
    if isinstance(mixer, Latent):
        return _latent(mixer, model.embed, work)
    return _gated_delta(mixer, model.embed, work)


def _grouped_query(mixer: GroupedQuery, model: Model, work: Workload) -> Iterator[Operation]:
    rows, embed = work.batch * work.tokens, model.embed
    queries, keys = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    outer = 2 * queries if mixer.gated else queries
    yield linear("q projection", rows, embed, outer, keeps=2 * embed)
    if mixer.owns_k:
        yield linear("k projection", rows, embed, keys)
    if mixer.owns_k and mixer.owns_v:
        yield linear("v projection", rows, embed, keys)
    pairs = _pairs(mixer.reach, work)
    if work.bidirectional_images and mixer.reach.kind == "sliding" and work.rule != "dense":
        pairs += work.batch * work.images * image_pair_flops(work.image_tokens)
    yield Operation("attention scores", pairs * queries)
    yield Operation("attention values", pairs * queries, kept=rows * queries)
    yield linear("o projection", rows, queries, embed)


def _pairs(reach: Reach, work: Workload) -> int:
    return work.batch * pair_flops(reach, work.tokens, work.cached, work.rule)


def _latent(mixer: Latent, embed: int, work: Workload) -> Iterator[Operation]:
    """In decoding, queries and outputs go into the latent space instead of the cache out of it.

    The weights that expand keys and values then meet the new token alone, and scores and values are
    sums over the latent channels.
    """
    rows, head = work.batch * work.tokens, mixer.plain + mixer.rotated
    queries, values = mixer.heads * head, mixer.heads * mixer.value_dim
    if mixer.q_rank is None:
        yield linear("q projection", rows, embed, queries, keeps=2 * embed)
    else:
        yield linear("q projection", rows, embed, mixer.q_rank, keeps=2 * embed)
        yield linear("q projection", rows, mixer.q_rank, queries)
    yield linear("KV compression", rows, embed, mixer.kv_rank + mixer.rotated)
    yield linear("KV expansion", rows, mixer.kv_rank, mixer.heads * mixer.plain + values)
    pairs = mixer.heads * _pairs(mixer.reach, work)
    decoding = work.mode == "decode"
    key, value = (
        (mixer.kv_rank + mixer.rotated, mixer.kv_rank) if decoding else (head, mixer.value_dim)
    )
    yield Operation("attention scores", pairs * key)
    yield Operation("attention values", pairs * value, kept=rows * values)
    yield linear("o projection", rows, values, embed)


def _gated_delta(mixer: GatedDelta, embed: int, work: Workload) -> Iterator[Operation]:
    rows = work.batch * work.tokens
    keys, values = mixer.k_heads * mixer.k_dim, mixer.v_heads * mixer.v_dim
    projections = 2 * keys + 2 * values + 2 * mixer.v_heads
    yield linear("linear attention projections", rows, embed, projections, keeps=2 * embed)
    yield linear("linear attention convolution", rows, mixer.kernel, 2 * keys + values)
    flops = work.batch * mixer.v_heads * _delta_rule(mixer, work)
    yield Operation("delta rule", flops, kept=rows * values)
    yield linear("linear attention output", rows, values, embed)


def _delta_rule(mixer: GatedDelta, work: Workload) -> int:
    """FLOPs of one value head: read, correct and update a state of [k_dim v_dim] for each token.

    In chunks there come keys with keys, queries with keys, a triangular system whose right sides
    are the values and the keys, and the result over the chunk's new values.
    """
    k_dim, v_dim, tokens = mixer.k_dim, mixer.v_dim, work.tokens
    if work.mode == "decode":
        return 3 * matmul(tokens, k_dim, v_dim)
    chunk = Reach("chunked", mixer.chunk)
    if work.rule == "dense":
        padded = -(-tokens // mixer.chunk) * mixer.chunk
        seen = before = 2 * padded * mixer.chunk
        tokens = padded
    else:
        seen = pair_flops(chunk, tokens, 0, "exact")
        before = seen - 2 * tokens
    state = 3 * matmul(tokens, k_dim, v_dim)
    return state + before * k_dim + seen * (k_dim + v_dim) + before * (k_dim + v_dim)


def _feed_forward(block: FeedForward, embed: int, rows: int) -> Iterator[Operation]:
    if isinstance(block, Dense):
        yield gated_mlp("MLP", rows, embed, block.mlp)
        return
    yield linear("router", rows, embed, block.experts, keeps=2 * embed)
    active = linear("experts", rows, embed, 3 * block.active * block.expert_mlp, keeps=embed)
    yield replace(active, parameters=3 * embed * block.experts * block.expert_mlp)
    if block.shared:
        outer = 3 * block.shared + int(block.shared_gate)
        yield linear("shared experts", rows, embed, outer, keeps=embed)


def gated_mlp(
    component: str, rows: int, embed: int, mlp: int, part: Part = "text", layer: int | None = None
) -> Operation:
    """Gate, up and down; kept are the input before and after its norm, gate, up, their product,
    and the output.
    """
    return linear(component, rows, embed, 3 * mlp, part, layer, keeps=3 * embed)
