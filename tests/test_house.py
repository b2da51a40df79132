"""The rooms of the package: what each may import and name, and that there is no circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import gemma_convert
from gemma_convert.mapping.declared import declarations, layout_names

PACKAGE = Path(gemma_convert.__file__).parent

ROOMS = (
    "version",
    "progress",
    "output",
    "errors",
    "api",
    "files",
    "arrays",
    "model",
    "mapping",
    "stores",
    "checkpoint",
    "engine",
    "prompts",
    "forward",
    "layouts",
    "flops",
    "published",
    "tasks",
    "logits",
    "tiny",
    "cli",
)
"""From the ground up: a room imports itself and those before it."""


def modules() -> dict[str, Path]:
    names = {}
    for file in PACKAGE.rglob("*.py"):
        path = file.relative_to(PACKAGE.parent).with_suffix("")
        names[".".join(path.parts).removesuffix(".__init__")] = file
    return names


def imported(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            below = {f"{node.module}.{alias.name}" for alias in node.names} & set(known)
            yield from below or {node.module}


def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(file, known)) - {name} for name, file in known.items()}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_nothing_but_the_rooms_lies_in_the_root():
    assert {room(name) for name in modules()} == {"", "__main__", *ROOMS}


def test_arrows_between_rooms_go_down():
    up = [
        f"{name} → {other}"
        for name, others in arrows().items()
        for other in others
        if room(name) in ROOMS
        and (room(other) not in ROOMS or ROOMS.index(room(other)) > ROOMS.index(room(name)))
    ]
    assert not up


def test_no_two_modules_import_each_other():
    try:
        TopologicalSorter(arrows()).prepare()
    except CycleError as error:
        raise AssertionError(" → ".join(error.args[1])) from None


def test_a_layout_is_named_in_its_own_room_alone():
    """Elsewhere it stands in examples of the help, in the public default, and in tiny models."""
    example = re.compile(r'--format [a-z-]+|--settings [a-z/]+\.yml|layout(?:: str )?= ?"[a-z-]+"')
    for layout in layout_names():
        own = PACKAGE.parent.joinpath(*declarations()[layout].module.split(".")).parent
        name = re.compile(layout.replace("-", "[-_]"))
        named = {
            file
            for file in PACKAGE.rglob("*.py")
            if name.search(example.sub("", file.read_text(encoding="utf-8")))
        }
        assert {file for file in named if PACKAGE / "tiny" not in file.parents} <= {
            *own.rglob("*.py")
        }, layout
