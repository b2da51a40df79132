"""What a JAX forward pass is given: token ids, and what stands in for the tokens of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids [batch length], with soft tokens in the places of images where there are any.

    `images` [batch length] is 0 for text and n for the tokens of a row's n-th image; `soft` [batch
    length embed] holds their embeddings there and anything elsewhere. Tokens of one image see each
    other both ways in models that have it so. A clip of sound is given like an image: models that
    hear read all tokens forwards. Raises ValueError where the arrays do not belong together.
    """

    tokens: Int[np.ndarray, "batch length"]
    soft: Float[Array | np.ndarray, "batch length embed"] | None = None
    images: Int[np.ndarray, "batch length"] | None = None

    def __post_init__(self) -> None:
        if (self.soft is None) != (self.images is None):
            raise ValueError("soft tokens and the places of images belong together")
        places = np.shape(self.tokens)
        if self.soft is None or self.images is None:
            return
        if np.shape(self.images) != places or np.shape(self.soft)[:-1] != places:
            raise ValueError(
                f"tokens {places}, images {np.shape(self.images)}, soft {np.shape(self.soft)}"
            )

    def ids(self, pad_token: int) -> Int[np.ndarray, "batch length"]:
        """The ids to look up [batch length]: `pad_token` for every token of an image.

        So `Gemma4Model.forward` of transformers does, for the per-layer embedding's sake.
        """
        tokens = np.asarray(self.tokens)
        return tokens if self.images is None else np.where(self.images, pad_token, tokens)
