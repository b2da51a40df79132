"""Nothing that belongs to no checkpoint ever goes, whatever is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_convert import TargetError, to_hf, to_native
from gemma_convert.checkpoint.accounted import beside_huggingface, beside_native

FORMS = {
    "zarr": {"layout": "maxtext", "ocdbt": False},
    "ocdbt": {"layout": "maxtext"},
    "zstd": {"layout": "gemma-jax", "ocdbt": False, "compression": "zstd"},
    "gemma-jax": {"layout": "gemma-jax"},
    "fast-llm": {"layout": "fast-llm"},
}


def state(folder: Path) -> dict[str, bytes | str]:
    return {
        str(p.relative_to(folder)): "link" if p.is_symlink() else p.is_file() and p.read_bytes()
        for p in folder.rglob("*")
    }


@pytest.mark.share(3)
@pytest.mark.parametrize("form", FORMS)
def test_what_we_write_is_replaced(form, shallow, converted, tmp_path):
    source = shallow("31b")
    native = converted(source, **FORMS[form])
    assert beside_native(native) == []
    out = tmp_path / "out"
    to_native(source, out, layout="gemma-jax")
    to_native(source, out, overwrite=True, **FORMS[form])
    back = tmp_path / "back"
    to_hf(out, back, max_shard_size=100_000)
    assert beside_huggingface(back) == []
    to_hf(out, back, overwrite=True)
    assert state(back) == state(source)


@pytest.mark.parametrize("name", ["31b", "26b-a4b"])
def test_what_frameworks_wrote_is_replaced(oracle, name):
    for layout in ("gemma_jax", "fast_llm", "maxtext"):
        for folder in (oracle / layout).glob(f"{name}*"):
            if not folder.name.endswith("training"):
                assert beside_native(folder) == [], folder


def test_a_training_run_is_not_replaced(oracle):
    with pytest.raises(TargetError, match="not a native checkpoint"):
        beside_native(oracle / "maxtext" / "31b_scanned_training")


def project(folder: Path) -> None:
    """Somebody's folder, which happens to hold a config.json."""
    (folder / ".git").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "thesis.tex").write_text("x")


def trained(folder: Path) -> None:
    """A training run: steps beside the one that was converted."""
    shutil.copytree(folder / "0", folder / "100")


@pytest.mark.parametrize("make", [project, trained])
def test_what_is_not_ours_is_listed(make, shallow, converted, tmp_path):
    out = tmp_path / "out"
    if make is trained:
        shutil.copytree(converted(shallow("31b"), "maxtext"), out)
    make(out)
    before = state(tmp_path)
    with pytest.raises(TargetError) as caught:
        to_native(shallow("31b"), out, overwrite=True)
    assert ("100/" if make is trained else ".git/") in str(caught.value.found)
    with pytest.raises(TargetError):
        to_hf(converted(shallow("31b"), "maxtext"), out, overwrite=True)
    assert state(tmp_path) == before


def test_swapped_arguments_harm_nothing(shallow, converted, tmp_path):
    original, native = tmp_path / "t", tmp_path / "n"
    shutil.copytree(shallow("31b"), original)
    shutil.copytree(converted(original, "maxtext"), native)
    before = state(tmp_path)
    with pytest.raises(TargetError, match="not a native checkpoint"):
        to_native(native, original, layout="gemma-jax", overwrite=True)
    with pytest.raises(TargetError, match="not a Hugging Face checkpoint"):
        to_hf(converted(shallow("31b"), "gemma-jax"), native, overwrite=True)
    assert state(tmp_path) == before


@pytest.fixture(scope="module")
def targets(shallow, converted, tmp_path_factory) -> dict[str, Path]:
    """One checkpoint of each form to be replaced."""
    source = shallow("31b")
    folder = tmp_path_factory.mktemp("targets")
    made = {form: converted(source, **options) for form, options in FORMS.items()}
    made["huggingface"] = source
    return {n: Path(shutil.copytree(p, folder / n)) for n, p in made.items()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_additions_at_any_depth_are_seen(targets, data):
    form = data.draw(st.sampled_from(sorted(targets)))
    target = targets[form]
    folders = sorted(["", *(str(p.relative_to(target)) for p in target.rglob("*") if p.is_dir())])
    below = target / data.draw(st.sampled_from(folders))
    names = st.sampled_from(["thesis.tex", ".git", "model.bin", "notes", "1", "0x", "c", "d", "hf"])
    name = data.draw(names | st.from_regex(r"[a-zA-Z_.-]{1,8}", fullmatch=True))
    added = below / name
    if added.exists() or added.is_symlink() or name in {".", ".."}:
        return
    kind = data.draw(st.sampled_from(["file", "folder", "link"]))
    if kind == "file":
        added.write_text("x")
    elif kind == "link":
        added.symlink_to("/")
    else:
        added.mkdir()
        (added / "precious").write_text("x")
    try:
        beside = beside_huggingface if form == "huggingface" else beside_native
        others = beside(target)
        if (
            kind == "link"
            or kind == "folder"
            or not form.startswith(("zarr", "zstd", "ocdbt", "gemma"))
        ):
            assert others, added
        elif not others:  # a name that such a store gives its own files
            assert name.strip("0123456789.") in {"c", "d", ""}
    finally:
        shutil.rmtree(added) if kind == "folder" else added.unlink()
    assert beside(target) == []
