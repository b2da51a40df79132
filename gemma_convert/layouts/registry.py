"""The native layouts that are installed, and which of them a folder holds.

A layout's module is imported when it is used: by its name, or because a folder has to be
recognised. One that cannot be is told by its package's name, and keeps no other from its work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Protocol, cast

from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.adapter_original import scaled_adapter
from gemma_convert.checkpoint.layout import Layout
from gemma_convert.checkpoint.manifest import read_manifest
from gemma_convert.checkpoint.native import NativeSource, fingerprint
from gemma_convert.checkpoint.native_folder import NativeFolder
from gemma_convert.errors import SourceError, UsageError, short, some
from gemma_convert.files.given_settings import GivenSettings
from gemma_convert.forward.native_model import NativeModel
from gemma_convert.mapping.declared import declaration, layout_names, package
from gemma_convert.mapping.facts import FactTable, load_facts
from gemma_convert.mapping.native_facts import NativeFacts, Settings, native_facts
from gemma_convert.mapping.table import load_table
from gemma_convert.model.adapter import StoredAdapter
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import parse_architecture
from gemma_convert.output import note, shown
from gemma_convert.stores.orbax.finding import find_trees, passed_over, step_of
from gemma_convert.stores.weights import is_huggingface

_FACTS = {"name": str, "framework": str, "divisible": bool, "streams": bool}
_MODEL_KEYS = frozenset({"model_name", "model"})
"""The settings that name a framework's model."""

_METHODS = ("find", "open", "create", "settings", "settings_files", "check_metadata")


class RunnableLayout(Layout, Protocol):
    """A layout that has a forward pass, which a layout need not have."""

    def open_model(self, where: Path, architecture: Architecture) -> NativeModel:
        """The checkpoint that `find` found, to be run.

        Raises SourceError where it does not fit `architecture`.
        """


class AdaptedLayout(RunnableLayout, Protocol):
    """A layout that runs a checkpoint with an adapter on it, which a layout need not do."""

    def open_adapted(
        self, where: Path, architecture: Architecture, adapter: Path, scaling: float
    ) -> NativeModel:
        """The checkpoint that `find` found, with the adapter that it found in another folder.

        What the adapter adds is its product of two matrices, times `scaling`. Raises SourceError
        where either does not fit `architecture`.
        """


class ToldLayout(Layout, Protocol):
    """A layout whose framework is told facts of a model, which a layout need not declare."""

    def read_settings(
        self, where: Path, given: GivenSettings, architecture: Architecture | None
    ) -> Settings:
        """What the framework is told of the checkpoint that `find` found.

        By `given`, or by what lies beside it, or by the framework's own model of `architecture`.
        Raises SourceError where it cannot be read.
        """


@cache
def load_layout(name: str) -> Layout:
    """The layout `name`, its module imported.

    Raises UsageError where there is none, or where it cannot be imported or is not a layout.
    """
    declared = declaration(name)
    try:
        found = declared.load()
        found = found() if isinstance(found, type) else found
    except Exception as error:  # whatever another package's module raises
        raise _unusable(declared, f"{type(error).__name__}: {error}") from error
    lacking = list(_lacking(found, name))
    if lacking:
        raise _unusable(declared, f"a layout with {', '.join(lacking)}")
    return cast(Layout, found)


def open_native(path: Path, block_bytes: int | None = None) -> NativeSource:
    """The native checkpoint at `path`, whatever its layout, to be read in blocks of that size.

    Raises SourceError where there is none, or none of a known layout.
    """
    layout, where = _recognised(path)
    found = fingerprint(where)
    native = layout.open(where)
    step = step_of(where)
    root, manifest = _manifest(where)
    version = _recorded_version(manifest, native.layout, root) or native.version
    adapter = _with_alpha(native.adapter, manifest)
    return replace(
        native,
        block_bytes=block_bytes,
        fingerprint=found,
        version=version,
        adapter=adapter,
        step=None if step is None or root is not None else int(step.name),
    )


def open_model(path: Path, architecture: Architecture) -> NativeModel:
    """The native checkpoint at `path`, to be run by its layout's forward pass.

    Raises SourceError where it does not fit `architecture`, UsageError where its layout has no
    forward pass.
    """
    layout, where = _recognised(path)
    if getattr(layout, "open_model", None) is None:
        raise UsageError(
            f"The layout {layout.name} has no forward pass, so its logits cannot be checked.",
            where=where,
            do="check it with gemma-convert verify",
        )
    return cast(RunnableLayout, layout).open_model(where, architecture)


def open_adapted_model(
    path: Path, architecture: Architecture, adapter: Path, alpha: float | None
) -> NativeModel:
    """The native checkpoint at `path`, to be run with the native adapter at `adapter` on it.

    `alpha` is the adapter's, if not what it says itself. Raises SourceError where one of them does
    not fit `architecture`, UsageError where they are of two layouts, where the layout does not run
    adapters, or where nothing says what alpha is.
    """
    layout, where = _recognised(path)
    with open_native(adapter) as native:
        if native.adapter is None or native.layout != layout.name:
            raise UsageError(
                "An adapter is put on a native checkpoint of its own layout.",
                where=where,
                expected=f"a model of layout {native.layout}",
                found=f"layout {layout.name}",
                do="convert the base model to that layout, and name it with --native-base",
            )
        scaling = scaled_adapter(native.adapter, alpha, native.folder).scaling
    if getattr(layout, "open_adapted", None) is None:
        raise UsageError(
            f"The layout {layout.name} does not run adapters, so their logits cannot be checked.",
            where=native.folder,
            do="check it with gemma-convert verify",
        )
    runs = cast(AdaptedLayout, layout)
    return runs.open_adapted(where, architecture, native.folder, scaling)


def read_facts(
    path: Path,
    config: Mapping[str, Any],
    where: Path,
    given: GivenSettings,
    *,
    usual: bool = True,
) -> NativeFacts | None:
    """The model of config.json, parsed from `where`, as the framework of `path` runs it.

    Single settings without a config leave the rest to the framework's own model, whose `usual`
    values count then, or else those of config.json. None where the layout declares no facts. Raises
    SourceError where settings cannot be read or are those of another model, UsageError where
    `given` ones have no place.
    """
    told = read_settings(path, given, parse_architecture(config, where))
    if told is None:
        return None
    table, settings = told
    known = {*settings.rest, *filter(None, (row.native for row in table.rows)), *_MODEL_KEYS}
    for key in sorted(given.typed - known):
        near = "".join(f" Did you mean {one}?" for one in get_close_matches(key, known, 1))
        note(
            f"the setting {short(key)} matches no key of config.json; it has no effect.{near}",
            "warning",
        )
    single = settings.own == given.pairs and _MODEL_KEYS.isdisjoint(given.pairs)
    if single and not usual:
        settings = replace(settings, rest={})
    return native_facts(table, settings, config, where)


def read_settings(
    path: Path, given: GivenSettings, architecture: Architecture | None
) -> tuple[FactTable, Settings] | None:
    """What the framework of the checkpoint at `path` is told, and the table that says how.

    None where the layout declares no facts. Raises as `read_facts` does.
    """
    layout, native = _recognised(path)
    table = load_facts(layout.name)
    if table is None or getattr(layout, "read_settings", None) is None:
        if given:
            raise UsageError(
                f"The layout {layout.name} has no settings.", do="leave out --settings"
            )
        return None
    return table, cast(ToldLayout, layout).read_settings(native, given, architecture)


def is_native(path: Path) -> bool:
    """Whether a folder holds a native checkpoint rather than Hugging Face files."""
    if is_huggingface(path):
        return False
    folder = NativeFolder(path)
    return bool(folder.trees) or next(_found(folder), None) is not None


def native_layout(path: Path) -> str | None:
    """The name of the layout of a native checkpoint; None where `path` is none that is known."""
    if is_huggingface(path):
        return None
    return next((layout.name for layout, _ in _found(NativeFolder(path))), None)


def usable_layouts(unusable: list[UsageError] | None = None) -> Iterator[Layout]:
    """All layouts but those that cannot be used, whose errors are added to `unusable`."""
    for name in layout_names():
        try:
            layout = load_layout(name)
        except UsageError as error:
            if unusable is not None:
                unusable.append(error)
            continue
        yield layout


def _recognised(path: Path) -> tuple[Layout, Path]:
    folder, unusable = NativeFolder(path), list[UsageError]()
    for layout, where in _found(folder, unusable):
        _tell_step(where, *passed_over(path, where))
        return layout, where
    if is_huggingface(path):
        raise SourceError(
            "This is a Hugging Face checkpoint already, where a native one is expected.",
            where=path,
            do="give the native checkpoint; to-native makes one of a Hugging Face checkpoint",
        )
    trees = find_trees(path)
    names = {name.split("/")[0] for arrays in folder.trees.values() for name in arrays}
    raise SourceError(
        "The checkpoint has no parameters in a supported layout.",
        where=some(list(map(str, trees))),
        expected=f"a checkpoint of {', '.join(one.framework for one in usable_layouts())}",
        found=some(sorted(names)) or "no arrays",
        do=f"{unusable[0].do}: {unusable[0].what}" if unusable else None,
    )


@cache
def _tell_step(where: Path, *higher: Path) -> None:
    """Tells once that a step was read although there are `higher` ones."""
    step = step_of(where)
    if step is not None and higher:
        names = some(sorted((one.name for one in higher), key=int))
        note(
            f"step {names} in {shown(step.parent)} has no complete checkpoint and was passed over; "
            f"step {step.name} is read",
            "warning",
        )


def _manifest(where: Path) -> tuple[Path | None, Mapping[str, Any]]:
    """The folder of a conversion and its manifest, empty for what was not converted."""
    root = sidecar.sidecar_root(where)
    return root, (None if root is None else read_manifest(root, damaged=True)) or {}


def _with_alpha(stored: StoredAdapter | None, manifest: Mapping[str, Any]) -> StoredAdapter | None:
    """The adapter with the alpha that the framework was told, where it says none itself."""
    told = manifest.get("adapter")
    if stored is None or stored.alpha is not None or told is None:
        return stored
    return replace(stored, alpha=told["alpha"])


def _recorded_version(manifest: Mapping[str, Any], layout: str, root: Path | None) -> str | None:
    """The version of the framework that a manifest names, where it has one.

    Raises SourceError for one that the table of `layout` does not know.
    """
    version = manifest.get("framework_version")
    if version is None:
        return None
    try:
        return load_table(layout, version).version
    except UsageError as error:
        raise SourceError(
            "The checkpoint was converted for an unsupported version of its framework.",
            where=root,
            expected=error.expected,
            found=short(version),
            do="read it with the version of gemma-convert that wrote it, or a later one",
        ) from None


def _found(
    folder: NativeFolder, unusable: list[UsageError] | None = None
) -> Iterator[tuple[Layout, Path]]:
    """The layouts that have a checkpoint in `folder`, and where."""
    for layout in usable_layouts(unusable):
        where = layout.find(folder)
        if where is not None:
            yield layout, where


def _lacking(found: Any, name: str) -> Iterator[str]:
    """What `found` has not that a layout has."""
    for fact, kind in _FACTS.items():
        if not isinstance(getattr(found, fact, None), kind):
            yield f"no {fact}"
    if isinstance(getattr(found, "name", None), str) and found.name != name:
        yield f"the name {short(found.name)}"
    for method in _METHODS:
        if not callable(getattr(found, method, None)):
            yield f"no {method}"


def _unusable(declared: EntryPoint, found: str) -> UsageError:
    return UsageError(
        f"The layout `{declared.name}` cannot be used.",
        where=f"package {package(declared)}, {declared.value}",
        expected="what gemma_convert.checkpoint.layout.Layout asks for",
        found=short(found),
        do=f"repair or remove the package {package(declared)}",
    )
