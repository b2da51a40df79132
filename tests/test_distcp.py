"""torch's distributed checkpoint as a source: every value, and nothing of a pickle is ever run."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distcp_folders import copy_others, halves, quarters, save_distcp, state_of, with_empty
from native_checkpoints import differing, passes, sums
from test_cli import fails
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from trees import read_safetensors

from gemma_convert import SourceError, inspect, to_hf, to_native, verify
from gemma_convert.stores.distcp.metadata import FILE, read_metadata
from gemma_convert.stores.distcp.plain_pickle import read_plain
from gemma_convert.stores.open_files import MOST_OPEN
from gemma_convert.stores.weights import open_weights

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Any], object]


def values(folder: Path) -> dict[str, np.ndarray]:
    """Name → values of every tensor, as a conversion reads them."""
    from gemma_convert.arrays.dtypes import numpy_dtype

    with open_weights(folder) as reader:
        return {
            name: np.frombuffer(b"".join(reader.pieces(name)), numpy_dtype(spec.dtype)).reshape(
                spec.shape
            )
            for name, spec in reader.specs.items()
        }


def training(state: Tensors) -> dict[str, Any]:
    """What a training loop saves: model, optimizer and counters."""
    moments = {name: {"exp_avg": tensor.float()} for name, tensor in list(state.items())[:3]}
    return {"model": state, "optimizer": {"state": moments, "param_groups": [{}]}, "step": 5}


WRAPPED: dict[str, Callable[[Tensors], dict[str, Any]]] = {
    "as it is": dict,
    "training": training,
    "app": lambda state: {"app": {"model": state}},
    "flat": lambda state: {f"state_dict.{name}": tensor for name, tensor in state.items()},
    "compiled": lambda state: {"model": {f"_orig_mod.{n}": tensor for n, tensor in state.items()}},
    "base model": lambda state: {
        "model": {name.removeprefix("model."): tensor for name, tensor in state.items()}
    },
}


@pytest.mark.each(1)
@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("parts", [None, halves(0), halves(1), quarters, with_empty])
def test_values_are_those_that_were_saved(how, parts, shallow, tmp_path):
    source = shallow("31b")
    state = state_of(source)
    folder = save_distcp(tmp_path / "d", WRAPPED[how](state), parts)
    assert not differing(values(folder), read_safetensors(source))


def test_dtypes_scalars_and_pieces_of_any_size(tmp_path):
    state = {
        "a": torch.arange(2 * 3 * 5 * 7, dtype=torch.float32).reshape(2, 3, 5, 7),
        "b": torch.tensor(3.5),
        "c": torch.empty(0, 3),
        "d": torch.tensor([True, False]),
        "e": torch.arange(40, dtype=torch.float16)[7:19],
        "f": torch.arange(9, dtype=torch.int64),
    }
    folder = save_distcp(tmp_path / "d", state, halves(2))
    with open_weights(folder) as reader:
        for name, tensor in state.items():
            data, size = tensor.numpy().tobytes(), tensor.element_size()
            for places in ((0, 0), (0, 1), (3, 4), (5, 71), (16, 190), (0, tensor.numel())):
                begin, end = (min(place, tensor.numel()) * size for place in places)
                found = bytearray(end - begin)
                reader.read_into(reader.tensors[name], begin, memoryview(found))
                assert found == data[begin:end], (name, places)


def descriptors() -> int:
    return len([*Path("/dev/fd").iterdir()])


def test_more_files_than_may_be_open(tmp_path):
    state = {f"t{number}": torch.full((2,), number) for number in range(MOST_OPEN + 40)}
    folder = save_distcp(tmp_path / "d", state, one_file=False)
    before = descriptors()
    with open_weights(folder) as reader:
        assert descriptors() <= before + MOST_OPEN
        for name, tensor in state.items():
            assert b"".join(reader.pieces(name)) == tensor.numpy().tobytes()
        reader.check_unchanged()
    assert descriptors() == before


def test_there_and_back(shallow, tmp_path):
    source = shallow("31b")
    folder = save_distcp(tmp_path / "d", training(state_of(source)), quarters)
    copy_others(source, folder)
    before = sums(folder)
    found = inspect(folder)
    assert (found.layout, found.coverage.complete) == ("huggingface", True)
    assert found.extras == (
        "optimizer (3 entries of the state)",
        "step (1 entry of the state)",
    )
    report = to_native(folder, tmp_path / "n", layout="maxtext", scan_layers=True)
    assert set(found.extras) <= set(report.not_carried)
    passes(tmp_path / "n")
    passes(tmp_path / "n", folder)
    assert to_hf(tmp_path / "n", tmp_path / "back").bit_for_bit
    assert not differing(read_safetensors(tmp_path / "back"), read_safetensors(source))
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert names == {path.name for path in source.iterdir()}
    assert sums(folder) == before


def test_another_folder_describes_it(shallow, converted, tmp_path):
    source = shallow("31b", shards=2)
    folder = save_distcp(tmp_path / "d", state_of(source))
    message = fails(3, "to-native", folder, tmp_path / "n", "--format", "gemma-jax")
    assert "it has no config.json" in message and "--like" in message
    for number, like in enumerate((source, converted(source, "maxtext"))):
        native, back = tmp_path / f"n{number}", tmp_path / f"back{number}"
        to_native(folder, native, layout="gemma-jax", like=like)
        passes(native)
        assert to_hf(native, back).bit_for_bit
        assert not differing(read_safetensors(back), read_safetensors(source))
        assert not {"model.safetensors.index.json", FILE} & {path.name for path in back.iterdir()}
        assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_one_bit_is_seen(shallow, tmp_path):
    source = shallow("31b")
    state = state_of(source)
    folder = save_distcp(tmp_path / "d", state)
    copy_others(source, folder)
    to_native(folder, tmp_path / "n", layout="gemma-jax")
    state["model.language_model.norm.weight"].view(torch.int16)[3] ^= 1
    shutil.rmtree(folder)
    save_distcp(folder, state)
    copy_others(source, folder)
    assert {*verify(tmp_path / "n", against=folder).different} == {"final_norm/scale"}


def test_transformers_is_not_handed_one(shallow, tmp_path, converted):
    source = shallow("31b")
    folder = save_distcp(tmp_path / "d", state_of(source))
    copy_others(source, folder)
    message = fails(3, "logit-check", folder, converted(source, "gemma-jax"))
    assert "transformers does not load torch's distributed checkpoints" in message


def test_two_models_are_refused(tmp_path):
    state = {"model.embed_tokens.weight": torch.ones(2, 2)}
    folder = save_distcp(tmp_path / "d", {"model": state, "ema": dict(state)})
    assert "holds several models" in fails(3, "inspect", folder)


# Hostile and broken folders.


@pytest.fixture
def saved(tmp_path) -> Path:
    state = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.arange(9.0),
    }
    return save_distcp(tmp_path / "d", state, halves(0))


def edit(folder: Path, change: Edit) -> None:
    """Changes the metadata as torch has them, and pickles them again."""
    metadata = pickle.loads((folder / FILE).read_bytes())
    change(metadata)
    (folder / FILE).write_bytes(pickle.dumps(metadata))


def refused(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        values(folder)
    assert caught.value.exit_code == 3
    assert len(caught.value.message) < 2000
    return caught.value.message


class Runs:
    """What runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_no_command_is_run(protocol, saved, tmp_path):
    marker = tmp_path / "marker"
    (saved / FILE).write_bytes(pickle.dumps(Runs(marker), protocol))
    message = fails(3, "inspect", saved)
    assert "it is never unpickled" in message
    assert "posix.system" in message or "the opcode" in message
    assert not marker.exists()


def test_no_command_is_run_from_within_or_beside_a_tensor(saved, tmp_path):
    marker = tmp_path / "marker"
    edit(saved, lambda metadata: setattr(metadata, "planner_data", {"a": Runs(marker)}))
    assert "the name posix.system" in refused(saved)
    save_distcp(tmp_path / "e", {"a": torch.ones(2)})
    file = tmp_path / "e" / "__0_0.distcp"
    with zipfile.ZipFile(file) as archive:
        contents = {entry: archive.read(entry) for entry in archive.namelist()}
    contents["archive/data.pkl"] = pickle.dumps(Runs(marker), 2)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    length = file.stat().st_size
    edit(tmp_path / "e", lambda m: [setattr(i, "length", length) for i in m.storage_data.values()])
    assert "the name posix.system" in refused(tmp_path / "e")
    assert not marker.exists()


def first(metadata: Any, name: str = "a") -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def tensor(metadata: Any, name: str = "a") -> Any:
    return metadata.state_dict_metadata[name]


def moved(metadata: Any) -> None:
    old = tensor(metadata).chunks[1]
    tensor(metadata).chunks[1] = ChunkStorageMetadata(torch.Size([0, 0]), old.sizes)


BROKEN: dict[str, tuple[Edit, str]] = {
    "a folder above": (lambda m: setattr(first(m), "relative_path", "../x.distcp"), "no file besi"),
    "an absolute path": (lambda m: setattr(first(m), "relative_path", "/etc/passwd"), "no file be"),
    "another file": (lambda m: setattr(first(m), "relative_path", "config.json"), "no file beside"),
    "a missing file": (lambda m: setattr(first(m), "relative_path", "no.distcp"), "is missing"),
    "beyond the end": (lambda m: setattr(first(m), "offset", 1 << 40), "beyond its end"),
    "before the start": (lambda m: setattr(first(m), "offset", -5), "a number of a: -5"),
    "no number": (lambda m: setattr(first(m), "length", "9"), "a number of a"),
    "too short": (lambda m: setattr(first(m), "length", 30), "is broken"),
    "shifted": (lambda m: setattr(first(m), "offset", first(m).offset + 7), "is broken"),
    "crossed": (lambda m: setattr(first(m), "offset", first(m, "b").offset), "bfloat16"),
    "of another shape": (lambda m: setattr(first(m), "offset", first(m, "c").offset), "(3,)"),
    "huge": (lambda m: setattr(tensor(m), "size", torch.Size([1 << 50, 1 << 50])), "a size of a"),
    "a larger shape": (lambda m: setattr(tensor(m), "size", torch.Size([3, 3])), "do not cover"),
    "twice the same": (moved, "do not cover"),
    "a part is gone": (lambda m: tensor(m).chunks.pop(), "do not cover"),
    "no place": (lambda m: m.storage_data.clear(), "nothing says where"),
    "compressed": (lambda m: setattr(first(m), "transform_descriptors", ["zstd"]), "transformed"),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", []), "state_dict_metadata"),
    "another dtype": (
        lambda m: setattr(tensor(m).properties, "dtype", torch.float16),
        "float32",
    ),
    "no weights": (
        lambda m: setattr(tensor(m).properties, "dtype", torch.complex64),
        "the name torch.complex64",
    ),
}


@pytest.mark.share(1)
@pytest.mark.parametrize("how", BROKEN)
def test_what_torch_does_not_write_is_refused(how, saved):
    change, message = BROKEN[how]
    edit(saved, change)
    assert message in refused(saved)


NESTED = b"(" * 100_000 + b"t" * 100_000 + b"."
DOUBLED = b"]\x94" + b"".join(b"h\x00h\x00\x86\x94" for _ in range(60)) + b"."
PICKLES = {
    "nothing": b"",
    "no end": b"\x80\x04]",
    "no stack": b"\x80\x04e.",
    "no memo": b"\x80\x04h\x07.",
    "a mark alone": b"\x80\x04(.",
    "itself": b"\x80\x04]\x94h\x00a.",
    "nested": NESTED,
    "doubled": DOUBLED,
    "a key that is nested": b"}" + b")" + b"\x85" * 100_000 + b"Ns.",
    "a long number": b"\x80\x04\x8b\xff\xff\xff\x7f" + b"\xff" * 100 + b".",
    "a long text": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "an extension": b"\x80\x04\x82\x01.",
    "an instance": b"(ios\nsystem\n.",
    "a new object": b"\x80\x04cos\nsystem\n)}\x92.",
    "bytes": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00.",
    "text": b"S'abc'\n.",
}


@pytest.mark.share(1)
@pytest.mark.parametrize("what", PICKLES)
def test_other_pickles_are_refused(what, saved):
    (saved / FILE).write_bytes(PICKLES[what])
    assert str(saved / FILE) in refused(saved)


def test_a_key_that_could_be_hashed_without_end_is_refused():
    with pytest.raises(SourceError, match="neither text nor number"):
        read_plain(b"})Ns.", (), "here")


def test_so_many_opcodes_are_no_checkpoint(monkeypatch):
    monkeypatch.setattr("gemma_convert.stores.distcp.plain_pickle.MOST_STEPS", 100)
    with pytest.raises(SourceError, match="more than 100 opcodes"):
        read_plain(b"]" * 200 + b".", (), "here")


def test_a_tensor_that_is_not_contiguous_is_refused(saved, tmp_path):
    folder = save_distcp(tmp_path / "e", {"a": torch.arange(6.0).reshape(2, 3).t()})
    with pytest.raises(SourceError, match="the strides"):
        values(folder)


def test_a_file_that_is_replaced_meanwhile_is_noticed(saved):
    with open_weights(saved) as reader:
        file = next(saved.glob("*.distcp"))
        file.write_bytes(file.read_bytes() + b"x")
        with pytest.raises(SourceError, match="changed while it was read"):
            reader.check_unchanged()


def test_links_lead_nowhere(saved, tmp_path):
    file = next(saved.glob("*.distcp"))
    shutil.move(file, tmp_path / "elsewhere.distcp")
    file.symlink_to(tmp_path / "elsewhere.distcp")
    assert "points outside its folder" in fails(3, "inspect", saved)


def test_what_is_listed_is_what_torch_lists(saved):
    theirs = pickle.loads((saved / FILE).read_bytes())
    ours = read_metadata(saved).tensors
    assert ours.keys() == theirs.state_dict_metadata.keys()
    for name, listed in ours.items():
        found = theirs.state_dict_metadata[name]
        assert listed.spec.shape == tuple(found.size)
        assert f"torch.{listed.spec.dtype}" == str(found.properties.dtype)
        chunks = [(tuple(c.offsets), tuple(c.sizes)) for c in found.chunks]
        assert [(c.offsets, c.sizes) for c in listed.chunks] == chunks
