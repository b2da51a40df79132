"""Every command takes every path that the system takes, from whatever folder it is started."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from commands import said
from hypothesis import given, settings
from hypothesis import strategies as st

LAYOUTS = {
    "zarr": ("--format", "maxtext", "--no-ocdbt"),
    "ocdbt": ("--format", "maxtext"),
    "scanned": ("--format", "maxtext", "--scan-layers"),
    "gemma-jax": ("--format", "gemma-jax"),
    "fast-llm": ("--format", "fast-llm"),
}


def run(*arguments: object, code: int = 0) -> str:
    """What a command prints, run in this process."""
    found, output, errors = said(*arguments)
    assert found == code, errors
    return output


@pytest.fixture
def beside(tmp_path: Path, shallow, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `t`, a tiny checkpoint, and `a`, in which commands are started."""
    (tmp_path / "t").symlink_to(shallow("31b"))
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    return tmp_path


@pytest.mark.share(5, 1)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_command_takes_parent_folders(layout: str, beside: Path) -> None:
    run("to-native", "../t", "../O", *LAYOUTS[layout], "--verify")
    assert "31b" in run("inspect", "../O")
    run("verify", "../O")
    run("verify", "../a/../O", "--against", "../t")
    run("to-hf", "../O", "../back")
    run("to-hf", "../O", "../like", "--like", "../t")
    for name in (p.name for p in (beside / "t").iterdir() if p.is_file()):
        original = (beside / "t" / name).read_bytes()
        assert (beside / "back" / name).read_bytes() == original, name
        assert (beside / "like" / name).read_bytes() == original, name
    run("verify", "../back", "--against", "../O")
    other = "gemma-jax" if layout != "gemma-jax" else "maxtext"
    run("to-native", "../O", "../other", "--format", other, "--like", "../t")
    run("verify", "../other", "--against", "../t")
    run("to-native", "../t", "../O", *LAYOUTS[layout], "--overwrite")


@pytest.mark.share(3, 1)
@pytest.mark.parametrize("layout", ["zarr", "ocdbt", "gemma-jax", "fast-llm"])
def test_logit_check_takes_parent_folders(layout: str, beside: Path) -> None:
    run("to-native", "../t", "../O", *LAYOUTS[layout])
    reports = ("--report", "../r.html", "--junit", "../r.xml")
    run("logit-check", "../t", "../O", "--tokens", "9", *reports)
    assert (beside / "r.html").stat().st_size
    assert (beside / "r.xml").stat().st_size


def test_other_commands_take_parent_folders(beside: Path) -> None:
    run("tiny", "31b", "../new")
    run("golden", "../new", "../g.safetensors", "--tokens", "9")
    run("to-native", "../new", "../N", "--format", "maxtext", "--no-ocdbt")
    run("logit-check", "../new", "../N", "--golden", "../g.safetensors")
    assert "model.embed_tokens" in run(
        "mappings", "--format", "maxtext", "--model", "../t"
    ).replace("language_model.", "")
    run("flops", "../t", "--seq-len", "16")
    run("flops", "../t/config.json", "--seq-len", "16")
    run("inspect", "..", code=3)


def test_a_parent_folder_is_the_one_that_the_system_sees(beside: Path) -> None:
    """Behind a link `..` leads elsewhere than its spelling says."""
    (beside / "deep/below").mkdir(parents=True)
    (beside / "link").symlink_to(beside / "deep/below")
    run("to-native", "../t", "../link/../O", "--format", "maxtext")
    assert (beside / "deep/O/0").is_dir()
    assert not (beside / "O").exists()
    run("verify", "../link/../O", "--against", "../t")


SPELLINGS = st.sampled_from(
    ["{0}", "./{0}", "../w/{0}", "{0}/.", ".//{0}", "{0}/", "x/../{0}", "{1}/{0}", "l/{0}"]
)
NAMES = st.one_of(
    st.sampled_from(
        [
            "-O",
            "--json",
            "a b",
            "a\nb",
            "\x1b[31m",
            "~",
            "$HOME",
            "'\"",
            "a:b",
            "a\\b",
            "\\",
            "s3:",
            "%41",
        ]
    ),
    st.text(min_size=1, max_size=12),
    st.binary(min_size=1, max_size=12).map(os.fsdecode),
).filter(lambda name: not set(name) & {"/", "\0"} and name not in {".", ".."})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, shallow, converted) -> tuple[Path, Path]:
    """A folder to work in, and a converted checkpoint."""
    source = shallow("31b")
    return tmp_path_factory.mktemp("spelled") / "w", converted(source, "maxtext", ocdbt=False)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(name=NAMES, spelling=SPELLINGS)
def test_a_path_may_be_spelled_in_any_way(
    small: tuple[Path, Path], name: str, spelling: str
) -> None:
    work, native = small
    (work / "x").mkdir(parents=True, exist_ok=True)
    try:
        place = work / name
        os.fsencode(place)
        if os.path.lexists(place) or len(os.fsencode(name)) > 200:
            return
    except UnicodeEncodeError:  # half a pair of surrogates is the name of no file
        return
    link = work / "l"
    if not link.exists():
        link.symlink_to(".")
    place.symlink_to(native)
    before = Path.cwd()
    os.chdir(work)
    try:
        path = spelling.format(name, work)
        assert "31b" in run("inspect", "--", path)
        assert "verified" in run("verify", "--", path)
    finally:
        os.chdir(before)
        place.unlink()


def test_names_that_are_no_text(tmp_path: Path, shallow) -> None:
    source = shallow("31b")
    folder = tmp_path / os.fsdecode(b"\xff\n x")
    folder.mkdir()
    (folder / "t").symlink_to(source)
    for form in (("maxtext",), ("maxtext", "--no-ocdbt"), ("gemma-jax",), ("fast-llm",)):
        out = folder / os.fsdecode(f"{'-'.join(form)}".encode() + b"\xfe")
        run("to-native", folder / "t", out, "--format", *form, "--verify")
        run("logit-check", folder / "t", out, "--tokens", "5")
        run("to-hf", out, folder / "back", "--overwrite")
        for path in (p for p in source.iterdir() if p.is_file()):
            assert (folder / "back" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.share(4, 2)
@pytest.mark.parametrize("layout", ["zarr", "ocdbt", "gemma-jax", "fast-llm"])
def test_a_path_may_begin_with_two_slashes(layout: str, beside: Path) -> None:
    run("to-native", f"/{beside}/t", f"/{beside}/O", *LAYOUTS[layout], "--verify")
    run("verify", f"/{beside}/O", "--against", f"/{beside}/a/../t")
    run("to-hf", f"/{beside}/O", f"/{beside}/back")
    assert (beside / "back/config.json").read_bytes() == (beside / "t/config.json").read_bytes()
    run("to-native", f"/{beside}/back", beside / "back/O", *LAYOUTS[layout], code=4)


def test_the_folder_for_temporary_files_may_be_no_text(
    tmp_path: Path, shallow, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, temporary = (tmp_path / os.fsdecode(name) for name in (b"O\xff", b"tmp\xff"))
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    run("to-native", shallow("31b"), out, "--format", "maxtext", "--verify")
    assert "verified" in run("verify", out, "--against", shallow("31b"))


def shell(line: str) -> subprocess.CompletedProcess[bytes]:
    command = f"{sys.executable} -m gemma_convert"
    return subprocess.run(
        ["bash", "-c", line.replace("GC", command) + "; exit ${PIPESTATUS[0]}"],
        capture_output=True,
        check=False,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
@pytest.mark.parametrize("command", ["mappings --format maxtext", "--help", "--version"])
def test_output_without_room_ends_with_74(command: str) -> None:
    done = shell(f"GC {command} > /dev/full")
    assert done.returncode == 74
    assert done.stderr.decode().startswith("error: Standard output cannot be written")


@pytest.mark.parametrize(
    "command",
    ["GC mappings --format maxtext | true", "GC --help | true", "GC --version 2>&- | cat"],
)
def test_a_reader_that_leaves_is_no_failure(command: str) -> None:
    done = shell(command)
    assert (done.returncode, done.stderr) == (0, b"")


def test_output_waits_for_a_reader_of_a_pipe_that_does_not_block() -> None:
    command = [sys.executable, "-m", "gemma_convert", "mappings", "--format", "maxtext"]
    command += ["--model", "31b"]
    whole = subprocess.run(command, capture_output=True, check=True).stdout
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE) as started:
        os.close(writer)
        with pytest.raises(subprocess.TimeoutExpired):  # it waits, the pipe being full
            started.wait(2)
        with os.fdopen(reader, "rb") as file:
            assert file.read() == whole
        assert (started.wait(), started.communicate()[1]) == (0, b"")


@pytest.mark.parametrize(
    ("command", "code"),
    [("GC mappings >&-", 0), ("GC inspect nowhere 2>&-", 3), ("GC mappings <&- >&- 2>&-", 0)],
)
def test_closed_streams_change_no_exit_code(command: str, code: int) -> None:
    done = shell(command)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr


def test_a_broken_array_is_one_message(tmp_path: Path, shallow, capfd) -> None:
    """The other arrays, which Orbax was opening when one failed, say nothing."""
    source = shallow("31b")
    run("to-native", source, tmp_path / "O", "--format", "maxtext", "--no-ocdbt")
    for path in (tmp_path / "O").rglob(".zarray"):
        path.write_text("{")
        break
    done = shell(f"GC logit-check {source} {tmp_path / 'O'} --tokens 5")
    assert done.returncode == 3
    assert done.stderr.decode().count("\n") == 4, done.stderr


def test_the_folder_one_stands_in_is_there_already(beside: Path) -> None:
    """It is named as such, and not taken for one that the source lies in."""
    run("to-native", "../t", ".", "--format", "maxtext", code=4)
    assert "The target exists." in said("to-native", "../t", "./", "--format", "maxtext")[2]
    assert not list((beside / "a").iterdir())
