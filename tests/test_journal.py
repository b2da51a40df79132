"""A journal is continued as far as it can be believed, and no further."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from native_checkpoints import arrays_of, differing

from gemma_convert import to_native
from gemma_convert.engine.journal import Journal
from gemma_convert.mapping import plan as planning
from gemma_convert.stores.safetensors.reader import SafetensorsFolder

STOP = 200
"""Blocks that the first run reads before it is interrupted."""

FINISHED = 8
"""Tensors that it has finished then, at least."""


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks smaller than one expert, so that they are cut where gate and up part."""
    monkeypatch.setattr(planning, "BLOCK_BYTES", 4_000)
    monkeypatch.setattr(planning, "GATHER_BYTES", 2_000)


class Run:
    """An interrupted conversion: its journal, and the tensors that are read when it goes on."""

    def __init__(self, source: Path, out: Path, **options):
        self.source, self.out, self.options = source, out, options
        self.partial = out.with_name(f".{out.name}.partial") / "new"
        with pytest.raises(KeyboardInterrupt):
            self._convert(STOP)
        self.key, *lines = self.journal.read_text().splitlines()
        self.entries = [json.loads(line) for line in lines]

    @property
    def journal(self) -> Path:
        return self.partial / ".gemma-convert.journal"

    def believed(self) -> set[str]:
        """The tensors that the journal says are finished."""
        return {entry["tensor"] for entry in self.entries}

    def write(self, entries: list) -> None:
        """Writes the journal anew, under its key."""
        lines = [self.key, *map(json.dumps, entries)]
        self.journal.write_text("\n".join(lines) + "\n")

    def resume(self) -> set[str]:
        """The tensors that the second run reads."""
        return self._convert(None)

    def _wait(self) -> None:
        """Until what has been read is written, and the experts are among it."""
        ending = time.monotonic() + 60
        while time.monotonic() < ending:
            text = self.journal.read_text()
            if text.count("\n") > FINISHED and "gate_up_proj" in text:
                return
            time.sleep(0.01)

    def _convert(self, stop: int | None) -> set[str]:
        read, names, calls = SafetensorsFolder.read_into, set(), [0]

        def counted(folder, tensor, offset, buffer):
            names.add(tensor.name)
            calls[0] += 1
            if calls[0] == stop:
                self._wait()
                raise KeyboardInterrupt
            return read(folder, tensor, offset, buffer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SafetensorsFolder, "read_into", counted)
            to_native(self.source, self.out, resume=True, **self.options)
        return names


@pytest.fixture
def begun(shallow, tmp_path, small_blocks) -> Run:
    return Run(shallow("26b-a4b"), tmp_path / "out", ocdbt=False)


@pytest.fixture
def whole(shallow, converted) -> Path:
    return converted(shallow("26b-a4b"), "maxtext", ocdbt=False)


def completed(run: Run, whole: Path) -> None:
    assert not differing(arrays_of(run.out, "maxtext"), arrays_of(whole, "maxtext"))
    left = [path for path in run.out.parent.rglob("*") if path.name.startswith(".")]
    assert {path.name for path in left} <= {".zarray"}


def test_what_is_finished_is_not_read_again(begun, whole):
    """Gate and up lie in one tensor, whose blocks have either the one or the other."""
    experts = next(entry for entry in begun.entries if entry["tensor"].endswith("gate_up_proj"))
    gate, up = experts["regions"].values()
    assert len(gate) == len(up) > 1
    assert len(begun.entries) >= FINISHED
    assert not begun.resume() & begun.believed()
    completed(begun, whole)


def lacking(regions: dict) -> dict:
    (array, listed), *others = regions.items()
    return {array: listed[1:], **dict(others)}


def elsewhere(regions: dict) -> dict:
    (array, listed), *others = regions.items()
    return {f"{array}/elsewhere": listed, **dict(others)}


CHANGES = (
    lambda regions: None,
    lambda regions: [],
    lambda regions: dict.fromkeys(regions, 5),
    lambda regions: dict.fromkeys(regions, (("ab", "cd"),)),
    lambda regions: dict.fromkeys(regions, ((((0,),), "cd"),)),
    lacking,
    elsewhere,
)


def test_entries_whose_regions_are_not_those_of_the_tensor(begun, whole):
    """Each of the first has another fault, one is of a tensor that is not converted."""
    for entry, change in zip(begun.entries, CHANGES, strict=False):
        entry["regions"] = change(entry["regions"])
    good = begun.entries[len(CHANGES)]
    begun.write([*begun.entries, {**good, "tensor": "nobody"}])
    read = begun.resume()
    assert good["tensor"] not in read
    assert {entry["tensor"] for entry in begun.entries[: len(CHANGES)]} <= read
    completed(begun, whole)


def test_nothing_is_believed_after_a_line_that_is_no_object(begun, whole):
    begun.write([*begun.entries[:3], [], *begun.entries[3:]])
    read = begun.resume()
    names = [entry["tensor"] for entry in begun.entries]
    assert not read & {*names[:3]}
    assert {*names[3:]} <= read
    completed(begun, whole)


@pytest.mark.parametrize("line", ["[]", "7", "null", "{", '{"a": 1, "a": 1}', '{"a": NaN}', "\xff"])
def test_what_follows_the_last_whole_line_is_cut_off(tmp_path, line):
    path = tmp_path / ".gemma-convert.journal"
    path.write_text(f'{{"key": "k"}}\n{{"tensor": "a"}}\n{line}\n{{"tensor": "b"}}\n', "latin-1")
    journal = Journal(tmp_path, "k")
    journal.add({"tensor": "c"})
    journal.close()
    assert journal.entries == [{"tensor": "a"}]
    assert path.read_text() == '{"key": "k"}\n{"tensor": "a"}\n{"tensor": "c"}\n'


def test_chunks_that_cannot_be_read_are_written_again(begun, whole):
    cut, removed, longer, *_ = begun.entries
    for entry in (cut, removed, longer):
        array = next(iter(entry["regions"]))
        folder = begun.partial / "0" / "items" / array.replace("/", ".")
        chunk = min(path for path in folder.iterdir() if path.name != ".zarray")
        data = chunk.read_bytes()
        chunk.write_bytes(data[: len(data) // 2] if entry is cut else data + b"x")
        if entry is removed:
            chunk.unlink()
    damaged = {entry["tensor"] for entry in (cut, removed, longer)}
    read = begun.resume()
    assert damaged <= read
    assert not read & (begun.believed() - damaged)
    completed(begun, whole)
