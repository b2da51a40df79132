"""What a layout says of its own tree, so that JAX can run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax

from gemma_convert.forward.decoder_weights import DecoderWeights
from gemma_convert.forward.encoder import Encoder
from gemma_convert.forward.native_model import Dtype
from gemma_convert.forward.sharding import Axes
from gemma_convert.forward.tree import ArrayFacts, Tree
from gemma_convert.model.architecture import Architecture, TextArchitecture


class ForwardPass(Protocol):
    """The language model over a layout's own tree, a module or an object."""

    def text_modules(self, text: TextArchitecture, /) -> Sequence[str]:
        """The keys of the tree that the language model is made of."""

    def weights(self, tree: Tree, text: TextArchitecture, /) -> DecoderWeights:
        """The arrays of `tree`, which may still be in a file, and the products over their axes."""

    def stored_table(self, tree: Tree, text: TextArchitecture, /) -> Any:
        """The array [vocab embed], perhaps still in a file, that the output table is made of."""

    def output_rows(self, stored: Any, text: TextArchitecture, dtype: Dtype, /) -> jax.Array:
        """Rows of the output table [rows embed], made of the same rows of `stored_table`."""


@dataclass(frozen=True)
class Tower:
    """An encoder of images or of sounds.

    `encoder` gives the steps to the soft tokens [soft_tokens embed] of a prompt, `axes` names the
    axes of the tower's arrays by path, and `parts` are the keys of the tree that it is made of: a
    module whole, or a module and the key below it.
    """

    encoder: Callable[[Tree, Architecture, Any], Encoder]
    axes: Callable[[Architecture], Mapping[str, Axes]]
    parts: tuple[tuple[str] | tuple[str, str], ...]


@dataclass(frozen=True)
class JaxLayout:
    """What is particular to one layout's tree.

    `embedding` is the path of the embedding, and `scaled` says whether it is stored × √embed.
    `check_shapes` raises SourceError where the arrays do not fit a model; `axes` names the axes of
    those that the language model reads, by path. `restore` and `open` give the tree of the named
    modules, or of all, in memory or with its arrays still in their files.
    """

    name: str
    libraries: tuple[str, ...]
    embedding: str
    scaled: bool
    forward: ForwardPass
    facts: Callable[[Path], Mapping[str, ArrayFacts]]
    restore: Callable[[Path, Sequence[str] | None], Tree]
    open: Callable[[Path, Sequence[str] | None], Tree]
    check_shapes: Callable[[Mapping[str, ArrayFacts], TextArchitecture, Path], None]
    axes: Callable[[TextArchitecture], Mapping[str, Axes]]
    towers: Mapping[str, Tower]
