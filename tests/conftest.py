"""Fixtures: the oracle folder, where there is one, and tiny checkpoints made once a session."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterator
from functools import cache
from pathlib import Path

import pytest
from cases import SHALLOW
from compiling import QUICK_XLA
from covering import covering
from filelock import FileLock
from hypothesis import settings

os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"gemma-convert-compiled-{os.getuid()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
"""What one test has compiled, the others load, in every worker and subprocess."""

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Test workers share the cores; torch's threads on top of them only get in the way."""

signal.signal(signal.SIGINT, signal.default_int_handler)
"""A shell has jobs in the background ignore Ctrl-C, and what they start inherits that."""

settings.register_profile("shared machine", deadline=None, print_blob=True)
settings.load_profile("shared machine")

MANY, HALVED, HERE = 6, 2, Path(__file__).parent
MANY_MODULES = 200
_modules = [0]
"""How many there were when the collector was last told to leave them alone."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", action="store_true", help="all cases, and the large tests")


def pytest_configure(config: pytest.Config) -> None:
    """`--every` lets XLA compile as it does for users; processes that tests start inherit this."""
    if not config.getoption("--every"):
        os.environ.setdefault("XLA_FLAGS", QUICK_XLA)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """An ordinary run takes a part of each test's cases, and nothing `large`; always the same ones.

    Marked `share(n, first)`: every n-th, from `first` on. Marked `each(strength)`: few in which
    each value of each parameter occurs, or each pair of values. Of tests with many cases that are
    not marked it takes every second one, but for what tests/fuzz and tests/mutations have, which
    choose their share themselves.
    """
    if config.getoption("--every"):
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {item for of_test in cases.values() for item in _share(of_test)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def _share(cases: list[pytest.Item]) -> list[pytest.Item]:
    if cases[0].get_closest_marker("large") is not None:
        return []
    if (mark := cases[0].get_closest_marker("each")) is not None:
        return [cases[place] for place in covering([*map(_values, cases)], *mark.args)]
    if (mark := cases[0].get_closest_marker("share")) is not None:
        step, first = (*mark.args, 0)[:2]
        return cases[min(first, len(cases) - 1) :: step]
    return cases[:: HALVED if len(cases) >= MANY and cases[0].path.parent == HERE else 1]


def _values(case: pytest.Item) -> dict[str, Hashable]:
    """Parameter → its value, or which of those it is that cannot be compared."""
    return {
        name: value if isinstance(value, str | int | float | bool | None) else id(value)
        for name, value in case.callspec.params.items()  # type: ignore[attr-defined]
    }


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not walk through all of it every time."""
    gc.set_threshold(20_000, 20, 20)
    _leave_what_is_imported()


def pytest_runtest_teardown() -> None:
    """Nor through torch, JAX and transformers, which the first test that needs them imports."""
    if len(sys.modules) > _modules[0] + MANY_MODULES:
        _leave_what_is_imported()


def _leave_what_is_imported() -> None:
    gc.collect()
    gc.freeze()
    _modules[0] = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def command_line_built_once() -> Iterator[None]:
    """Typer makes the same commands anew at each call; a process of a command does so once."""
    import typer.main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """What tests write need not outlive a power cut; commands in processes of their own do sync."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def few_prompts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Two of the built-in prompts show what all five do, and the one beyond the window is there."""
    from gemma_convert.prompts import text

    few = {name: text.PROMPTS[name] for name in ("english", "mixed")}
    with pytest.MonkeyPatch.context() as patch:
        if not request.config.getoption("--every"):
            patch.setattr(text, "PROMPTS", few)
        yield


@pytest.fixture(scope="session")
def oracle() -> Path:
    """Checkpoints that the real frameworks wrote; set GEMMA_CONVERT_ORACLE to use them."""
    folder = os.environ.get("GEMMA_CONVERT_ORACLE")
    if not folder:
        pytest.skip("GEMMA_CONVERT_ORACLE is not set: no checkpoints of the real frameworks here")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(family, **options): the folder of a tiny checkpoint, made once and never written to."""
    from gemma_convert.tiny import make_tiny

    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent

    def make(family: str, **options) -> Path:
        words = "-".join(f"{key}={value}" for key, value in sorted(options.items()))
        folder = root / f"tiny-{family}-{words}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                make_tiny(family, folder, **options)
        return folder

    return make


@pytest.fixture(scope="session")
def shallow(tiny) -> Callable[..., Path]:
    """shallow(family, scanned): tiny with few layers; scanned ones fill two blocks, not one."""

    def make(family: str, scanned: bool = False, **options) -> Path:
        return tiny(family, layers=SHALLOW[family] * (1 + scanned), **options)

    return make


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """converted(source, layout, **options): a conversion, made once and never written to."""
    from gemma_convert import to_native

    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent

    def convert(source: Path, layout: str, **options) -> Path:
        words = "-".join(f"{key}={value}" for key, value in sorted(options.items()))
        folder = root / f"{layout}-of-{source.name}-{words}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                to_native(source, folder, layout=layout, **options)
        return folder

    return convert
