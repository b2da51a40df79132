"""Several processes make one checkpoint, and it is the one that a single process makes."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
from cases import CASES
from key_value_store import Store
from native_checkpoints import arrays_of, differing, manifest
from test_convert import _patch

from gemma_convert import (
    GemmaConvertError,
    SourceError,
    TargetError,
    UsageError,
    to_hf,
    to_native,
    verify,
)
from gemma_convert.arrays.dtypes import DTypePolicy
from gemma_convert.checkpoint.accounted import beside_native
from gemma_convert.cli.app import main
from gemma_convert.engine import joined
from gemma_convert.engine.cluster import connect
from gemma_convert.engine.processes import Processes
from gemma_convert.engine.publishing import Publication
from gemma_convert.mapping import plan as planning
from gemma_convert.mapping.planning import plan_to_native
from gemma_convert.mapping.region import blocks
from gemma_convert.mapping.split import split_sources
from gemma_convert.mapping.table import load_table
from gemma_convert.model.config import read_architecture
from gemma_convert.stores.safetensors.reader import SafetensorsFolder


def together(count, source, target, *, each=None, **options):
    """What each of `count` processes, threads of this one, returned or raised."""
    store, results = Store(), [None] * count

    def run(index):
        given = options | (each(index) if each else {})
        try:
            results[index] = to_native(
                given.pop("source", source),
                target,
                processes=Processes(store, index, count),
                **given,
            )
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=[index]) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that arrays of tiny models are cut, and few are put together in memory."""
    monkeypatch.setattr(planning, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(planning, "GATHER_BYTES", 2_000)


def planned(source, layout, scanned=False):
    with SafetensorsFolder(source) as reader:
        return plan_to_native(
            read_architecture(source),
            load_table(layout),
            reader.specs,
            DTypePolicy(),
            scanned=scanned,
        )


@pytest.mark.parametrize("count", [1, 2, 3, 7, 500])
@pytest.mark.parametrize(("family", "scanned"), CASES)
def test_every_source_tensor_belongs_to_one_process(tiny, family, scanned, count):
    plan = planned(tiny(family), "maxtext", scanned)
    shares = split_sources(plan, count)
    assert len(shares) == count
    assert sorted(itertools.chain(*shares)) == sorted(plan.sources)


@pytest.mark.parametrize(("family", "scanned"), CASES)
def test_no_chunk_is_written_by_two_processes(tiny, small_blocks, family, scanned):
    """A chunk, or a small array that is put together in memory, is one process's."""
    plan = planned(tiny(family), "maxtext", scanned)
    owners: dict[tuple, set[int]] = {}
    for number, share in enumerate(split_sources(plan, 3)):
        for name in share:
            source = plan.sources[name]
            for ranges, copy in itertools.product(
                blocks(source.region, source.steps), source.copies
            ):
                if copy.source.meets(ranges):
                    target = plan.targets[copy.target.tensor]
                    spans = [
                        range(start // chunk, -(-(start + length) // chunk))
                        for (start, length), chunk in zip(
                            copy.target.box(ranges), target.chunk, strict=True
                        )
                    ]
                    for index in itertools.product(*spans):
                        owners.setdefault((copy.target.tensor, index), set()).add(number)
    assert {len(found) for found in owners.values()} == {1}
    assert {number for found in owners.values() for number in found} == {0, 1, 2}


def test_shares_are_of_about_equal_bytes(shallow, small_blocks):
    plan = planned(shallow("31b"), "maxtext")
    sizes = [
        sum(plan.sources[name].spec.nbytes for name in share) for share in split_sources(plan, 3)
    ]
    largest = max(source.spec.nbytes for source in plan.sources.values())
    assert max(sizes) - min(sizes) <= largest


@pytest.mark.each(1)
@pytest.mark.parametrize("options", [{}, {"ocdbt": False}, {"scan_layers": True}])
@pytest.mark.parametrize("layout", ["maxtext", "gemma-jax", "tunix"])
def test_three_processes_make_what_one_makes(shallow, tmp_path, small_blocks, layout, options):
    if layout != "maxtext" and "scan_layers" in options:
        options = {"dtype": "float32"}
    source = shallow("26b-a4b", scanned="scan_layers" in options)
    to_native(source, tmp_path / "one", layout=layout, **options)
    reports = together(3, source, tmp_path / "three", layout=layout, **options)
    assert [report.arrays_written for report in reports] == [reports[0].arrays_written] * 3
    one, three = (arrays_of(tmp_path / name, layout) for name in ("one", "three"))
    assert not differing(one, three)
    assert manifest(tmp_path / "one") == manifest(tmp_path / "three")
    assert verify(tmp_path / "three").passed
    assert to_hf(tmp_path / "three", tmp_path / "back").bit_for_bit
    left = [path.name for path in tmp_path.rglob(".gemma-convert*")]
    assert not left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "one", "three"]


def test_plain_orbax_restores_what_several_processes_wrote(shallow, tmp_path, small_blocks):
    import orbax.checkpoint as ocp

    to_native(shallow("e2b"), tmp_path / "one")
    together(2, shallow("e2b"), tmp_path / "two")
    assert (tmp_path / "two" / "0" / "items" / "ocdbt.process_1").is_dir()
    one, two = (
        ocp.PyTreeCheckpointer().restore(tmp_path / name / "0" / "items")["params"]["params"]
        for name in ("one", "two")
    )
    assert not differing(_flat(one), _flat(two))


def _flat(tree, path=""):
    found = {}
    for key, value in tree.items():
        found |= (
            _flat(value, f"{path}/{key}") if isinstance(value, dict) else {f"{path}/{key}": value}
        )
    return {name: np.asarray(value) for name, value in found.items()}


def test_values_that_do_not_come_back_are_kept_whoever_meets_them(shallow, tmp_path):
    """The embedding is scaled: a few of its float32 values are lost, and so is a whole tensor."""
    source = tmp_path / "source"
    shutil.copytree(shallow("31b", dtype="float32"), source)
    to_native(source, tmp_path / "one")
    together(2, source, tmp_path / "two")
    assert manifest(tmp_path / "one") == manifest(tmp_path / "two")
    assert to_hf(tmp_path / "two", tmp_path / "back").bit_for_bit


def test_single_exceptions_of_other_processes_are_kept(shallow, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(shallow("31b"), source)
    file = source / "model.safetensors"
    _patch(file, "model.language_model.embed_tokens.weight", {5: 0x7F7F, 701: 0x7FC1})
    plan = planned(source, "maxtext")
    name = "model.language_model.embed_tokens.weight"
    count = next(n for n in (2, 3, 4, 5) if name not in split_sources(plan, n)[0])
    to_native(source, tmp_path / "one")
    reports = together(count, source, tmp_path / "more")
    assert manifest(tmp_path / "one")["exceptions"] == manifest(tmp_path / "more")["exceptions"]
    assert reports[0].exceptions == manifest(tmp_path / "one")["exceptions"] > 0
    assert to_hf(tmp_path / "more", tmp_path / "back").bit_for_bit


def test_a_failure_is_heard_in_the_midst_of_the_work(tmp_path):
    store = Store({"step/0/1": "", "failure/first": "1 3 The source is gone.", "left/1": ""})
    publication = Publication(
        target=tmp_path / "out",
        strangers=beside_native,
        overwrite=False,
        resume=False,
        progress=None,
        processes=Processes(store, 0, 2),
    )

    went_on = []

    def write(_, bar):
        bar.advance(1, "a tensor")
        went_on.append(True)

    with pytest.raises(GemmaConvertError, match="Process 1 failed"):
        publication.publish("key", "", 1, write)
    assert not went_on and not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", [0, 1])
def test_a_failure_of_one_ends_all_and_leaves_nothing(shallow, tmp_path, small_blocks, broken):
    whole, source = shallow("31b"), tmp_path / "damaged"
    shutil.copytree(whole, source)

    def each(index):
        return {"source": source if index == broken else whole}

    read = SafetensorsFolder.read_into

    def fail(self, tensor, offset, buffer):
        if self.folder == source:
            raise SourceError("The source cannot be read.", where=self.folder)
        return read(self, tensor, offset, buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsFolder, "read_into", fail)
        results = together(2, whole, tmp_path / "out", each=each)
    assert isinstance(results[broken], SourceError)
    assert results[1 - broken].what == f"Process {broken} failed."
    assert results[1 - broken].exit_code == SourceError.exit_code
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_an_interrupted_job_is_continued(shallow, tmp_path, small_blocks):
    source = shallow("31b")
    to_native(source, tmp_path / "one", ocdbt=False)
    reads, read = Counter(), SafetensorsFolder.read_into

    def counted(self, tensor, offset, buffer):
        reads[tensor.name] += 1
        if stop and len(reads) > 60:
            raise KeyboardInterrupt
        return read(self, tensor, offset, buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsFolder, "read_into", counted)
        stop = True
        results = together(2, source, tmp_path / "two", ocdbt=False)
        assert all(isinstance(result, KeyboardInterrupt) for result in results)
        assert list((tmp_path / ".two.partial/new").glob(".gemma*journal*"))
        stop = False
        reads.clear()
        together(2, source, tmp_path / "two", ocdbt=False, resume=True)
    plan = planned(source, "maxtext")
    assert len(reads) < len(plan.sources)
    assert not differing(
        arrays_of(tmp_path / "one", "maxtext"), arrays_of(tmp_path / "two", "maxtext")
    )
    assert verify(tmp_path / "two", against=source).passed


def test_fast_llm_is_refused(shallow, tmp_path):
    results = together(2, shallow("31b"), tmp_path / "out", layout="fast-llm")
    assert [result.exit_code for result in results] == [UsageError.exit_code] * 2
    assert all("cannot be written by several processes" in str(result) for result in results)
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_not_shared_is_named(shallow, tmp_path):
    others = Processes(Store({"step/0/0": ""}), 1, 2)
    with pytest.raises(TargetError, match="process that leads"):
        to_native(shallow("31b"), tmp_path / "out", processes=others)


def by_command_line(*sources_and_target):
    """Exit code, stdout and stderr of real processes, each with its source; they meet at a port."""
    *sources, target = sources_and_target
    words = [target, "--format", "maxtext", "--json", "--verify"]
    words += ["--coordinator", f"127.0.0.1:{_free_port()}", "--processes", len(sources)]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "gemma_convert", "to-native"]
            + [str(word) for word in (source, *words, "--process", number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, source in enumerate(sources)
    ]
    ended = [process.communicate(timeout=300) for process in running]
    return [(process.returncode, *texts) for process, texts in zip(running, ended, strict=True)]


def test_two_processes_by_command_line(tiny, tmp_path):
    """The one that leads reports."""
    source = tiny("31b", layers=6)
    to_native(source, tmp_path / "one")
    first, second = by_command_line(source, source, tmp_path / "two")
    assert first[0] == second[0] == 0, (first[2], second[2])
    assert json.loads(first[1])["arrays_written"] > 40
    assert not second[1]
    one, two = (arrays_of(tmp_path / name, "maxtext") for name in ("one", "two"))
    assert not differing(one, two)
    assert manifest(tmp_path / "one") == manifest(tmp_path / "two")


@pytest.mark.large
def test_both_end_with_the_code_of_the_one_that_fails(tiny, tmp_path):
    source = tiny("31b", layers=6)
    first, second = by_command_line(source, tmp_path / "none", tmp_path / "two")
    assert first[0] == second[0] == SourceError.exit_code, (first[2], second[2])
    assert "error: Process 1 failed." in first[2] and str(tmp_path / "none") in first[2]
    assert first[1] == second[1] == "" and "error" not in second[2]
    assert not list(tmp_path.iterdir())


def test_a_failure_after_the_conversion_ends_all(tiny, tmp_path, monkeypatch, capsys):
    """Process 0 still verifies; the others wait for what it finds."""
    words = ["to-native", tiny("31b", layers=6), tmp_path / "out", "--format", "maxtext"]
    monkeypatch.setattr(sys, "argv", ["gemma-convert", *map(str, words), "--dry-run"])
    store = Store({"failure/first": "0 1 The checkpoint is not what was read.", "left/0": ""})
    monkeypatch.setattr(joined, "connect", lambda *_: Processes(store, 1, 2))
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1 and not capsys.readouterr().out
    store = Store({"step/0/0": ""})
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0 and not capsys.readouterr().out


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("here:1", None, None, False), "belong together"),
        (("here", 2, 0, False), "HOST:PORT"),
        (("here:1", 2, 2, False), "0 to 1"),
        ((None, None, 1, True), "leave out"),
    ],
)
def test_options_that_contradict_each_other(arguments, message):
    with pytest.raises(UsageError, match=message):
        connect(*arguments)


def test_without_options_a_process_is_by_itself():
    assert connect(None, None, None, False) == Processes()
