"""Which parts of transformers' towers are which modules, seen while they run and put there instead.

Modules: `Gemma4VisionModel`, `Gemma4AudioModel` and `Gemma4MultimodalEmbedder` in
`transformers/models/gemma4/modeling_gemma4.py` (5.23), `Gemma4UnifiedVisionEmbedder` in
`models/gemma4_unified/modeling_gemma4_unified.py`. A vision layer's are those of a decoder's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_convert.forward.parts import Part
from gemma_convert.logits.tapped import GIVEN_TO, MADE_BY, seen_at

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TowerModules:
    """Where a tower's parts are made or given to: around its layers, and in each of them.

    `first` is the part that the layers begin with, `holder` the path of what holds them, None where
    there are none; those of `made_by` and `given_to` are below the model, the others' below a
    layer.
    """

    first: Part
    holder: str | None
    made_by: Mapping[Part, str]
    given_to: Mapping[Part, str]
    layer_made_by: Mapping[Part, str]
    layer_given_to: Mapping[Part, str]

    @property
    def roots(self) -> set[str]:
        """The modules of the model that the tower is in."""
        return {path.partition(".")[0] for path in self.made_by.values()}


TOWERS: Mapping[str, TowerModules] = {
    "vision": TowerModules(
        first="patch embedding",
        holder="vision_tower.encoder",
        made_by={
            "patch embedding": "vision_tower.patch_embedder",
            "pooled patches": "vision_tower.pooler",
            "norm before the projection": "embed_vision.embedding_pre_projection_norm",
            "soft tokens": "embed_vision.embedding_projection",
        },
        given_to={"standardized patches": "embed_vision.embedding_pre_projection_norm"},
        layer_made_by=MADE_BY,
        layer_given_to=GIVEN_TO,
    ),
    "audio": TowerModules(
        first="subsampled frames",
        holder="audio_tower",
        made_by={
            "subsampled frames": "audio_tower.subsample_conv_projection",
            "projected frames": "audio_tower.output_proj",
            "norm before the projection": "embed_audio.embedding_pre_projection_norm",
            "soft tokens": "embed_audio.embedding_projection",
        },
        given_to={},
        layer_made_by={
            "first feed-forward": "feed_forward1",
            "norm before attention": "norm_pre_attn",
            "queries": "self_attn.q_proj",
            "keys": "self_attn.k_proj",
            "values": "self_attn.v_proj",
            "output projection": "self_attn.post",
            "norm behind attention": "norm_post_attn",
            "light convolution": "lconv1d",
            "second feed-forward": "feed_forward2",
            "output": "",
        },
        layer_given_to={"attention": "self_attn.post", "sum behind attention": "lconv1d"},
    ),
}
"""Of a model that does not standardise, what is pooled is given to the norm, and no part."""

EMBEDDER = TowerModules(
    first="patch embedding",
    holder=None,
    made_by={
        "patch embedding": "embed_vision.pos_norm",
        "norm before the projection": "embed_vision.multimodal_embedder."
        "embedding_pre_projection_norm",
        "soft tokens": "embed_vision.multimodal_embedder.embedding_projection",
    },
    given_to={},
    layer_made_by={},
    layer_given_to={},
)
"""What 12B has in the place of a vision tower."""


def modules_of(model: Any, tower: str) -> TowerModules:
    """The modules of a tower of transformers' `model`, or of what it has in its place."""
    embeds = tower == "vision" and not hasattr(model, "vision_tower")
    return EMBEDDER if embeds else TOWERS[tower]


def around(
    model: Any, modules: TowerModules, standardize: bool, use: Callable[[Part, Any], Any]
) -> AbstractContextManager[None]:
    """`tapped` of what stands around the layers of a tower; a tuple's first value is the part's."""
    given_to = modules.given_to if standardize else {}

    def first(part: Part, value: Any) -> Any:
        if not isinstance(value, tuple):
            return use(part, value)
        found = use(part, value[0])
        return None if found is None else (found, *value[1:])

    return seen_at(model, modules.made_by, given_to, first)


def within(
    layer: Any, modules: TowerModules, use: Callable[[Part, Any], Any]
) -> AbstractContextManager[None]:
    """`tapped` of a layer of a tower."""
    return seen_at(layer, modules.layer_made_by, modules.layer_given_to, use)


def rows(value: torch.Tensor) -> torch.Tensor:
    """What a part made, [1 rows *features] or [rows features], as [rows features]."""
    found: torch.Tensor = value if value.dim() == 2 else value[0].flatten(1)
    return found
