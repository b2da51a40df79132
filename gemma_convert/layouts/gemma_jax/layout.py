"""Google DeepMind's `gemma` on disk: an Orbax item folder, which is the checkpoint itself.

There is neither a step folder nor a `params` around the tree. Format: what the library's own
`gm.ckpts.save_params` writes (StandardCheckpointer: OCDBT, zarr v2) and its `load_params` reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_convert.checkpoint.orbax_layout import OrbaxLayout, bare_names
from gemma_convert.files.given_settings import GivenSettings
from gemma_convert.layouts.gemma_jax.names import EMBEDDING
from gemma_convert.layouts.gemma_jax.settings import (
    IMPORTS,
    gemma_jax_settings,
    read_settings,
    settings_files,
)
from gemma_convert.mapping.native_facts import Settings
from gemma_convert.mapping.plan import Plan
from gemma_convert.model.architecture import Architecture
from gemma_convert.stores.orbax.writer import OrbaxFormat, OrbaxWriter, write_checkpoint_metadata

if TYPE_CHECKING:
    from gemma_convert.forward.native_model import NativeModel
    from gemma_convert.layouts.registry import RunnableLayout

_LAYER = re.compile(r"layer_\d+/", re.ASCII)
_BARE = re.compile(r"layer_\d+/mlp2?/(?:gating_einsum|linear)", re.ASCII)
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"


class GemmaJax(OrbaxLayout):
    name = "gemma-jax"
    framework = "gemma"
    imports = IMPORTS

    def stored(self, arrays: Iterable[str]) -> Mapping[str, str]:
        """Weights of the dense feed-forward may be bare leaves instead of `{"w": leaf}`."""
        found = bare_names(arrays, EMBEDDING)
        if not any(_LAYER.match(name) for name in found):
            return {}
        return {
            f"{name}/w" if _BARE.fullmatch(name) else name: path for name, path in found.items()
        }

    def open_model(self, where: Path, architecture: Architecture) -> NativeModel:
        from gemma_convert.layouts.gemma_jax.model import open_model

        return open_model(where, architecture)

    def create(self, folder: Path, plan: Plan, form: OrbaxFormat, part: int = 0) -> GemmaJaxWriter:
        return GemmaJaxWriter(folder, plan, replace(form, zarr3=False), part)

    def settings(self, plan: Plan, target: Path) -> dict[str, str]:
        return gemma_jax_settings(plan, target, vision=_sees(plan))

    def settings_files(self, plan: Plan, target: Path) -> dict[str, str]:
        del target
        return settings_files(plan, vision=_sees(plan))

    def read_settings(
        self, where: Path, given: GivenSettings, architecture: Architecture | None
    ) -> Settings:
        return read_settings(where, given, architecture)


def _sees(plan: Plan) -> bool:
    return any(name.startswith("vision_encoder/") for name in plan.targets)


class GemmaJaxWriter(OrbaxWriter):
    """The item folder that is the checkpoint."""

    def __init__(self, folder: Path, plan: Plan, form: OrbaxFormat, part: int) -> None:
        super().__init__(folder, form, part)
        self.declare({name: (target.spec, target.chunk) for name, target in plan.targets.items()})

    def complete(self, started_ns: int, parts: int = 1) -> None:
        self.merge(parts)
        self.write_tree({})
        write_checkpoint_metadata(self.folder, _HANDLER, {}, started_ns)


if TYPE_CHECKING:
    _: RunnableLayout = GemmaJax()
