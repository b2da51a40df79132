"""Typed facts about one Gemma 4 model: sizes of axes and boolean facts, by layer.

Everything in the package asks these dataclasses; `config.py` makes them from config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from gemma_convert.model.adapter import Adapter

Family = Literal["e2b", "e4b", "12b", "26b-a4b", "31b"]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer.

    `fraction` is the share of the head's pairs that turn; the others keep frequency zero.
    """

    theta: float
    fraction: float


@dataclass(frozen=True)
class Layer:
    """Facts of one decoder layer. `kv_source` is the layer whose keys and values it attends to."""

    index: int
    sliding: bool
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    owns_kv: bool
    owns_value: bool
    kv_source: int


@dataclass(frozen=True)
class TextArchitecture:
    """The language model. `ple` is the width of the per-layer embedding, 0 where there is none.

    `tied` says that the output head is the embedding, rather than a matrix of its own.
    """

    vocab: int
    embed: int
    layers: tuple[Layer, ...]
    window: int
    rope_sliding: Rope
    rope_full: Rope
    norm_epsilon: float
    logit_softcap: float | None
    ple: int
    ple_vocab: int
    experts: int
    experts_per_token: int
    expert_mlp: int
    key_as_value: bool
    double_wide_mlp: bool
    kv_shared_layers: int
    bidirectional_images: bool
    whole_images: bool
    """Whether tokens of an image do so in full layers too, and whatever the window: 12B."""
    tied: bool
    pad_token: int

    @property
    def moe(self) -> bool:
        return self.experts > 0

    @cached_property
    def period(self) -> int | None:
        """Layers in a block of sliding layers closed by a full one; None if irregular."""
        first_full = next((layer.index for layer in self.layers if not layer.sliding), None)
        if first_full is None:
            return None
        period = first_full + 1
        regular = all(layer.sliding == bool((layer.index + 1) % period) for layer in self.layers)
        return period if regular else None


@dataclass(frozen=True)
class VisionArchitecture:
    """The vision tower. `patch` is the length of a flattened patch, 3 · patch_size²."""

    embed: int
    layers: int
    heads: int
    head_dim: int
    mlp: int
    patch: int
    patch_size: int
    positions: int
    pooling: int
    rope_theta: float
    norm_epsilon: float
    clipped: bool
    standardize: bool

    @property
    def sizes(self) -> dict[str, int]:
        """Axis → length."""
        return {
            "vit_embed": self.embed,
            "vit_layers": self.layers,
            "vit_heads": self.heads,
            "vit_head_dim": self.head_dim,
            "vit_mlp": self.mlp,
            "patch": self.patch,
            "positions": self.positions,
            "xy": 2,
        }


@dataclass(frozen=True)
class AudioArchitecture:
    """The audio tower. `frequencies` is the number of mel bands left after the two convolutions."""

    embed: int
    layers: int
    heads: int
    output: int
    channels: tuple[int, ...]
    frequencies: int
    kernel: int
    clipped: bool

    @property
    def sizes(self) -> dict[str, int]:
        """Axis → length."""
        return {
            "audio_embed": self.embed,
            "audio_layers": self.layers,
            "audio_heads": self.heads,
            "audio_head_dim": self.embed // self.heads,
            "audio_mlp": 4 * self.embed,
            "audio_glu": 2 * self.embed,
            "audio_conv": self.embed,
            "audio_output": self.output,
            "audio_kernel": self.kernel,
            "conv_stages": len(self.channels),
            "conv_time": 3,
            "conv_frequency": 3,
            "frequencies": self.frequencies,
            "conv_last": self.channels[-1],
        }


@dataclass(frozen=True)
class VisionEmbedder:
    """What 12B has in the place of a vision tower: linear maps and norms, no layers.

    `patch` is the length of a flattened square of pooling · pooling patches, one soft token.
    """

    embed: int
    patch: int
    patch_size: int
    pooling: int
    positions: int
    norm_epsilon: float

    @property
    def sizes(self) -> dict[str, int]:
        """Axis → length."""
        return {
            "vit_embed": self.embed,
            "patch": self.patch,
            "positions": self.positions,
            "xy": 2,
        }


@dataclass(frozen=True)
class AudioEmbedder:
    """What 12B has in the place of an audio tower: `frame` raw samples become one soft token."""

    frame: int

    @property
    def sizes(self) -> dict[str, int]:
        """Axis → length."""
        return {"audio_output": self.frame}


@dataclass(frozen=True)
class Architecture:
    """Typed facts of one Gemma 4 model, read from its config.json."""

    text: TextArchitecture
    vision: VisionArchitecture | None
    audio: AudioArchitecture | None
    text_only: bool
    """True for Gemma4ForCausalLM, whose tensors are named without `language_model.`."""
    dtype: str | None
    image_token: int | None
    unified: bool = False
    """True for 12B: embedders instead of towers, and classes of its own in transformers."""
    vision_embedder: VisionEmbedder | None = None
    audio_embedder: AudioEmbedder | None = None
    adapter: Adapter | None = None
    """Of an adapter of this model, whose tensors are those of the adapter alone."""

    @property
    def family(self) -> Family:
        """Which of the five published models this is, or is a relative of by its features."""
        if self.unified:
            return "12b"
        if self.text.moe:
            return "26b-a4b"
        if self.text.ple:
            return "e2b" if self.text.double_wide_mlp else "e4b"
        return "31b"

    @property
    def sight(self) -> VisionArchitecture | VisionEmbedder | None:
        """What makes soft tokens of images; None of a model that sees none."""
        return self.vision or self.vision_embedder

    @property
    def reference_class(self) -> str:
        """The name of transformers' class for this model, whole or its text alone."""
        name = "Gemma4Unified" if self.unified else "Gemma4"
        return name + ("ForCausalLM" if self.text_only else "ForConditionalGeneration")

    @property
    def text_model_type(self) -> str:
        """The `model_type` of the text model."""
        return "gemma4_unified_text" if self.unified else "gemma4_text"

    def size(self, axis: str, index: Mapping[str, int]) -> int | None:
        """Length of `axis` where the axes in `index` have those values; None if it has none here.

        `index` names the axes that stand in a tensor's name, such as `{"layers": 3}`; sizes that
        differ by layer (head_dim, kv_heads, mlp) need it.
        """
        if axis in _LAYER_SIZES:
            layer = self._layer(index)
            return None if layer is None else getattr(layer, _LAYER_SIZES[axis])
        if axis in {"conv_in", "conv_out"}:
            return self._conv_channels(axis, index.get("conv_stages"))
        return self._sizes.get(axis)

    def holds(self, fact: str, index: Mapping[str, int]) -> bool | None:
        """Truth of a boolean fact at a place; None for a word that is no fact."""
        if fact not in LAYER_FACTS:
            return self._facts.get(fact)
        layer = self._layer(index)
        if layer is None:
            return False
        if fact == "key_as_value":
            return self.text.key_as_value and not layer.sliding
        return layer.owns_kv if fact == "owns_kv" else layer.sliding

    def _layer(self, index: Mapping[str, int]) -> Layer | None:
        number = index.get("layers")
        if number is None or not 0 <= number < len(self.text.layers):
            return None
        return self.text.layers[number]

    def _conv_channels(self, axis: str, stage: int | None) -> int | None:
        if self.audio is None or stage is None or not 0 <= stage < len(self.audio.channels):
            return None
        if axis == "conv_out":
            return self.audio.channels[stage]
        return self.audio.channels[stage - 1] if stage else 1

    def _kv_sources_apart(self) -> bool:
        """Whether some shared keys and values stem from other layers than the last two owners."""
        layers = self.text.layers
        owners = [layer.index for layer in layers if layer.owns_kv]
        sources = {layer.kv_source for layer in layers if not layer.owns_kv}
        return not sources <= set(owners[-2:])

    @cached_property
    def _sizes(self) -> dict[str, int]:
        text = self.text
        sizes = {
            "vocab": text.vocab,
            "embed": text.embed,
            "layers": len(text.layers),
            **ENUMERATED,
        }
        if text.ple:
            sizes |= {"ple": text.ple, "ple_vocab": text.ple_vocab}
        if text.moe:
            sizes |= {"experts": text.experts, "expert_mlp": text.expert_mlp}
        if self.adapter is not None:
            sizes["rank"] = self.adapter.rank
        parts = (self.vision, self.audio, self.vision_embedder, self.audio_embedder)
        for part in parts:
            sizes |= {} if part is None else part.sizes
        return sizes

    @cached_property
    def _facts(self) -> dict[str, bool]:
        text, vision, audio = self.text, self.vision, self.audio
        return {
            "ple": bool(text.ple),
            "moe": text.moe,
            "kv_shared": text.kv_shared_layers > 0,
            "kv_sources_apart": self._kv_sources_apart(),
            "double_wide": text.double_wide_mlp,
            "tied": text.tied,
            "vision": vision is not None,
            "vision_clipped": vision is not None and vision.clipped,
            "vision_standardized": vision is not None and vision.standardize,
            "audio": audio is not None,
            "audio_clipped": audio is not None and audio.clipped,
            "vision_embedder": self.vision_embedder is not None,
            "audio_embedder": self.audio_embedder is not None,
            "images": self.sight is not None,
            "sounds": audio is not None or self.audio_embedder is not None,
        }


_LAYER_SIZES = {"heads": "heads", "kv_heads": "kv_heads", "head_dim": "head_dim", "mlp": "mlp"}

_AXIS_WORDS = """
vocab embed layers heads kv_heads head_dim mlp gate_up kv bound
experts expert_mlp ple ple_vocab rank
vit_embed vit_layers vit_heads vit_head_dim vit_mlp patch positions xy
audio_embed audio_layers audio_heads audio_head_dim audio_mlp audio_glu audio_conv audio_kernel
audio_output conv_stages conv_time conv_frequency conv_in conv_out conv_last frequencies
"""

AXES = frozenset(_AXIS_WORDS.split())
"""Every axis word that has a size; the mapping tables may use these and no others."""

ENUMERATED = {"gate_up": 2, "kv": 2, "bound": 4}
"""Axes whose values have names in a layout, and how many they are."""

LAYER_FACTS = frozenset({"owns_kv", "sliding", "key_as_value"})
"""Facts that hold for a layer, so that a row which asks for them has `{layer}` in its name."""

_MODEL_FACT_WORDS = """
ple moe kv_shared kv_sources_apart double_wide tied
vision vision_clipped vision_standardized audio audio_clipped
vision_embedder audio_embedder images sounds
"""

MODEL_FACTS = frozenset(_MODEL_FACT_WORDS.split())
"""Facts that hold for the whole model."""

FACTS = LAYER_FACTS | MODEL_FACTS
"""Every boolean fact that a `when` may name."""
