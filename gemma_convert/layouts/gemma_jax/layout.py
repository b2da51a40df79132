"""Google DeepMind's `gemma` on disk: an Orbax item folder, which is the checkpoint itself.

There is neither a step folder nor a `params` around the tree. Format: what the library's own
`gm.ckpts.save_params` writes (StandardCheckpointer: OCDBT, zarr v2) and its `load_params` reads.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from gemma_convert.checkpoint.native import NativeSource
from gemma_convert.checkpoint.orbax_source import orbax_source
from gemma_convert.layouts.gemma_jax.settings import gemma_jax_settings
from gemma_convert.mapping.plan import Plan
from gemma_convert.stores.orbax.reader import OrbaxTree
from gemma_convert.stores.orbax.writer import OrbaxFormat, OrbaxWriter, write_checkpoint_metadata

_EMBEDDING = "embedder/input_embedding"
_BARE = re.compile(r"layer_\d+/mlp2?/(?:gating_einsum|linear)", re.ASCII)
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"


class GemmaJax:
    name = "gemma-jax"
    framework = "gemma"
    divisible = True
    streams = True

    def create(self, folder: Path, plan: Plan, form: OrbaxFormat, part: int = 0) -> GemmaJaxWriter:
        return GemmaJaxWriter(folder, plan, replace(form, zarr3=False), part)

    def settings(self, plan: Plan, target: Path) -> dict[str, str]:
        return gemma_jax_settings(plan.architecture, target)

    def check_metadata(self, folder: Path, plan: Plan) -> dict[str, str]:
        del folder, plan
        return {}


def gemma_jax_source(tree: OrbaxTree) -> NativeSource | None:
    """The parameters in an Orbax tree; None where it is not the gemma library's.

    Weights of the dense feed-forward may be bare leaves instead of `{"w": leaf}`.
    """
    if _EMBEDDING not in tree.arrays:
        return None
    stored = {f"{name}/w" if _BARE.fullmatch(name) else name: name for name in tree.arrays}
    return orbax_source(GemmaJax.name, tree, stored, scanned=False)


class GemmaJaxWriter(OrbaxWriter):
    """The item folder that is the checkpoint."""

    def __init__(self, folder: Path, plan: Plan, form: OrbaxFormat, part: int) -> None:
        super().__init__(folder, form, part)
        self.declare({name: (target.spec, target.chunk) for name, target in plan.targets.items()})

    def complete(self, started_ns: int, parts: int = 1) -> None:
        self.merge(parts)
        self.write_tree({})
        write_checkpoint_metadata(self.folder, _HANDLER, {}, started_ns)
