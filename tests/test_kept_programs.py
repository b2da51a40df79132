"""What is compiled, once for a kind of layer, is kept; no kept file can hurt a check."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import said
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from gemma_convert.forward import decoder_layer, kept_programs
from gemma_convert.forward.kept_programs import kept_programs as kept
from gemma_convert.forward.kept_programs import programs_folder
from gemma_convert.logits.check import logit_check

HITS, MISSES = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
SETTINGS = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
JAX_LAYOUTS = (("maxtext", False), ("maxtext", True), ("gemma-jax", False))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where programs are kept, with a JAX that was told of no folder."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield tmp_path / "cache" / "gemma-convert" / "compiled"
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def run(wanted=True):
    """(loaded, compiled) programs of a small function, run with nothing in memory."""
    seen = []
    monitoring.register_event_listener(listener := lambda event, **_: seen.append(event))
    jax.clear_caches()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with kept(wanted):
                found = jax.jit(lambda x: jnp.sin(x) @ x + 3)(np.eye(4, dtype=np.float32))
    finally:
        monitoring.unregister_event_listener(listener)
    np.testing.assert_allclose(found, np.sin(1) * np.eye(4) + 3, rtol=1e-6)
    return seen.count(HITS), seen.count(MISSES)


def programs(folder):
    return sorted(folder.glob("*-cache"))


def test_the_second_run_loads_what_the_first_one_compiled(folder):
    assert run() == (0, 1)
    assert len(programs(folder)) == 1 and folder.stat().st_mode & 0o777 == 0o700
    assert run() == (1, 0)
    assert run(False) == (0, 0) and run() == (1, 0)


def test_settings_of_jax_are_its_own_again(folder):
    before = [getattr(jax.config, name) for name in SETTINGS]
    with pytest.raises(RuntimeError, match="mine"), kept(True):
        assert jax.config.jax_compilation_cache_dir == str(folder)
        raise RuntimeError("mine")
    assert [getattr(jax.config, name) for name in SETTINGS] == before
    files = sorted(folder.iterdir())
    jax.jit(lambda x: x * 5 - 1)(np.ones(3))
    assert sorted(folder.iterdir()) == files


def test_without_the_cache_nothing_is_made_and_nothing_read(folder, tmp_path):
    assert run(False) == (0, 0) and not folder.exists()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    assert run(False) == (0, 0) and not (tmp_path / "theirs").exists()


def test_a_folder_that_jax_was_told_of_stays_its_folder(folder, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    assert run() == (0, 1)
    assert run() == (1, 0)
    assert programs(tmp_path / "theirs") and not folder.exists()


DAMAGE = {
    "cut": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "no program": lambda raw: b"no program at all",
    "one bit": lambda raw: raw[:200] + bytes([raw[200] ^ 1]) + raw[201:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_program_is_replaced(folder, damage):
    run()
    (program,) = programs(folder)
    program.write_bytes(damage(program.read_bytes()))
    assert run() == (0, 1)
    assert run() == (1, 0)


@pytest.mark.parametrize("name", [name for name in DAMAGE if name != "one bit"])
def test_a_damaged_program_of_a_right_digest_is_compiled_anew(folder, name):
    """As one that was cut off while another run ended. Of one bit the digest alone tells."""
    run()
    (program,) = programs(folder)
    program.write_bytes(DAMAGE[name](program.read_bytes()))
    digest = program.with_name(program.name + ".sha256")
    digest.write_text(kept_programs._digest(program))
    assert run()[0] == 0


def test_a_program_without_a_digest_is_not_run(folder):
    """A killed run leaves it."""
    run()
    (digest,) = folder.glob("*.sha256")
    digest.unlink()
    assert run() == (0, 1) and digest.exists()
    programs(folder)[0].unlink()
    run(True)
    assert run() == (1, 0)


def test_a_folder_that_others_may_write_into_is_not_used(folder):
    run()
    for mode in (0o770, 0o707):
        folder.chmod(mode)
        assert run() == (0, 0)
    folder.chmod(0o755)
    assert run() == (1, 0)


def test_a_folder_of_somebody_else_is_not_used(folder, monkeypatch):
    run()
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert run() == (0, 0)


def test_where_nothing_can_be_written_all_is_compiled(folder, monkeypatch):
    folder.parent.parent.mkdir()
    folder.parent.write_text("a file")
    assert run() == (0, 0) and folder.parent.read_text() == "a file"
    folder.parent.unlink()

    def full(self, key, value):
        (self.path / f"{key}-cache").write_bytes(value[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("jax._src.lru_cache.LRUCache.put", full)
        run()
    (program,) = programs(folder)
    assert program.stat().st_size == 10
    assert run()[0] == 0


def test_several_processes_keep_nothing_in_ours(folder, monkeypatch):
    monkeypatch.setattr(kept_programs, "process_count", lambda: 2)
    assert run() == (0, 0) and not folder.exists()


def test_the_oldest_programs_go_first(folder, monkeypatch):
    run()
    (program,) = programs(folder)
    for age in range(1, 6):
        other = folder / f"other-{age}-cache"
        other.write_bytes(program.read_bytes())
        written = program.stat().st_mtime - age
        os.utime(other, (written, written))
    kept_programs._note_digests(folder)
    monkeypatch.setattr(kept_programs, "MOST_BYTES", 3 * program.stat().st_size)
    assert run() == (1, 0)
    assert {one.name for one in programs(folder)} == {
        program.name,
        "other-1-cache",
        "other-2-cache",
    }
    assert len(list(folder.iterdir())) == 6


def test_where_it_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for set_to in (None, "", "relative/place"):
        if set_to is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", set_to)
        assert programs_folder() == Path("/home/somebody/.cache/gemma-convert/compiled")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert programs_folder() == Path("/caches/gemma-convert/compiled")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert programs_folder() is None and kept_programs._usable(None) is None


@pytest.mark.share(3)
@pytest.mark.parametrize(("layout", "scanned"), JAX_LAYOUTS)
def test_a_layer_is_compiled_once_for_its_kind(shallow, converted, layout, scanned):
    """31B has two kinds, sliding and full; prompts come in two lengths: short ones, and one."""
    source = shallow("31b")
    native = converted(source, layout, **({"scan_layers": True} if scanned else {}))
    decoder_layer.layer.clear_cache()
    report = logit_check(source, native)
    assert report.passed and len(report.drift.layers) == 6
    assert decoder_layer.layer._cache_size() == 4


def checked(*arguments):
    """What logit-check says, with nothing compiled in memory."""
    jax.clear_caches()
    code, output, errors = said("logit-check", *arguments)
    assert (code, errors) == (0, "")
    return output


def test_by_the_command(folder, shallow, converted, tmp_path):
    source = shallow("31b")
    native = converted(source, "gemma-jax")
    arguments = (source, native, "--tokens", 3)
    checked(*arguments, "--no-cache")
    assert list(tmp_path.iterdir()) == []
    checked(*arguments)
    made = {one: one.stat().st_mtime_ns for one in folder.iterdir()}
    assert any(one.name.startswith("jit_layer-") for one in made)
    damaged = next(one for one in made if one.name.endswith("-cache"))
    damaged.write_bytes(b"damaged")
    assert "same model" in checked(*arguments)
    after = {one: one.stat().st_mtime_ns for one in folder.iterdir()}
    anew = {one.name.removesuffix(".sha256") for one in made if after[one] != made[one]}
    assert after.keys() == made.keys() and anew == {damaged.name}
