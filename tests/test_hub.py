"""Checkpoints on the hub, by the command line, against a server on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import COMMITS, GATED, REPOSITORY, serving
from object_stores import sums
from test_naming import rename

from gemma_convert.stores.remote.hub import Repository, repository

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NOT_NEEDED = ("pytorch_model.bin", "model.gguf", "other.safetensors", "original/model.safetensors")

COMMANDS = """
import contextlib, io, json, sys
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 50_000
from gemma_convert.cli.app import main
done = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["gemma-convert", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as ending:
            code = ending.code or 0
    done.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""
"""Commands in one process: what they are told of the hub is read once a process."""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def revisions(tiny, tmp_path_factory):
    """main: a tiny checkpoint in shards among files that nobody needs.

    v2: another, under names that programs gave.
    """
    root = tmp_path_factory.mktemp("repository")
    main = shutil.copytree(tiny("31b", layers=6, text_only=True, shards=2), root / "main")
    for name in NOT_NEEDED:
        (main / name).parent.mkdir(exist_ok=True)
        (main / name).write_bytes(b"not needed")
    (main / "README.md").write_text("# tiny\n")
    (main / "assets").mkdir()
    (main / "assets" / "note.txt").write_text("deeper down\n")
    other = tiny("31b", layers=6, text_only=True, seed=7)
    v2 = rename(other, root / "v2", "module._orig_mod.{}".format)
    return {"main": main, "v2": v2}


@pytest.fixture
def hub(revisions):
    with serving(revisions) as server:
        yield server


@pytest.fixture
def run(hub, tmp_path):
    """run(*commands, **environment): what each of them did, in a folder and cache of the test's."""

    def commands(*typed: str, **environment: str) -> list[Done]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        process = subprocess.run(
            [sys.executable, "-c", COMMANDS, json.dumps([line.split() for line in typed])],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            cwd=tmp_path,
            env={
                **kept,
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_DISABLE_XET": "1",
                **environment,
            },
        )
        assert process.returncode == 0, process.stderr
        return [Done(*done) for done in json.loads(process.stdout.splitlines()[-1])]

    return commands


def test_a_checkpoint_comes_over_and_is_converted(hub, run, revisions, tmp_path):
    flops, converted = run(
        f"flops {REPOSITORY} --seq-len 128 --json",
        f"to-native {REPOSITORY} out --format maxtext --verify --json",
    )
    assert flops.code == 0, flops.err
    assert REPOSITORY in flops.out
    assert converted.code == 0, converted.err
    report = json.loads(converted.out)
    assert (report["source"], report["target"]) == (REPOSITORY, "out")
    asked = hub.files("GET")
    assert {*SHARDS, "config.json", "model.safetensors.index.json", "README.md"} <= set(asked)
    assert not {*NOT_NEEDED} & {*asked, *hub.files("HEAD")}
    assert len(asked) == len(set(asked))
    first = next(path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path)
    assert first.endswith("/config.json")
    kept, expected = sums(tmp_path / "out" / "hf"), sums(revisions["main"])
    for name in ("README.md", "config.json", "tokenizer.json"):
        assert kept[name] == expected[name]
    hub.asked.clear()

    checked, back = run(
        f"verify out --against {REPOSITORY}",
        f"to-hf out back --like {REPOSITORY}",
        HF_HUB_OFFLINE="1",
    )
    assert checked.code == 0, checked.err
    assert REPOSITORY in checked.out
    assert back.code == 0, back.err
    exported = sums(tmp_path / "back")
    assert [exported[name] for name in SHARDS] == [expected[name] for name in SHARDS]
    assert hub.asked == []


@pytest.mark.large
def test_a_revision_is_chosen_and_a_second_run_takes_the_cache(hub, run, revisions, tmp_path):
    branch, again, commit, local = run(
        f"to-native {REPOSITORY}@v2 one --format maxtext --json",
        f"inspect {REPOSITORY}@v2 --json",
        f"to-native {REPOSITORY}@{COMMITS['v2']} two --format maxtext --json",
        f"verify one --against {revisions['v2']}",
    )
    for done in (branch, again, commit, local):
        assert done.code == 0, done.err + done.out
    assert json.loads(branch.out)["source"] == f"{REPOSITORY}@v2"
    assert json.loads(again.out)["config"] == f"{REPOSITORY}@v2/config.json"
    asked = hub.files("GET")
    assert len(asked) == len(set(asked))
    assert "model.safetensors" in asked


def test_a_download_that_breaks_off_is_resumed(hub, run, revisions, tmp_path):
    size = (revisions["main"] / SHARDS[0]).stat().st_size
    assert size > 200_000
    hub.cut = size // 2
    (done,) = run(f"to-native {REPOSITORY} out --format maxtext")
    assert done.code == 0, done.err
    asked = [span for _, path, span in hub.asked if path.endswith(SHARDS)]
    starts = [int(span.removeprefix("bytes=").rstrip("-")) for span in asked if span]
    assert len(starts) == 1
    assert 0 < starts[0] <= size // 2
    (checked,) = run(f"verify out --against {revisions['main']}")
    assert checked.code == 0, checked.out


@pytest.mark.share(2)
@pytest.mark.parametrize("file", [SHARDS[1], "tokenizer.json"])
def test_a_file_that_is_not_what_was_announced_is_refused(hub, run, file, tmp_path):
    hub.damaged = file
    (done,) = run(f"to-native {REPOSITORY} out --format maxtext")
    assert done.code == 3
    assert "not what the hub announced" in done.err
    assert f"{REPOSITORY}/{file}" in done.err
    assert not (tmp_path / "out").exists()


def test_a_local_folder_of_that_name_wins(hub, run, tiny, tmp_path):
    shutil.copytree(tiny("31b", layers=6, text_only=True), tmp_path / REPOSITORY)
    (done,) = run(f"inspect {REPOSITORY} --json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["config"] == f"{REPOSITORY}/config.json"
    assert hub.asked == []


def header_spans(folder: Path, *files: str) -> list[tuple[str, int, int]]:
    """What has to be read of safetensors files to have their headers."""
    lengths = {}
    for file in files:
        with (folder / file).open("rb") as reader:
            lengths[file] = int.from_bytes(reader.read(8), "little")
        assert lengths[file] < 20_000 < (folder / file).stat().st_size / 10
    return [
        span for file, length in lengths.items() for span in ((file, 0, 8), (file, 8, 8 + length))
    ]


def test_inspect_and_a_dry_run_read_headers_alone(hub, run, revisions, tmp_path):
    main, v2 = revisions["main"], revisions["v2"]
    there, here, plan, plan_here, again = run(
        f"inspect {REPOSITORY} --json",
        f"inspect {main} --json",
        f"to-native {REPOSITORY} out --format maxtext --dry-run --json",
        f"to-native {main} out --format maxtext --dry-run --json",
        f"inspect {REPOSITORY}@v2 --json",
    )
    for done in (there, here, plan, plan_here, again):
        assert done.code == 0, done.err
    report, expected = json.loads(there.out), json.loads(here.out)
    assert (report["path"], report["config"]) == (REPOSITORY, f"{REPOSITORY}/config.json")
    assert report == expected | {key: report[key] for key in ("path", "config")}
    assert report["complete"]
    report, expected = json.loads(plan.out), json.loads(plan_here.out)
    measured = {key: report[key] for key in ("seconds", "peak_memory_bytes")}
    assert {*expected["not_carried"]} == {*NOT_NEEDED}
    assert report == expected | measured | {"source": REPOSITORY, "not_carried": []}
    report = json.loads(again.out)
    assert (report["path"], report["complete"]) == (f"{REPOSITORY}@v2", True)
    once = header_spans(main, *SHARDS)
    assert hub.spans() == sorted([*once, *once, *header_spans(v2, "model.safetensors")])
    assert not {*NOT_NEEDED} & {*hub.files("GET")}
    assert not (tmp_path / "out").exists()
    for done in (there, plan, again):
        assert tempfile.gettempdir() + "/gemma-convert" not in done.out + done.err


def test_headers_of_what_is_in_the_cache_are_not_asked_for(hub, run, revisions, tmp_path):
    (download,) = run(f"to-native {REPOSITORY} out --format maxtext")
    assert download.code == 0, download.err
    hub.asked.clear()
    inspected, plan = run(
        f"inspect {REPOSITORY} --json",
        f"to-native {REPOSITORY} again --format maxtext --dry-run --json",
    )
    (offline,) = run(f"inspect {REPOSITORY} --json", HF_HUB_OFFLINE="1")
    for done in (inspected, plan, offline):
        assert done.code == 0, done.err
    assert json.loads(inspected.out)["complete"]
    assert offline.out == inspected.out
    assert hub.spans() == []

    (shard,) = (tmp_path / "home").rglob(SHARDS[1])
    shard.unlink()
    (without,) = run(f"inspect {REPOSITORY} --json")
    assert without.out == inspected.out, without.err
    assert hub.spans() == header_spans(revisions["main"], *SHARDS)
    (offline,) = run(f"inspect {REPOSITORY}", HF_HUB_OFFLINE="1")
    failed(offline, f"where: {REPOSITORY}")


@pytest.mark.large
def test_native_repositories_are_inspected(hub, run, revisions, tmp_path):
    """Of Fast-LLM's files the headers are read; Orbax's arrays are downloaded."""
    made = run(
        f"to-native {revisions['v2']} fast --format fast-llm",
        f"to-native {revisions['v2']} orbax --format maxtext",
    )
    assert [done.code for done in made] == [0, 0]
    hub.revisions = {"main": tmp_path / "fast", "v2": tmp_path / "orbax"}
    for name, folder in ((REPOSITORY, "fast"), (f"{REPOSITORY}@v2", "orbax")):
        there, here = run(f"inspect {name} --json", f"inspect {folder} --json")
        assert (there.code, here.code) == (0, 0), there.err + here.err
        report, expected = json.loads(there.out), json.loads(here.out)
        assert report["complete"]
        assert report == expected | {"path": name, "config": f"{name}/hf/config.json"}
    assert hub.spans()
    assert all(0 < end - start < 20_000 for _, start, end in hub.spans())


def failed(done: Done, *words: str) -> None:
    assert done.code == 3, done.out + done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err


def test_what_the_hub_does_not_have_or_give_is_one_message(run):
    missing, revision, gated, refused = run(
        "inspect someone/nothing",
        f"inspect {REPOSITORY}@v9",
        f"flops {GATED} --seq-len 9",
        f"to-native {GATED} out --format maxtext --dry-run",
    )
    failed(missing, "no such folder here, and no such repository", "hf auth login")
    failed(revision, "no such revision", f"where: {REPOSITORY}@v9")
    for done in (gated, refused):
        failed(done, "does not give this repository to you", "accept the licence", "hf auth login")
        assert f"where: {GATED}\n" in done.err


def test_a_range_that_does_not_come_is_one_message(hub, run):
    hub.refused, hub.shortened = SHARDS[0], "/model.safetensors"
    refused, shortened = run(f"inspect {REPOSITORY}@main", f"inspect {REPOSITORY}@v2")
    failed(refused, "does not give this repository to you", f"where: {REPOSITORY}@main\n")
    failed(shortened, "became shorter", f"where: {REPOSITORY}@v2/model.safetensors\n")


def test_no_network_is_one_message(run):
    (offline,) = run(f"inspect {REPOSITORY}", HF_HUB_OFFLINE="1")
    failed(offline, "no such folder here, and the hub cannot be asked", "HF_HUB_OFFLINE")
    (unreachable,) = run(f"inspect {REPOSITORY}", HF_ENDPOINT="http://127.0.0.1:9")
    failed(unreachable, "no such folder here, and the hub cannot be asked", "check the network")
    assert "Got: " not in unreachable.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("google/gemma-4-E2B-it", Repository("google/gemma-4-E2B-it", None)),
        ("a/b@main", Repository("a/b", "main")),
        ("a/b@refs/pr/1", Repository("a/b", "refs/pr/1")),
        ("a", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("./b", None),
        ("../b", None),
        ("a/..", None),
        ("a/b@", None),
        ("a/b c", None),
        ("a/b@c d", None),
    ],
)
def test_what_may_be_a_repository(text, expected):
    assert repository(text) == expected
