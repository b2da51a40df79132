"""No command reads or copies what lies outside the folders that it is given."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from gemma_convert.cli.app import main
from gemma_convert.errors import SourceError

NATIVE = {
    "zarr": ("maxtext", {"ocdbt": False}),
    "ocdbt": ("maxtext", {}),
    "gemma-jax": ("gemma-jax", {}),
    "fast-llm": ("fast-llm", {}),
}
TRIED = 24
"""Files and folders of a checkpoint that are tried, evenly chosen."""

Folders = dict[str, Path]


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and standard error of a command, run in this process."""
    errors = io.StringIO()
    before, sys.argv = sys.argv, ["gemma-convert", *map(str, arguments)]
    try:
        with (
            redirect_stdout(io.StringIO()),
            redirect_stderr(errors),
            pytest.raises(SystemExit) as end,
        ):
            main()
    finally:
        sys.argv = before
    return int(end.value.code or 0), errors.getvalue()


def native_readers(n: Path, f: Folders, out: Path) -> Iterator[tuple[object, ...]]:
    """Every command that reads the native checkpoint `n`."""
    yield "inspect", n
    yield "verify", n
    yield "verify", n, "--against", f["hf"]
    yield "verify", f["back"], "--against", n
    yield "to-hf", n, out
    yield "to-hf", n, out, "--like", f["hf"]
    yield "to-hf", f["zarr"], out, "--like", n
    yield "to-native", n, out, "--format", "gemma-jax"
    yield "to-native", f["zarr"], out, "--format", "gemma-jax", "--like", n
    yield "to-native", n, out, "--format", "maxtext", "--dry-run"
    yield "logit-check", f["hf"], n, "--tokens", 5
    yield "logit-check", f["hf"], n, "--tokens", 5, "--whole-model"
    yield "flops", n, "--seq-len", 8


def hf_readers(hf: Path, f: Folders, out: Path) -> Iterator[tuple[object, ...]]:
    """Every command that reads the Hugging Face checkpoint `hf`."""
    yield "inspect", hf
    yield "to-native", hf, out, "--format", "maxtext"
    yield "to-native", hf, out, "--format", "fast-llm", "--dry-run"
    yield "verify", f["zarr"], "--against", hf
    yield "verify", hf, "--against", f["zarr"]
    yield "to-hf", f["zarr"], out, "--like", hf
    yield "to-native", f["zarr"], out, "--format", "gemma-jax", "--like", hf
    yield "golden", hf, out
    yield "logit-check", hf, f["zarr"]
    yield "logit-check", hf, f["zarr"], "--golden", f["golden"]
    yield "flops", hf, "--seq-len", 8
    yield "mappings", "--format", "maxtext", "--model", hf


@pytest.fixture(scope="module")
def folders(tiny, converted, tmp_path_factory) -> Folders:
    """A Hugging Face checkpoint in three shards, its conversions, an export and golden logits."""
    hf = tiny("31b", layers=6, shards=3)
    work = tmp_path_factory.mktemp("confined")
    found = {name: converted(hf, layout, **how) for name, (layout, how) in NATIVE.items()}
    found |= {"hf": hf, "back": work / "back", "golden": work / "golden.safetensors"}
    assert run("to-hf", found["zarr"], found["back"])[0] == 0
    assert run("golden", hf, found["golden"], "--tokens", 5)[0] == 0
    return found


def readers(name: str) -> Callable[[Path, Folders, Path], Iterator[tuple[object, ...]]]:
    return hf_readers if name == "hf" else native_readers


def copied(folder: Path, to: Path) -> Path:
    """A copy of `folder` whose files are hard links."""
    shutil.copytree(folder, to)
    return to


def entries(folder: Path) -> list[str]:
    """Files and folders below `folder`, those at the top among them."""
    found = sorted(
        (str(p.relative_to(folder)) for p in folder.rglob("*")), key=lambda n: n.count("/")
    )
    return found[:: len(found) // TRIED + 1]


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_ino for path in folder.rglob("*")}


@pytest.mark.share(5)
@pytest.mark.parametrize("name", ["hf", *NATIVE])
def test_no_command_follows_a_link_out_of_the_folder(name: str, folders: Folders, tmp_path) -> None:
    """What is moved away, and linked to from its old place, is not read by any command."""
    folder, out = copied(folders[name], tmp_path / "in"), tmp_path / "out"
    commands = list(readers(name)(folder, folders, out))
    for number, entry in enumerate(entries(folder)):
        outside = tmp_path / "outside"
        (folder / entry).rename(outside)
        (folder / entry).symlink_to(outside)
        before = snapshot(tmp_path)
        for command in commands if number < 2 else commands[number % len(commands) :][:1]:
            code, said = run(*command)
            assert code == 3, (command, entry, said)
            assert str(folder / entry) in said, (command, said)
            assert str(outside) in said, (command, said)
            assert snapshot(tmp_path) == before, command
        (folder / entry).unlink()
        outside.rename(folder / entry)


@pytest.mark.share(5, 2)
@pytest.mark.parametrize("name", ["hf", *NATIVE])
def test_every_command_refuses_linked_folders_pipes_and_devices(
    name: str, folders: Folders, tmp_path
) -> None:
    folder, out = copied(folders[name], tmp_path / "in"), tmp_path / "out"
    deep = (
        next(path for path in sorted(folder.rglob("*")) if path.is_dir())
        if name != "hf"
        else folder
    )
    (folder / "inside").mkdir()
    planted = deep / "planted"
    for plant in (
        lambda: planted.symlink_to(folder / "inside"),
        lambda: planted.symlink_to("/dev/zero"),
        lambda: os.mkfifo(planted),
    ):
        plant()
        for command in readers(name)(folder, folders, out):
            code, said = run(*command)
            assert code == 3, (command, said)
            assert str(planted) in said
        planted.unlink()
    assert not out.exists()


@pytest.mark.share(3)
@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/secret.safetensors", "a/../b", "..", "x\\y"]
)
def test_no_command_takes_paths_from_an_index(name: str, folders: Folders, tmp_path) -> None:
    folder, out = copied(folders["hf"], tmp_path / "in"), tmp_path / "out"
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, *_ = content["weight_map"]
    shard = folder / content["weight_map"][first]
    shutil.copy(shard, tmp_path / "secret.safetensors")
    named = str(tmp_path / name[1:]) if name.startswith("/") else name
    content["weight_map"] = {
        tensor: named if file == shard.name else file
        for tensor, file in content["weight_map"].items()
    }
    index.unlink()
    index.write_text(json.dumps(content))
    for command in hf_readers(folder, folders, out):
        if command[0] not in ("flops", "mappings") and "--golden" not in command:
            code, said = run(*command)
            assert code == 3, (command, said)
            assert "plain file name" in said, (command, said)
    assert not out.exists()


@pytest.mark.share(3)
@pytest.mark.parametrize("deep", ["", "0", "0/items"])
def test_a_sidecar_above_the_folder_that_is_named(deep: str, folders: Folders, tmp_path) -> None:
    """The sidecar stands beside the arrays; where it is a link, or holds one, it is not read."""
    whole = copied(folders["zarr"], tmp_path / "in")
    outside = tmp_path / "outside"
    for entry in ("hf", "hf/config.json", "hf/gemma-convert", "hf/gemma-convert/manifest.json"):
        (whole / entry).rename(outside)
        (whole / entry).symlink_to(outside)
        for command in (
            ("verify", whole / deep),
            ("to-hf", whole / deep, tmp_path / "out"),
            ("logit-check", folders["hf"], whole / deep, "--tokens", 5),
        ):
            code, said = run(*command)
            assert code == 3, (command, said)
            assert str(outside) in said
        (whole / entry).unlink()
        outside.rename(whole / entry)


def test_links_that_are_followed(folders: Folders, tmp_path) -> None:
    """The named folder may be a link, and a file a link to another in the folder, or to a blob."""
    cache, commit = tmp_path / "models--a--b", "snapshots/c0ffee"
    (cache / "blobs").mkdir(parents=True)
    (cache / commit / "below").mkdir(parents=True)
    for number, file in enumerate(sorted(folders["hf"].iterdir())):
        os.link(file, cache / "blobs" / str(number))
        (cache / commit / file.name).symlink_to(f"../../blobs/{number}")
    os.link(folders["hf"] / "config.json", cache / "blobs" / "deep")
    (cache / commit / "below/notes.txt").symlink_to("../../../blobs/deep")
    (tmp_path / "named").symlink_to(cache / commit)
    assert run("to-native", tmp_path / "named", tmp_path / "out", "--format", "maxtext") == (0, "")
    kept = tmp_path / "out/hf"
    assert (kept / "below/notes.txt").read_bytes() == (folders["hf"] / "config.json").read_bytes()
    assert not any(path.is_symlink() for path in kept.rglob("*"))
    inner = copied(folders["hf"], tmp_path / "inner")
    (inner / "tokenizer.json").rename(inner / "t")
    (inner / "tokenizer.json").symlink_to("t")
    assert run("logit-check", inner, tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("snapshots/c/x", "../../blobs/b/../../secret"),
        ("snapshots/c/x", "../../../other/blobs/b"),
        ("snapshots/x", "../blobs/b"),
        ("elsewhere/c/x", "../../blobs/b"),
        ("snapshots/c/x", "../../blobs/leads-on"),
        ("snapshots/c/x", "../../blobs"),
    ],
)
def test_links_that_look_like_the_hub_cache(link: str, target: str, tmp_path) -> None:
    from gemma_convert.files.confined import check_confined

    for repository in ("mine", "other"):
        (tmp_path / repository / "blobs").mkdir(parents=True)
        (tmp_path / repository / "blobs/b").write_text("blob")
    root = tmp_path / "mine"
    (root / "blobs/leads-on").symlink_to("../secret")
    (root / "secret").write_text("secret")
    (root / link).parent.mkdir(parents=True)
    (root / link).symlink_to(target)
    with pytest.raises(SourceError, match=r"points outside|does not point to a file"):
        check_confined((root / link).parent)
    (root / link).unlink()
    (root / "snapshots/c").mkdir(parents=True, exist_ok=True)
    (root / "snapshots/c/x").symlink_to("../../blobs/b")
    check_confined(root / "snapshots/c")


def test_folders_of_other_programs_are_passed_over(folders: Folders, tmp_path) -> None:
    folder = copied(folders["hf"], tmp_path / "in")
    (folder / ".git").mkdir()
    (folder / ".git/linked").symlink_to("/")
    assert run("inspect", folder)[0] == 0
    tree = folders["zarr"] / "0/items"
    items = copied(tree, tmp_path / "items")
    (items / ".git").mkdir()
    (items / ".git/linked").symlink_to("/")
    code, said = run("inspect", items)
    assert code == 3
    assert str(items / ".git/linked") in said, "a tree may have an array of that name"
