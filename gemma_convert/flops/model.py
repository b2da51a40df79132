"""What the formulas need to know of a model: sizes of its layers, by kind of block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from gemma_convert.flops.attention import Reach
from gemma_convert.model.architecture import (
    AudioArchitecture,
    AudioEmbedder,
    VisionArchitecture,
    VisionEmbedder,
)


@dataclass(frozen=True)
class GroupedQuery:
    """Attention with `heads` query heads over `kv_heads`; `gated` doubles the query projection.

    Without `owns_k` it reads another layer's keys and values; without `owns_v` keys are the values.
    """

    heads: int
    kv_heads: int
    head_dim: int
    reach: Reach
    owns_k: bool = True
    owns_v: bool = True
    gated: bool = False


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434).

    `q_rank` is None where queries are not compressed. `plain` and `rotated` are the channels of a
    head's key without and with rotary embedding.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    plain: int
    rotated: int
    value_dim: int
    reach: Reach


@dataclass(frozen=True)
class GatedDelta:
    """Linear attention by the gated delta rule, computed in chunks (transformers, Qwen3-Next)."""

    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    kernel: int
    chunk: int


@dataclass(frozen=True)
class Dense:
    """A gated MLP: gate, up and down."""

    mlp: int


@dataclass(frozen=True)
class Experts:
    """A mixture of gated MLPs, `active` for each token; `shared` is the width of the shared one."""

    experts: int
    active: int
    expert_mlp: int
    shared: int = 0
    shared_gate: bool = False


Mixer: TypeAlias = GroupedQuery | Latent | GatedDelta
FeedForward: TypeAlias = Dense | Experts


@dataclass(frozen=True)
class DecoderLayer:
    """One layer: a mixer of tokens and the feed-forward blocks behind it."""

    mixer: Mixer
    feed_forward: tuple[FeedForward, ...]

    @property
    def kind(self) -> str:
        """What its mixer reaches: full, sliding, chunked, or linear."""
        return "linear" if isinstance(self.mixer, GatedDelta) else self.mixer.reach.kind


@dataclass(frozen=True)
class Model:
    """A decoder with its towers, or 12B's embedders.

    `ple` is the width of the per-layer embedding, 0 without one, and `ple_vocab` the tokens that
    have one. `tied` says that the output head is the embedding.
    `image_tokens` are the soft tokens that the model's configuration gives an image.
    """

    family: str
    vocab: int
    embed: int
    layers: tuple[DecoderLayer, ...]
    ple: int = 0
    ple_vocab: int = 0
    tied: bool = True
    vision: VisionArchitecture | VisionEmbedder | None = None
    audio: AudioArchitecture | AudioEmbedder | None = None
    bidirectional_images: bool = False
    image_tokens: int = 0
    notes: tuple[str, ...] = ()

    @property
    def groups(self) -> dict[str, int]:
        """Query heads for each KV head, by kind of layer; latent attention has as many of both."""
        found = {}
        for layer in self.layers:
            if isinstance(layer.mixer, GroupedQuery):
                found[layer.kind] = layer.mixer.heads // layer.mixer.kv_heads
        return found
