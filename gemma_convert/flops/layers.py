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
from gemma_convert.flops.operations import Operation, matmul
from gemma_convert.flops.workload import Workload


def decoder(model: Model, work: Workload) -> Iterator[Operation]:
    """Everything behind the embedding of tokens, the vocabulary included."""
    rows = work.batch * work.tokens
    if model.ple:
        yield Operation("PLE", matmul(rows, model.embed, len(model.layers) * model.ple))
    for index, layer in enumerate(model.layers):
        operations = [*_mixer(layer.mixer, model, work)]
        for block in layer.feed_forward:
            operations += _feed_forward(block, model.embed, rows)
        if model.ple:
            gate_and_projection = 2 * matmul(rows, model.embed, model.ple)
            operations.append(Operation("PLE", gate_and_projection))
        for operation in operations:
            yield replace(operation, layer=index)
    yield Operation("vocabulary", matmul(work.batch * work.logits, model.embed, model.vocab))


def _mixer(mixer: Mixer, model: Model, work: Workload) -> Iterator[Operation]:
    if isinstance(mixer, GroupedQuery):
        return _grouped_query(mixer, model, work)
    if isinstance(mixer, Latent):
        return _latent(mixer, model.embed, work)
    return _gated_delta(mixer, model.embed, work)


def _grouped_query(mixer: GroupedQuery, model: Model, work: Workload) -> Iterator[Operation]:
    rows, embed = work.batch * work.tokens, model.embed
    queries, keys = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    yield Operation("q projection", matmul(rows, embed, 2 * queries if mixer.gated else queries))
    if mixer.owns_k:
        yield Operation("k projection", matmul(rows, embed, keys))
    if mixer.owns_k and mixer.owns_v:
        yield Operation("v projection", matmul(rows, embed, keys))
    pairs = _pairs(mixer.reach, work)
    if work.bidirectional_images and mixer.reach.kind == "sliding" and work.rule != "dense":
        pairs += work.batch * work.images * image_pair_flops(work.image_tokens)
    yield Operation("attention scores", pairs * queries, weighted=False)
    yield Operation("attention values", pairs * queries, weighted=False)
    yield Operation("o projection", matmul(rows, queries, embed))


def _pairs(reach: Reach, work: Workload) -> int:
    return work.batch * pair_flops(reach, work.tokens, work.cached, work.rule)


def _latent(mixer: Latent, embed: int, work: Workload) -> Iterator[Operation]:
    """In decoding, queries and outputs go into the latent space instead of the cache out of it.

    The weights that expand keys and values then meet the new token alone, and scores and values are
    sums over the latent channels.
    """
    rows, head = work.batch * work.tokens, mixer.plain + mixer.rotated
    if mixer.q_rank is None:
        yield Operation("q projection", matmul(rows, embed, mixer.heads * head))
    else:
        compressed = matmul(rows, embed, mixer.q_rank)
        expanded = matmul(rows, mixer.q_rank, mixer.heads * head)
        yield Operation("q projection", compressed + expanded)
    yield Operation("KV compression", matmul(rows, embed, mixer.kv_rank + mixer.rotated))
    expansion = mixer.heads * (mixer.plain + mixer.value_dim)
    yield Operation("KV expansion", matmul(rows, mixer.kv_rank, expansion))
    pairs = mixer.heads * _pairs(mixer.reach, work)
    decoding = work.mode == "decode"
    key, value = (
        (mixer.kv_rank + mixer.rotated, mixer.kv_rank) if decoding else (head, mixer.value_dim)
    )
    yield Operation("attention scores", pairs * key, weighted=False)
    yield Operation("attention values", pairs * value, weighted=False)
    yield Operation("o projection", matmul(rows, mixer.heads * mixer.value_dim, embed))


def _gated_delta(mixer: GatedDelta, embed: int, work: Workload) -> Iterator[Operation]:
    rows = work.batch * work.tokens
    keys, values = mixer.k_heads * mixer.k_dim, mixer.v_heads * mixer.v_dim
    projections = 2 * keys + 2 * values + 2 * mixer.v_heads
    yield Operation("linear attention projections", matmul(rows, embed, projections))
    convolution = matmul(rows, mixer.kernel, 2 * keys + values)
    yield Operation("linear attention convolution", convolution)
    heads = work.batch * mixer.v_heads
    yield Operation("delta rule", heads * _delta_rule(mixer, work), weighted=False)
    yield Operation("linear attention output", matmul(rows, values, embed))


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
        yield Operation("MLP", gated_mlp(rows, embed, block.mlp))
        return
    yield Operation("router", matmul(rows, embed, block.experts))
    yield Operation("experts", block.active * gated_mlp(rows, embed, block.expert_mlp))
    if block.shared:
        gate = matmul(rows, embed, 1) if block.shared_gate else 0
        yield Operation("shared experts", gated_mlp(rows, embed, block.shared) + gate)


def gated_mlp(rows: int, embed: int, mlp: int) -> int:
    """FLOPs of gate, up and down."""
    return 3 * matmul(rows, embed, mlp)
