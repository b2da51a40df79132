"""Tunix on disk: an Orbax step folder `0/model_params` with the state of its NNX model.

What `tunix.sft.checkpoint_manager.CheckpointManager` of google-tunix 0.1.7 writes and restores
(OCDBT, zarr v2): numbers of layers are keys of a dict, and below each parameter stands a leaf
`value`. Trees without these leaves, as `nnx.to_pure_dict` gives them, are read as well. An adapter
stands there alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_convert.checkpoint.native import NativeSource
from gemma_convert.checkpoint.native_folder import NativeFolder
from gemma_convert.checkpoint.orbax_layout import OrbaxLayout, bare_names
from gemma_convert.checkpoint.qwix import VALUE, rank_of
from gemma_convert.errors import SourceError, some
from gemma_convert.files.given_settings import GivenSettings
from gemma_convert.layouts.tunix.adapter import adapter_settings, matrices
from gemma_convert.layouts.tunix.names import EMBEDDING
from gemma_convert.layouts.tunix.settings import (
    IMPORTS,
    read_settings,
    settings_files,
    tunix_settings,
)
from gemma_convert.mapping.native_facts import Settings
from gemma_convert.mapping.plan import Plan
from gemma_convert.model.adapter import StoredAdapter
from gemma_convert.model.architecture import Architecture
from gemma_convert.stores.orbax.writer import OrbaxFormat, OrbaxWriter, write_checkpoint_metadata

if TYPE_CHECKING:
    from gemma_convert.forward.native_model import NativeModel
    from gemma_convert.layouts.registry import AdaptedLayout

STEP, ITEM = "0", "model_params"

_LAYER = re.compile(r"layers/\d+/", re.ASCII)
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"


class Tunix(OrbaxLayout):
    name = "tunix"
    framework = "Tunix"
    imports = IMPORTS

    def find(self, folder: NativeFolder) -> Path | None:
        """Raises SourceError where an adapter stands in the tree beside the weights."""
        for tree, arrays in folder.trees.items():
            adapter = matrices(arrays)
            if adapter and bare_names(arrays, EMBEDDING):
                raise SourceError(
                    "The checkpoint holds an adapter beside the weights, which is not in them yet.",
                    where=tree,
                    found=some(list(adapter)),
                    do="save it alone, with save_only_lora_params=True, or merge it in Tunix",
                )
        return super().find(folder)

    def stored(self, arrays: Iterable[str]) -> Mapping[str, str]:
        arrays = list(arrays)
        found = bare_names(arrays, EMBEDDING)
        if any(map(_LAYER.match, found)):
            return {name + VALUE: path for name, path in found.items()}
        return matrices(arrays)

    def open(self, where: Path) -> NativeSource:
        native = super().open(where)
        if not matrices(native.specs):
            return native
        adapter = StoredAdapter(rank_of(where, native.specs), alpha=None)
        return replace(native, adapter=adapter)

    def open_model(self, where: Path, architecture: Architecture) -> NativeModel:
        from gemma_convert.layouts.tunix.model import open_model

        return open_model(where, architecture)

    def open_adapted(
        self, where: Path, architecture: Architecture, adapter: Path, scaling: float
    ) -> NativeModel:
        from gemma_convert.layouts.tunix.model import open_adapted

        return open_adapted(where, architecture, adapter, scaling)

    def create(self, folder: Path, plan: Plan, form: OrbaxFormat, part: int = 0) -> TunixWriter:
        return TunixWriter(folder / STEP, plan, replace(form, zarr3=False), part)

    def settings(self, plan: Plan, target: Path) -> dict[str, str]:
        adapter = plan.architecture.adapter
        if adapter is not None:
            return adapter_settings(adapter, plan.targets, target)
        return tunix_settings(plan, target)

    def settings_files(self, plan: Plan, target: Path) -> dict[str, str]:
        del target
        return {} if plan.architecture.adapter is not None else settings_files(plan)

    def read_settings(
        self, where: Path, given: GivenSettings, architecture: Architecture | None
    ) -> Settings:
        return read_settings(where, given, architecture)


class TunixWriter(OrbaxWriter):
    """The item folder of a step, without an optimizer state: Tunix begins one of its own."""

    def __init__(self, step: Path, plan: Plan, form: OrbaxFormat, part: int) -> None:
        super().__init__(step / ITEM, form, part)
        self._step = step
        self.declare({name: (target.spec, target.chunk) for name, target in plan.targets.items()})

    def complete(self, started_ns: int, parts: int = 1) -> None:
        self.merge(parts)
        self.write_tree({})
        write_checkpoint_metadata(self._step, {ITEM: _HANDLER}, {}, started_ns)


if TYPE_CHECKING:
    _: AdaptedLayout = Tunix()
