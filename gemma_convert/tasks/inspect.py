"""What is this? Layout, model, sizes and dtypes of a checkpoint, and whether it is all there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gemma_convert.api.arguments import public
from gemma_convert.arrays.dtypes import DTypePolicy, TensorSpec
from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.adapter_base import KEPT_BASE
from gemma_convert.checkpoint.manifest import read_manifest
from gemma_convert.checkpoint.native import NativeSource
from gemma_convert.errors import SourceError, UsageError
from gemma_convert.layouts.registry import is_native, open_native, usable_layouts
from gemma_convert.mapping.inventory import hf_tensors, huggingface_tensors
from gemma_convert.mapping.planning import plan_to_native
from gemma_convert.mapping.table import HUGGINGFACE, load_table
from gemma_convert.model.adapter import (
    StoredAdapter,
    check_matrices,
    is_adapter,
    named_base,
    read_adapter,
)
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import read_architecture
from gemma_convert.model.foreign import refuse_foreign_folder, refuse_foreign_tensors
from gemma_convert.model.huggingface_files import CONFIG, INDEX, SINGLE
from gemma_convert.output import shown
from gemma_convert.stores.orbax.finding import METADATA
from gemma_convert.stores.remote.locations import local
from gemma_convert.stores.weights import is_huggingface, open_weights

_LAYER = re.compile(r"(?:layers?[._/]|decoder\.)(\d{1,4})[./]", re.ASCII)


@dataclass(frozen=True)
class Coverage:
    """The tensors against those that config.json asks for."""

    expected: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)


@dataclass(frozen=True)
class InspectReport:
    """What a checkpoint contains. `coverage` is None if there is no config.json to compare with."""

    path: str
    layout: str
    family: str | None
    layers: int | None
    scanned: bool | None
    towers: tuple[str, ...]
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    extras: tuple[str, ...]
    config: str | None
    coverage: Coverage | None
    converted_by: str | None
    lossy_rows: tuple[str, ...]
    adapter: StoredAdapter | None = None
    """For an adapter: its rank, and its alpha if that is stored."""
    base_model: str | None = None
    """What an adapter of PEFT names as its base model."""
    step: int | None = None
    """Of a training checkpoint in step folders: the step that was read."""

    def as_json(self) -> dict[str, object]:
        """The report for `--json`."""
        complete = None if self.coverage is None else self.coverage.complete
        return {"schema": "gemma-convert/inspect/2", **asdict(self), "complete": complete}


@public
def inspect(path: str | Path) -> InspectReport:
    """Returns a report of what the checkpoint at `path` contains; only headers are read.

    `path` is a folder, a repository on the hub or a URL of an object store. Raises SourceError if
    it is not a checkpoint in a supported layout, or is broken.
    """
    with ExitStack() as stack:
        return _inspect(local(path, stack, headers=True))


def _inspect(path: Path) -> InspectReport:
    if is_adapter(path):
        return _adapter(path)
    refuse_foreign_folder(path)
    if not path.is_dir():
        what = "This is a file, not a folder." if path.exists() else "There is no such folder."
        raise SourceError(what, where=path, do="give the folder of a checkpoint")
    if is_huggingface(path):
        return _huggingface(path)
    if not is_native(path):
        listed = sorted(entry.name for entry in path.iterdir())
        raise SourceError(
            "This is not a checkpoint in a supported layout.",
            where=path,
            expected=f"{SINGLE}, {INDEX}, torch's .metadata, an Orbax {METADATA}, or the files "
            "of a native layout",
            found=", ".join(listed[:5]) or "nothing",
            do="give a checkpoint of Hugging Face or of "
            + ", ".join(layout.framework for layout in usable_layouts()),
        )
    with open_native(path) as native:
        return _native(path, native)


def _huggingface(path: Path) -> InspectReport:
    with open_weights(path) as reader:
        specs, extras = reader.specs, reader.beside
    refuse_foreign_tensors({name: spec.dtype for name, spec in specs.items()}, str(path))
    if not (path / CONFIG).exists():
        return _report(path, HUGGINGFACE, specs, extras=extras)
    architecture = read_architecture(path)
    tensors = hf_tensors(architecture)
    optional = {tensor.name for tensor in tensors if not tensor.required}
    expected = {tensor.name: tensor.shape for tensor in tensors}
    coverage = _cover(expected, optional, specs)
    return _report(
        path, HUGGINGFACE, specs, architecture, coverage, extras=extras, config=path / CONFIG
    )


def _adapter(path: Path) -> InspectReport:
    adapter = read_adapter(path)
    with open_weights(path) as reader:
        check_matrices(adapter, reader.specs, path)
        report = _report(path, HUGGINGFACE, reader.specs)
    stored = StoredAdapter(adapter.rank, adapter.alpha)
    return replace(report, adapter=stored, base_model=named_base(path))


def _native(path: Path, native: NativeSource) -> InspectReport:
    extras = tuple(sorted({name.partition("/")[0] for name in native.beside}))
    root = sidecar.sidecar_root(native.folder)
    if root is None:
        found = _report(path, native.layout, native.specs, scanned=native.scanned, extras=extras)
        return replace(found, adapter=native.adapter, step=native.step)
    adapter = native.adapter is not None
    kept = Path(sidecar.FOLDER, sidecar.OWN, KEPT_BASE) if adapter else Path(sidecar.FOLDER)
    config = root / kept / CONFIG
    architecture = read_architecture(config)
    report = _report(
        path,
        native.layout,
        native.specs,
        architecture,
        None if adapter else _native_coverage(architecture, native),
        scanned=native.scanned,
        extras=extras,
        config=config,
        manifest=read_manifest(root, damaged=True),
    )
    return replace(report, adapter=native.adapter)


def _native_coverage(architecture: Architecture, native: NativeSource) -> Coverage | None:
    """Coverage against the tree that the table makes of this model; None if it makes none."""
    source = {
        name: TensorSpec("bfloat16", shape)
        for name, shape in huggingface_tensors(architecture, kv_leftovers=False).items()
    }
    try:
        plan = plan_to_native(
            architecture,
            load_table(native.layout, native.version),
            source,
            DTypePolicy(),
            scanned=native.scanned,
            text_only=not native.towers,
        )
    except UsageError:
        return None
    expected = {name: target.spec.shape for name, target in plan.targets.items()}
    return _cover(expected, (), native.specs)


def _cover(
    expected: Mapping[str, tuple[int, ...]],
    optional: Iterable[str],
    specs: Mapping[str, TensorSpec],
) -> Coverage:
    missing = set(expected) - set(specs) - set(optional)
    return Coverage(
        expected=len(set(expected) - set(optional)),
        missing=tuple(sorted(missing)),
        unexpected=tuple(sorted(set(specs) - set(expected))),
        misshapen=tuple(
            f"{name}: expected {list(expected[name])}, found {list(specs[name].shape)}"
            for name in specs
            if name in expected and specs[name].shape != expected[name]
        ),
    )


def _report(
    path: Path,
    layout: str,
    specs: Mapping[str, TensorSpec],
    architecture: Architecture | None = None,
    coverage: Coverage | None = None,
    *,
    scanned: bool | None = None,
    extras: tuple[str, ...] = (),
    config: Path | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> InspectReport:
    lossy = (manifest or {}).get("lossy_rows", [])
    return InspectReport(
        path=shown(path),
        layout=layout,
        family=_family(specs) if architecture is None else architecture.family,
        layers=_layers(specs) if architecture is None else len(architecture.text.layers),
        scanned=scanned,
        towers=tuple(
            tower
            for tower in ("vision", "audio")
            if any(f"{tower}_tower" in name or f"{tower}_encoder" in name for name in specs)
        ),
        tensors=len(specs),
        parameters=sum(spec.size for spec in specs.values()),
        bytes=sum(spec.nbytes for spec in specs.values()),
        dtypes=dict(Counter(spec.dtype for spec in specs.values())),
        extras=extras,
        config=None if config is None else shown(config),
        coverage=coverage,
        converted_by=None if manifest is None else str(manifest.get("tool")),
        lossy_rows=tuple(row["tensor"] for row in lossy),
    )


def _family(specs: Mapping[str, TensorSpec]) -> str | None:
    """The model that the names of the tensors speak of."""
    if any("vision_embedder" in name or "VisionEmbedder" in name for name in specs):
        return "12b"
    if any("per_expert_scale" in name for name in specs):
        return "26b-a4b"
    text = [name for name in specs if "vision" not in name and "audio" not in name]
    if any("per_layer_input_gate" in name for name in specs):
        gates = {specs[n].shape for n in text if re.search(r"wi_0|gate_proj|gating_einsum", n)}
        return "e2b" if len(gates) > 1 else "e4b"
    known = ("decoder", "language_model")
    named = any(_LAYER.search(name) or any(word in name for word in known) for name in text)
    return "31b" if named else None


def _layers(specs: Mapping[str, TensorSpec]) -> int | None:
    """The number of decoder layers, from the names or from the stacking axes of scanned ones."""
    scalars = [spec.shape for name, spec in specs.items() if name.endswith("layer_scalar")]
    stacked = [shape for shape in scalars if len(shape) > 1]
    if stacked:
        return sum(shape[1] * (shape[2] if len(shape) > 2 else 1) for shape in stacked)
    text = (name for name in specs if "vision" not in name and "audio" not in name)
    numbers = [int(match[1]) for name in text if (match := _LAYER.search(name))]
    return max(numbers) + 1 if numbers else None
