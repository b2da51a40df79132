"""Checkpoints in S3: every direction, against a real server on loopback."""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from distcp_folders import copy_others, halves, save_distcp, state_of
from object_stores import BUCKET, Objects, s3_server, sums
from safetensors.numpy import save_file

import gemma_convert
from gemma_convert.engine.processes import Processes
from gemma_convert.errors import SourceError, TargetError, UsageError
from gemma_convert.files.unfinished import JOURNAL
from gemma_convert.model.huggingface_files import SINGLE
from gemma_convert.stores.orbax.writer import OrbaxWriter
from gemma_convert.stores.remote import mirror as remote
from gemma_convert.stores.remote import source as remote_source
from gemma_convert.stores.remote import target as remote_target
from gemma_convert.stores.remote.locations import local, local_target
from gemma_convert.stores.remote.object_store import file_system, parse_url
from gemma_convert.stores.safetensors import reader as safetensors_reader
from gemma_convert.stores.safetensors.reader import SafetensorsFolder

URL = f"s3://{BUCKET}"


@pytest.fixture(scope="module")
def s3():
    with s3_server():
        store = file_system("s3")
        store.mkdir(BUCKET)
        yield Objects(store)


@pytest.fixture
def place(s3, request):
    """A place of this test's own: its key."""
    return f"{abs(hash(request.node.name))}/out"


@pytest.fixture(scope="module")
def hf(tiny):
    return tiny("31b", layers=6, text_only=True)


@pytest.fixture(scope="module")
def stored(s3, hf):
    """Key of a converted MaxText checkpoint (OCDBT) that nobody changes."""
    gemma_convert.to_native(hf, f"{URL}/stored/maxtext")
    return "stored/maxtext"


@pytest.mark.share(4, 2)
@pytest.mark.parametrize(
    ("layout", "options", "loaded_by"),
    [
        ("maxtext", {"ocdbt": False, "scan_layers": True}, ("load_parameters_path", "{}/0/items")),
        ("gemma-jax", {}, ("params", 'gm.ckpts.load_params("{}")')),
        ("fast-llm", {}, ("pretrained.path", "{}")),
        ("tunix", {}, ("params", 'CheckpointManager("{}").maybe_restore(model)')),
    ],
    ids=["maxtext zarr", "gemma-jax", "fast-llm", "tunix"],
)
def test_there_and_back_again(s3, hf, place, tmp_path, layout, options, loaded_by):
    out = f"{URL}/{place}"
    report = gemma_convert.to_native(hf, out, layout=layout, **options)
    assert (report.source, report.target) == (str(hf), out)
    setting, value = loaded_by
    assert report.settings[setting] == value.format(out)
    assert f"{place}/{JOURNAL}" not in s3.keys(place)
    assert gemma_convert.verify(out, against=hf).passed
    exported = gemma_convert.to_hf(out, tmp_path / "back")
    assert exported.bit_for_bit
    assert exported.source == out
    assert sums(tmp_path / "back") == sums(hf)


@pytest.mark.large
def test_a_distributed_checkpoint_of_torch(s3, hf, place, tmp_path):
    folder = save_distcp(tmp_path / "d", {"model": state_of(hf)}, halves(0))
    copy_others(hf, folder)
    url = f"s3://{s3.put_folder(folder, place)}"
    assert gemma_convert.inspect(url).coverage.complete
    assert gemma_convert.to_native(url, tmp_path / "n", layout="gemma-jax").arrays_written
    assert gemma_convert.verify(tmp_path / "n", against=folder).passed


def test_the_objects_are_the_files_of_a_local_conversion(s3, hf, stored, converted):
    local_names = set(sums(converted(hf, "maxtext")))
    names = set(s3.sums(stored))
    data = {name for name in names | local_names if "/d/" in name}
    assert names - data == local_names - data
    assert any(name.startswith("0/items/d/") for name in names)
    kept = {name for name in names if name.startswith("hf/") and not name.endswith("manifest.json")}
    assert len(kept) > 5
    here = sums(converted(hf, "maxtext"))
    assert {name: s3.sums(stored)[name] for name in kept} == {name: here[name] for name in kept}


def test_it_is_proved_by_its_manifest_and_inspected(stored):
    report = gemma_convert.verify(f"{URL}/{stored}")
    assert report.passed
    assert report.checked > 60
    assert report.path == f"{URL}/{stored}"
    found = gemma_convert.inspect(f"{URL}/{stored}/")
    assert (found.path, found.layout) == (f"{URL}/{stored}", "maxtext")
    assert found.config == f"{URL}/{stored}/hf/config.json"
    assert found.coverage is not None and found.coverage.complete
    assert found.converted_by == f"gemma-convert {gemma_convert.__version__}"


@pytest.mark.large
def test_a_damaged_array_is_found(s3, hf, place):
    gemma_convert.to_native(hf, f"{URL}/{place}", layout="fast-llm")
    key = f"{place}/model_0.safetensors"
    data = bytearray(s3.get(key))
    data[-1] ^= 1
    s3.put(key, bytes(data))
    assert not gemma_convert.verify(f"{URL}/{place}").passed
    assert not gemma_convert.verify(f"{URL}/{place}", against=hf).passed


def test_an_item_of_a_checkpoint_is_read_with_all_that_its_seal_lists(hf, stored, tmp_path):
    exported = gemma_convert.to_hf(f"{URL}/{stored}/0/items", tmp_path / "back")
    assert exported.bit_for_bit
    assert sums(tmp_path / "back") == sums(hf)


def test_settings_above_a_step_are_read(s3, hf, place, stored, tmp_path):
    """Of a run without a sidecar too, as beside a step that lies here."""
    for key in s3.keys(stored):
        name = key.removeprefix(f"{stored}/")
        if not name.startswith("hf/"):
            data = s3.get(key)
            other = data.replace(b"sliding_window_size: 12", b"sliding_window_size: 9")
            s3.put(f"{place}/{name}", other if name.startswith("models/") else data)
    for below in ("0", "0/items"):
        back = tmp_path / below.replace("/", "-")
        gemma_convert.to_hf(f"{URL}/{place}/{below}", back, like=hf)
        assert json.loads((back / "config.json").read_text())["sliding_window"] == 9


@pytest.mark.large
def test_from_store_to_store(s3, hf, stored, place, tmp_path):
    exported = gemma_convert.to_hf(f"{URL}/{stored}/0/items", f"{URL}/{place}")
    assert exported.bit_for_bit
    assert exported.source == f"{URL}/{stored}/0/items"
    assert exported.target == f"{URL}/{place}"
    assert s3.sums(place) == sums(hf)
    assert gemma_convert.verify(f"{URL}/{place}", against=f"{URL}/{stored}").passed

    gemma_convert.to_native(f"{URL}/{place}", tmp_path / "native", layout="fast-llm")
    assert gemma_convert.verify(tmp_path / "native", against=hf).passed

    other = f"{URL}/{place}-gemma"
    gemma_convert.to_native(f"{URL}/{stored}/0", other, layout="gemma-jax", like=f"{URL}/{place}")
    assert gemma_convert.verify(other, against=hf).passed


@pytest.mark.large
def test_a_wrong_export_is_found(s3, hf, stored, place):
    s3.put_folder(hf, place)
    key = f"{place}/model.safetensors"
    data = bytearray(s3.get(key))
    data[-1] ^= 1
    s3.put(key, bytes(data))
    report = gemma_convert.verify(f"{URL}/{place}", against=f"{URL}/{stored}")
    assert len(report.different) == 1


def test_only_what_is_small_is_copied_into_a_mirror(s3, hf, stored):
    with ExitStack() as stack:
        folder = local(f"{URL}/{stored}", stack)
        assert (folder / "0/items/_METADATA").read_bytes() == s3.get(f"{stored}/0/items/_METADATA")
        assert (folder / "hf/tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
        data = [path for path in folder.rglob("*") if path.is_file() and path.parent.name == "d"]
        assert data
        assert all(path.stat().st_size == 0 for path in data)
        assert (folder / "0/items/manifest.ocdbt").stat().st_size == 0
        assert remote.file_size(folder / "0/items/manifest.ocdbt") > 0
    assert not folder.exists()
    assert remote.find_mirror(folder) is None


@pytest.mark.large
def test_a_large_file_that_is_no_weights_is_read_where_it_is(s3, hf, place, tmp_path, monkeypatch):
    s3.put_folder(hf, place)
    monkeypatch.setattr(remote_source, "SMALL_BYTES", 10_000)
    assert (hf / "tokenizer.json").stat().st_size > 10_000
    with ExitStack() as stack:
        assert (local(f"{URL}/{place}", stack) / "tokenizer.json").stat().st_size == 0
    gemma_convert.to_native(f"{URL}/{place}", tmp_path / "out")
    assert sums(tmp_path / "out/hf")["tokenizer.json"] == sums(hf)["tokenizer.json"]
    assert gemma_convert.verify(tmp_path / "out", against=f"{URL}/{place}").passed


def test_neighbours_are_not_part_of_a_checkpoint(s3, hf, place, monkeypatch):
    s3.put_folder(hf, place)
    s3.put(f"{place}2/model-extra.safetensors", b"not ours")
    with ExitStack() as stack:
        folder = local(f"{URL}/{place}", stack)
        assert {path.name for path in folder.iterdir()} == {path.name for path in hf.iterdir()}
    entry = {"type": "file", "size": 1, "ETag": "x"}
    listing = {f"{BUCKET}/{place}{name}": entry for name in ("/mine", "2/other", "/folder/")}
    monkeypatch.setattr(s3.store, "find", lambda *_, **__: listing)
    assert list(remote.list_objects(s3.store, parse_url(f"{URL}/{place}"))) == ["mine"]


def test_an_object_that_became_shorter_is_noticed(s3, hf, place):
    s3.put_folder(hf, place)
    with ExitStack() as stack:
        found = remote.remote_file(local(f"{URL}/{place}", stack) / "model.safetensors")
        assert found is not None
        data = (hf / "model.safetensors").read_bytes()
        assert found.read(7, 5000) == data[7:5007]
        s3.put(f"{place}/model.safetensors", data[:100])
        with pytest.raises(SourceError, match="became shorter"):
            found.read(50, 100)


def test_parts_that_lie_apart_cost_few_requests(s3, place, tmp_path, monkeypatch):
    """A transposed array of an export is fetched once; few fetched ones are kept."""
    arrays = {name: np.arange(6000, dtype=np.float32).reshape(1000, 6) for name in ("a", "b")}
    (tmp_path / "f").mkdir()
    save_file(arrays, tmp_path / "f/model.safetensors")
    s3.put_folder(tmp_path / "f", place)
    monkeypatch.setattr(safetensors_reader, "FETCHED_BYTES", 30_000)
    asked: list[int] = []

    def counted(paths, *others, **options):
        asked.append(len(paths))
        return cat_ranges(paths, *others, **options)

    with ExitStack() as stack:
        folder = stack.enter_context(SafetensorsFolder(local(f"{URL}/{place}", stack)))
        file = remote.remote_file(folder.folder / SINGLE)
        assert file is not None
        cat_ranges = file.mirror.store.cat_ranges
        monkeypatch.setattr(file.mirror.store, "cat_ranges", counted)
        for name in ("a", "b"):
            for column in range(0, 6, 2):
                values = np.empty((1000, 2), np.float32)
                folder.read_box(folder.tensors[name], ((0, 1000), (column, 2)), values)
                assert np.array_equal(values, arrays[name][:, column : column + 2])
        assert asked == [1, 1]
        folder.read_box(folder.tensors["a"], ((0, 1000), (0, 2)), values)
        assert asked == [1, 1, 1]


def test_no_room_for_temporary_files_is_one_message(s3, place, tmp_path, monkeypatch):
    """A process that writes through a map of a full disk would be ended by the system."""
    (tmp_path / "f").mkdir()
    save_file({"a": np.zeros((1000, 6), np.float32)}, tmp_path / "f/model.safetensors")
    url = f"s3://{s3.put_folder(tmp_path / 'f', place)}"

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ExitStack() as stack:
        folder = stack.enter_context(SafetensorsFolder(local(url, stack)))
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(TargetError, match=r"(?s)no room for temporary files.*TMPDIR"):
            folder.read_box(folder.tensors["a"], ((0, 1000), (2, 1)), np.empty((1000, 1), "f4"))
    s3.put(f"{place}/config.json", b"{}")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TargetError, match="no room for temporary files"), ExitStack() as stack:
        local(url, stack)


def test_a_key_that_climbs_out_is_refused(s3, place, monkeypatch):
    for key in ("../x", "a/../../x", "a//b", "./x", "a\\b", "a\nb"):
        listing = {f"{BUCKET}/{place}/{key}": {"type": "file", "size": 1, "ETag": "x"}}
        monkeypatch.setattr(s3.store, "find", lambda *_, found=listing, **__: found)
        with ExitStack() as stack, pytest.raises(SourceError, match="is no path"):
            local(f"{URL}/{place}", stack)


@pytest.mark.large
@pytest.mark.parametrize("below", ["", "/0/items"])
def test_an_unfinished_conversion_is_refused(s3, stored, place, tmp_path, below):
    for key in s3.keys(stored):
        s3.store.copy(f"{BUCKET}/{key}", f"{BUCKET}/{place}/{key.removeprefix(stored)[1:]}")
    s3.put(f"{place}/{JOURNAL}", b"{}")
    source = f"{URL}/{place}{below}"
    with pytest.raises(SourceError, match="unfinished") as caught:
        gemma_convert.to_hf(source, tmp_path / "back")
    assert caught.value.where == f"{URL}/{place}"
    assert "--overwrite" in caught.value.do
    with pytest.raises(SourceError, match="unfinished"):
        gemma_convert.verify(source)


def test_an_unfinished_export_is_refused(s3, hf, place, tmp_path):
    s3.put_folder(hf, place)
    s3.put(f"{place}/{JOURNAL}", b"{}")
    with pytest.raises(SourceError, match="unfinished"):
        gemma_convert.to_native(f"{URL}/{place}", tmp_path / "out")
    with pytest.raises(SourceError, match="unfinished"):
        gemma_convert.inspect(f"{URL}/{place}")


def test_what_is_there_is_not_replaced(s3, hf, place):
    s3.put(f"{place}/mine.txt", b"mine")
    for overwrite in (False, True):
        with pytest.raises(TargetError, match="The target exists") as caught:
            gemma_convert.to_native(hf, f"{URL}/{place}", overwrite=overwrite)
        assert caught.value.where == f"{URL}/{place}"
    assert s3.keys(place) == [f"{place}/mine.txt"]


@pytest.mark.large
def test_overwrite_replaces_an_unfinished_conversion(s3, hf, place):
    s3.put(f"{place}/{JOURNAL}", b"{}")
    s3.put(f"{place}/0/items/left", b"over")
    with pytest.raises(TargetError, match="unfinished conversion"):
        gemma_convert.to_native(hf, f"{URL}/{place}", layout="fast-llm")
    assert len(s3.keys(place)) == 2
    gemma_convert.to_native(hf, f"{URL}/{place}", layout="fast-llm", overwrite=True)
    assert f"{place}/0/items/left" not in s3.keys(place)
    assert gemma_convert.verify(f"{URL}/{place}").passed


def test_it_is_marked_until_the_end_and_completed_last(s3, hf, place, monkeypatch):
    keys, order = [], []
    put_file = s3.store.put_file

    def put(path, key, **options):
        keys.append(set(s3.keys(place)))
        order.append(key.removeprefix(f"{BUCKET}/{place}/"))
        return put_file(path, key, **options)

    monkeypatch.setattr(s3.store, "put_file", put)
    monkeypatch.setattr(remote_target, "UPLOADS", 1)
    gemma_convert.to_native(hf, f"{URL}/{place}", ocdbt=False)
    assert all(f"{place}/{JOURNAL}" in found for found in keys)
    assert f"{place}/0/items/_METADATA" not in keys[0]
    assert any(key.startswith(f"{place}/0/items/params") for key in keys[0])
    assert order[-4:] == [
        "0/items/_METADATA",
        "0/_CHECKPOINT_METADATA",
        "0/commit_success.txt",
        "0/items/commit_success.txt",
    ]
    assert not any(JOURNAL in name for name in order)


class BrokenError(Exception):
    pass


@pytest.mark.parametrize(
    ("where", "error"),
    [("array", OSError("disk")), ("array", KeyboardInterrupt()), ("upload", BrokenError())],
    ids=["array", "interrupted", "upload"],
)
def test_an_error_midway_leaves_nothing(s3, hf, place, monkeypatch, where, error):
    seen, calls = [], itertools.count()

    def fails(original):
        def call(*arguments, **options):
            if next(calls) == 3:
                seen.extend(s3.keys(place))
                raise error
            return original(*arguments, **options)

        return call

    if where == "array":
        monkeypatch.setattr(OrbaxWriter, "write", fails(OrbaxWriter.write))
    else:
        monkeypatch.setattr(s3.store, "put_file", fails(s3.store.put_file))
    expected = TargetError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        gemma_convert.to_native(hf, f"{URL}/{place}")
    assert f"{place}/{JOURNAL}" in seen
    assert s3.keys(place) == []


def test_another_run_in_the_same_place_is_noticed(s3, hf, place, monkeypatch):
    write = OrbaxWriter.write_tree

    def taken(self, extra):
        s3.put(f"{place}/{JOURNAL}", b"another run's")
        return write(self, extra)

    monkeypatch.setattr(OrbaxWriter, "write_tree", taken)
    with pytest.raises(TargetError, match="another run took it"):
        gemma_convert.to_native(hf, f"{URL}/{place}")
    assert s3.get(f"{place}/{JOURNAL}") == b"another run's"


def test_two_runs_do_not_begin_in_one_place(s3, hf, place, monkeypatch):
    check = remote_target.check_remote_target

    def late(mirror, *, overwrite):
        check(mirror, overwrite=overwrite)
        s3.put(f"{place}/{JOURNAL}", b"another run's")

    monkeypatch.setattr(remote_target, "check_remote_target", late)
    with pytest.raises(TargetError, match="Another run is writing"):
        gemma_convert.to_native(hf, f"{URL}/{place}")
    assert s3.keys(place) == [f"{place}/{JOURNAL}"]


def changing(action):
    """A listener that calls `action` once, when something has been read."""
    left = [action]

    def listener(event):
        if event.event == "advance" and left:
            left.pop()()

    return listener


def test_what_is_sent_is_told_too(s3, hf, place):
    events = []
    gemma_convert.to_native(hf, f"{URL}/{place}", progress=events.append)
    ends = [(one.task, one.done == one.total) for one in events if one.event == "end"]
    assert ends == [("convert", True), ("upload", True)]
    sent = [one.name for one in events if one.task == "upload" and one.event == "advance"]
    assert sent and {f"{place}/{name}" for name in sent} <= set(s3.keys(place))


@pytest.mark.large
def test_a_source_that_changes_is_noticed(s3, hf, place, stored, tmp_path):
    s3.put_folder(hf, place)
    key = f"{place}/model.safetensors"
    other = bytearray(s3.get(key))
    other[-1] ^= 1
    with pytest.raises(SourceError, match="changed while it was read") as caught:
        gemma_convert.to_native(
            f"{URL}/{place}", tmp_path / "out", progress=changing(lambda: s3.put(key, bytes(other)))
        )
    assert caught.value.where == f"{URL}/{key}"
    for name in s3.keys(stored):
        s3.store.copy(
            f"{BUCKET}/{name}", f"{BUCKET}/{place}-native/{name.removeprefix(stored)[1:]}"
        )
    with pytest.raises(SourceError, match="changed while it was read"):
        gemma_convert.to_hf(
            f"{URL}/{place}-native",
            tmp_path / "back",
            progress=changing(lambda: s3.put(f"{place}-native/0/items/new", b"new")),
        )
    assert list(tmp_path.iterdir()) == []


def test_what_an_object_store_cannot_do_is_said(s3, hf, place, stored, tmp_path):
    out = f"{URL}/{place}"
    with pytest.raises(UsageError, match="is not continued") as caught:
        gemma_convert.to_native(hf, out, resume=True)
    assert caught.value.where == out
    with pytest.raises(UsageError, match="is not continued"):
        gemma_convert.to_hf(f"{URL}/{stored}", out, resume=True)

    with pytest.raises(UsageError, match="one process"):
        gemma_convert.to_native(hf, out, processes=Processes(None, 1, 2))
    with pytest.raises(TargetError, match="inside a bucket"):
        gemma_convert.to_native(hf, URL)
    with pytest.raises(TargetError, match="lie in one another"):
        gemma_convert.to_native(f"{URL}/{stored}", f"{URL}/{stored}/other")
    with ExitStack() as stack, pytest.raises(SourceError, match="local files alone"):
        local(Path(out), stack, whole=True)
    assert s3.keys(place) == []


def test_a_dry_run_writes_nothing(s3, place, stored):
    out = f"{URL}/{place}"
    report = gemma_convert.to_native(f"{URL}/{stored}", out, layout="gemma-jax", dry_run=True)
    assert (report.source, report.target) == (f"{URL}/{stored}", out)
    assert s3.keys(place) == []


def test_flops_fetch_config_json_alone(s3, hf, place, monkeypatch):
    from gemma_convert.flops.source import read_model

    s3.put_folder(hf, place)
    fetched = []
    cat_file = s3.store.cat_file

    def cat(path, **options):
        fetched.append(path)
        return cat_file(path, **options)

    monkeypatch.setattr(s3.store, "cat_file", cat)
    expected = read_model(hf)
    assert read_model(f"{URL}/{place}") == expected
    assert read_model(f"{URL}/{place}/config.json") == expected
    assert set(fetched) == {f"{BUCKET}/{place}/config.json"}


def test_local_space_is_asked_for_what_is_written_here(s3, hf, place, stored, monkeypatch):
    from gemma_convert.tasks import to_hf as export
    from gemma_convert.tasks import to_native as convert

    asked = []

    def check(_, needed):
        asked.append(needed)
        raise BrokenError

    monkeypatch.setattr(convert, "check_space", check)
    monkeypatch.setattr(export, "check_space", check)
    for layout in ("maxtext", "fast-llm"):
        with pytest.raises(BrokenError):
            gemma_convert.to_native(hf, f"{URL}/{place}", layout=layout)
    with pytest.raises(BrokenError):
        gemma_convert.to_hf(f"{URL}/{stored}", f"{URL}/{place}")
    weights = (hf / "model.safetensors").stat().st_size
    streamed, files, back = asked
    assert files - streamed > weights / 2
    assert back > weights


@pytest.fixture
def strict(s3):
    """The server asks for credentials that it knows, which are none."""

    def count(text: str) -> None:
        url = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
        kind = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, text.encode(), kind)).close()

    count("0")
    yield
    count("1000000000")


def test_wrong_credentials_are_one_message(strict, stored, hf):
    with pytest.raises(SourceError, match="does not let us in") as source:
        gemma_convert.verify(f"{URL}/{stored}")
    with pytest.raises(TargetError, match="does not let us in"):
        gemma_convert.to_native(hf, f"{URL}/never")
    assert "AWS_ACCESS_KEY_ID" in source.value.do


def test_no_credentials_are_one_message(stored, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SourceError, match="does not let us in"):
        gemma_convert.inspect(f"{URL}/{stored}")


@pytest.mark.parametrize(
    ("arguments", "endpoint", "code", "words"),
    [
        (["inspect", "s3://no-such-bucket/x"], None, 3, "s3://no-such-bucket/x"),
        (["verify", f"{URL}/no/such/place"], None, 3, "nothing at this place"),
        (["to-native", "HF", "s3://no-such-bucket/x", "--format", "fast-llm"], None, 4, "no such"),
        (["inspect", f"{URL}/x"], "http://127.0.0.1:9", 3, "AWS_ENDPOINT_URL"),
        (["inspect", "http://example.org/x"], None, 2, "s3://bucket/prefix"),
        (["to-hf", f"{URL}/x", "ftp://example.org/x"], None, 2, "s3://bucket/prefix"),
    ],
)
def test_what_is_wrong_is_said_by_the_command_line(
    s3, hf, monkeypatch, capsys, arguments, endpoint, code, words
):
    from gemma_convert.cli.app import main

    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    typed = [str(hf) if word == "HF" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["gemma-convert", *typed])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    told = capsys.readouterr()
    assert told.out == ""
    assert words in told.err
    assert "Traceback" not in told.err


def test_urls_reach_the_commands_as_they_were_typed(s3, hf, place, monkeypatch, capsys):
    from gemma_convert.cli.app import main

    out = f"{URL}/{place}"
    for words in (
        ["to-native", str(hf), out, "--format", "fast-llm", "--verify"],
        ["to-hf", out, f"{out}-back", "--like", out],
        ["verify", f"{out}-back", "--against", out],
        ["inspect", f"{out}-back"],
        ["flops", out, "--seq-len", "128"],
    ):
        monkeypatch.setattr(sys, "argv", ["gemma-convert", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, capsys.readouterr()
    told = capsys.readouterr().out
    assert f"pretrained.path={out}\n" in told
    assert "verified" in told


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setenv("AWS_REGION", "eu-west-3")  # a client that is not there yet
    with ExitStack() as stack, pytest.raises(UsageError, match="needs the package s3fs") as caught:
        local_target(f"{URL}/x", stack)
    assert "gemma-convert[s3]" in caught.value.do
