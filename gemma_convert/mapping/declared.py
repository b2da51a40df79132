"""The native layouts that are installed, by their entry points; no module of theirs is imported.

A package declares a layout in the group `gemma_convert.layouts`: its name, and the object or class
that `gemma_convert.layouts.registry` loads when the layout is used. Those of this package are
declared in its own pyproject.toml.
"""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from importlib.util import find_spec
from pathlib import Path

from gemma_convert.errors import UsageError

GROUP = "gemma_convert.layouts"

_OWN = GROUP.partition(".")[0]
_HUGGINGFACE = ("huggingface", "hugging-face", "hf", "safetensors")
_PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@cache
def declarations() -> EntryPoints:
    """What all packages declare, looked up once.

    In a source checkout that is not installed, or was before it declared them, the layouts of this
    package are read from its pyproject.toml.
    """
    found = entry_points(group=GROUP)
    if any(map(is_own, found)) or not _PROJECT.is_file():
        return found
    project = tomllib.loads(_PROJECT.read_text(encoding="utf-8")).get("project", {})
    own = project.get("entry-points", {}).get(GROUP, {})
    return EntryPoints((*(EntryPoint(name, own[name], GROUP) for name in own), *found))


def layout_names() -> tuple[str, ...]:
    """The names of all layouts: those of this package, then those of others."""
    found = declarations()
    return tuple(sorted(found.names, key=lambda name: (not is_own(found[name]), name)))


def declaration(layout: str) -> EntryPoint:
    """What declares a layout. Raises UsageError where nothing does, or two packages do."""
    found = list(declarations().select(name=layout))
    if not found:
        raise UsageError(
            f"There is no layout `{layout}`.",
            expected=", ".join(layout_names()),
            do=_instead(layout),
        )
    if len(found) > 1:
        raise UsageError(
            f"Several installed packages define a layout `{layout}`.",
            found=", ".join(map(package, found)),
            do="remove all of them but one",
        )
    return found[0]


def _instead(layout: str) -> str:
    """What may have been meant by a layout that there is not."""
    if layout.lower() in _HUGGINGFACE:
        return "to-hf writes Hugging Face files"
    close = get_close_matches(layout.lower(), layout_names(), 1)
    return f"did you mean {close[0]}?" if close else "choose one with --format"


def is_own(declared: EntryPoint) -> bool:
    """Whether a layout is one of this package's."""
    return declared.module.partition(".")[0] == _OWN


def package(declared: EntryPoint) -> str:
    """The package that brings a layout and its version, for people."""
    found = declared.dist
    return declared.value if found is None else f"{found.name} {found.version}"


def module_folder(declared: EntryPoint) -> Path:
    """The folder that a layout's module lies in, found without importing the module.

    Raises UsageError where there is no such module.
    """
    top, *rest = declared.module.split(".")
    spec = find_spec(top)
    for location in (spec and spec.submodule_search_locations) or ():
        module = Path(location, *rest)
        if module.is_dir():
            return module
        if module.with_suffix(".py").is_file():
            return module.parent
    if spec is not None and spec.origin is not None and not rest:
        return Path(spec.origin).parent
    raise UsageError(
        f"The layout `{declared.name}` has no module.",
        where=f"package {package(declared)}",
        expected=declared.module,
        do="install the package again, or remove it",
    )
