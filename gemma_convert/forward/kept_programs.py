"""The programs that XLA compiles, kept from one run to the next in a folder of the user's cache.

JAX writes and reads them, `jax_compilation_cache_dir`; a program goes by what it computes, the
shapes, the versions and the processor, and holds no weights. It is machine code that is run as it
is found: so the folder must be the user's alone, and what is not as a run left it at its end is
removed before it is read. https://docs.jax.dev/en/latest/persistent_compilation_cache.html
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gemma_convert.engine.joined import process_count

MOST_BYTES = 64 << 20
"""Programs of more bytes are removed before a run, the oldest first."""

_FOLDER = Path("gemma-convert") / "compiled"
_PROGRAMS = "*-cache"
_DIGEST = ".sha256"
_JAX_WARNINGS = ".*persistent compilation cache entry"
_OFF = {"jax_enable_compilation_cache": False}


def programs_folder() -> Path | None:
    """Where programs are kept: in `$XDG_CACHE_HOME` or `~/.cache`; None where there is no home."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with suppress(RuntimeError):
        return (cache if cache.is_absolute() else Path.home() / ".cache") / _FOLDER
    return None


@contextmanager
def kept_programs(kept: bool) -> Iterator[None]:
    """Within it JAX keeps what it compiles, and has what was kept; without `kept` neither.

    It is entered once the layout is open: where JAX has not been imported by then, something else
    runs the model. A folder that JAX was told of before, as by `JAX_COMPILATION_CACHE_DIR`, stays
    its folder, with its settings. Several processes keep nothing in ours: some would compile where
    others need not, and XLA may wait for all. What cannot be kept or read is compiled, without a
    word.
    """
    jax = sys.modules.get("jax")
    if jax is None:
        yield
        return
    folder, settings = None, {} if kept else _OFF
    if kept and process_count() == 1 and jax.config.jax_compilation_cache_dir is None:
        folder = _usable(programs_folder())
        settings = {} if folder is None else _in(folder)
    with warnings.catch_warnings(), _configured(jax.config, settings):
        warnings.filterwarnings("ignore", _JAX_WARNINGS)
        if folder is not None:
            _tidy(folder)
        try:
            yield
        finally:
            if folder is not None:
                _note_digests(folder)


def _in(folder: Path) -> dict[str, Any]:
    """JAX's settings: all programs, however soon compiled, and nothing but programs."""
    return {
        "jax_compilation_cache_dir": str(folder),
        "jax_compilation_cache_max_size": -1,
        "jax_persistent_cache_enable_xla_caches": "none",
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_raise_persistent_cache_errors": False,
    }


@contextmanager
def _configured(config: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """JAX with these settings, and with its own again afterwards."""
    from jax.experimental.compilation_cache import compilation_cache

    before = {name: getattr(config, name) for name in settings}
    try:
        for name, value in settings.items():
            config.update(name, value)
        if settings:
            compilation_cache.reset_cache()  # it looks at its settings once
        yield
    finally:
        for name, value in before.items():
            config.update(name, value)
        if settings:
            compilation_cache.reset_cache()


def _usable(folder: Path | None) -> Path | None:
    """`folder`, made where it is missing; None where it cannot be, or others may write into it."""
    if folder is None:
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return None
    shared = found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return None if shared or not os.access(folder, os.W_OK | os.X_OK) else folder


def _tidy(folder: Path) -> None:
    """Removes programs without their digest, as a killed run leaves them, and the oldest."""
    total = 0
    for program in sorted(folder.glob(_PROGRAMS), key=_written, reverse=True):
        with suppress(OSError):
            total += program.stat().st_size
            if total > MOST_BYTES or not _intact(program):
                program.unlink()
    for digest in folder.glob(_PROGRAMS + _DIGEST):
        if not digest.with_suffix("").exists():
            digest.unlink(missing_ok=True)


def _intact(program: Path) -> bool:
    try:
        return _noted(program).read_text(encoding="ascii") == _digest(program)
    except (OSError, UnicodeDecodeError):
        return False


def _note_digests(folder: Path) -> None:
    for program in folder.glob(_PROGRAMS):
        with suppress(OSError):
            if not _noted(program).exists():
                _noted(program).write_text(_digest(program), encoding="ascii")


def _written(program: Path) -> float:
    try:
        return program.stat().st_mtime
    except OSError:
        return 0.0


def _noted(program: Path) -> Path:
    return program.with_name(program.name + _DIGEST)


def _digest(program: Path) -> str:
    with program.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
