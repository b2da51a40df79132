"""MaxText on disk: an Orbax step folder `0/items` with the tree `params.params.<module>`.

Read as well are training checkpoints, beside whose parameters stand a step and optimizer state that
are never read, and NNX trees as MaxText's training after the first has them (0.2.5): parameters at
the root, or below `base`, with `value` leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.checkpoint.native import NativeSource
from gemma_convert.checkpoint.orbax_layout import OrbaxLayout, bare_names
from gemma_convert.checkpoint.qwix import VALUE
from gemma_convert.files.given_settings import GivenSettings
from gemma_convert.layouts.maxtext.adapter import matrices, stored_adapter, told_adapter
from gemma_convert.layouts.maxtext.names import MODULES
from gemma_convert.layouts.maxtext.settings import maxtext_settings, read_settings, settings_files
from gemma_convert.mapping.native_facts import Settings
from gemma_convert.mapping.plan import Plan
from gemma_convert.model.architecture import Architecture
from gemma_convert.stores.orbax.writer import OrbaxFormat, OrbaxWriter, write_checkpoint_metadata

if TYPE_CHECKING:
    from gemma_convert.forward.native_model import NativeModel
    from gemma_convert.layouts.registry import AdaptedLayout

STEP, ITEMS = "0", "items"

PARAMETERS = "params/params/"
_VISION = PARAMETERS + "vision_encoder/"
_EMBEDDER, _WITH_EMBEDDER = _VISION + "Gemma4UnifiedVisionEmbedder_0/", "85b12b8"
_SCANNED = "/scanned_blocks/"
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"


_BESIDE_PARAMETERS = {
    "step": {"value_type": "scalar", "skip_deserialize": False},
    "opt_state": {"value_type": "Dict", "skip_deserialize": True},
}


class MaxText(OrbaxLayout):
    name = "maxtext"
    framework = "MaxText"

    def stored(self, arrays: Iterable[str]) -> Mapping[str, str]:
        names = bare_names(arrays, *MODULES)
        return matrices(names) or {
            PARAMETERS + name: path
            for name, path in names.items()
            if path.startswith(PARAMETERS) or name.split("/")[0] in MODULES
        }

    def open(self, where: Path) -> NativeSource:
        native = super().open(where)
        if not matrices({name.removesuffix(VALUE): name for name in native.specs}):
            return native
        return replace(native, adapter=stored_adapter(where, native.specs))

    def scanned(self, arrays: Iterable[str]) -> bool:
        return any(_SCANNED in name for name in arrays)

    def version(self, arrays: Iterable[str]) -> str | None:
        return _WITH_EMBEDDER if any(name.startswith(_EMBEDDER) for name in arrays) else None

    def open_model(self, where: Path, architecture: Architecture) -> NativeModel:
        from gemma_convert.layouts.maxtext.model import open_model

        return open_model(where, architecture)

    def open_adapted(
        self, where: Path, architecture: Architecture, adapter: Path, scaling: float
    ) -> NativeModel:
        from gemma_convert.layouts.maxtext.model import open_adapted

        return open_adapted(where, architecture, adapter, scaling)

    def create(self, folder: Path, plan: Plan, form: OrbaxFormat, part: int = 0) -> MaxTextWriter:
        return MaxTextWriter(folder / STEP, plan, form, part)

    def settings(self, plan: Plan, target: Path) -> dict[str, str]:
        return maxtext_settings(plan, _items(target), multimodal=_sees(plan))

    def settings_files(self, plan: Plan, target: Path) -> dict[str, str]:
        if plan.architecture.adapter is not None:
            return {}
        return settings_files(plan, _items(target), multimodal=_sees(plan))

    def read_settings(
        self, where: Path, given: GivenSettings, architecture: Architecture | None
    ) -> Settings:
        return read_settings(where, given, architecture)


def _items(target: Path) -> Path:
    return target.absolute() / STEP / ITEMS


def _sees(plan: Plan) -> bool:
    return any(name.startswith(_VISION) for name in plan.targets)


class MaxTextWriter(OrbaxWriter):
    """The item folder of a step, with the step's number and an empty optimizer state beside it.

    An adapter stands there alone, as MaxText's fine-tuning saves it.
    """

    def __init__(self, step: Path, plan: Plan, form: OrbaxFormat, part: int) -> None:
        super().__init__(step / ITEMS, form, part)
        self._step, self._adapter = step, plan.architecture.adapter
        self._custom: dict[str, object] = {"scan_layers": plan.scanned}
        arrays = {name: (target.spec, target.chunk) for name, target in plan.targets.items()}
        if self._adapter is None:
            arrays["step"] = TensorSpec("int32", ()), ()
        else:
            self._custom |= told_adapter(self._adapter)
        self.declare(arrays)

    def complete(self, started_ns: int, parts: int = 1) -> None:
        self.merge(parts)
        if self._adapter is None:
            self.write("step", (), np.zeros((), np.int32)).result()
        self.write_tree({} if self._adapter is not None else _BESIDE_PARAMETERS)
        custom = self._custom
        write_checkpoint_metadata(self._step, {ITEMS: _HANDLER}, custom, started_ns)


if TYPE_CHECKING:
    _: AdaptedLayout = MaxText()
