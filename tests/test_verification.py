"""verify: passes what is right, and names what is not, whichever side is at hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cases import CASES
from native_checkpoints import damaged
from safetensors.numpy import load_file, save_file
from trees import read_safetensors

from gemma_convert import SourceError, UsageError, to_hf, to_native, verify

OURS = Path("hf", "gemma-convert")
KERNEL = "params/params/decoder/layers_3/mlp/wi_0/kernel"


def change(items: Path, array: str, edit) -> None:
    """Writes edited values into one array of a checkpoint, by tensorstore itself."""
    import tensorstore as ts

    key = array.replace("/", ".")
    base = {"driver": "file", "path": f"{items}/"}
    store = ts.open(
        {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{key}/"}},
        open=True,
    ).result()
    store.write(edit(np.array(store.read().result()))).result()


@pytest.mark.share(4)
@pytest.mark.parametrize(
    ("family", "scanned", "scaled"),
    [
        *((*case, "float32") for case in CASES),
        ("e4b", False, "bfloat16"),
        ("31b", True, "bfloat16"),
    ],
)
def test_what_was_converted_is_verified(shallow, tmp_path, family, scanned, scaled):
    source, out = shallow(family, scanned), tmp_path / "out"
    made = to_native(source, out, scan_layers=scanned, scaled_dtype=scaled)
    for against in (None, source):
        report = verify(out, against=against)
        assert report.passed, report.different
        assert report.checked >= made.arrays_written
    to_hf(out, tmp_path / "back")
    back = verify(tmp_path / "back", against=out)
    assert back.passed, back.different
    assert back.checked == made.tensors_converted + made.tensors_carried


def one_bit(values: np.ndarray) -> np.ndarray:
    values.view(np.uint16).reshape(-1)[7] ^= 1
    return values


def swap_rows(values: np.ndarray) -> np.ndarray:
    return values[::-1].copy()


@pytest.mark.each(1)
@pytest.mark.parametrize("edit", [one_bit, swap_rows])
@pytest.mark.parametrize("by", ["manifest", "source"])
def test_one_changed_bit_is_named(shallow, tmp_path, edit, by):
    to_native(shallow("31b"), tmp_path / "out")
    change(tmp_path / "out" / "0" / "items", KERNEL, edit)
    report = verify(tmp_path / "out", against=shallow("31b") if by == "source" else None)
    assert damaged(report) == [KERNEL]


def test_layers_in_the_wrong_order_are_named(shallow, tmp_path):
    """Two layers of a scan swapped: every shape is right."""
    to_native(shallow("31b", scanned=True), tmp_path / "out", scan_layers=True)
    array = "params/params/decoder/scanned_blocks/local_layers/mlp/wo/kernel"
    change(tmp_path / "out" / "0" / "items", array, lambda v: v[:, ::-1].copy())
    for against in (None, shallow("31b", scanned=True)):
        assert damaged(verify(tmp_path / "out", against=against)) == [array]


def test_the_wrong_original_is_noticed(shallow, tmp_path):
    to_native(shallow("31b"), tmp_path / "out")
    report = verify(tmp_path / "out", against=shallow("31b", seed=1))
    assert len(report.different) > 100
    with pytest.raises(SourceError, match="do not match the original"):
        verify(tmp_path / "out", against=shallow("26b-a4b"))


def test_a_rounded_embedding_is_what_rounding_gives_and_nothing_else(shallow, tmp_path):
    source, out = shallow("31b"), tmp_path / "out"
    to_native(source, out, scaled_dtype="bfloat16")
    assert verify(out, against=source).passed
    embedding = "params/params/token_embedder/embedding"
    change(out / "0" / "items", embedding, one_bit)
    for against in (None, source):
        assert damaged(verify(out, against=against)) == [embedding]


FILES = {
    "carried": "_tower",
    "file": "hf/config.json",
    "header": "model.safetensors.header",
    "lost file": "hf/tokenizer.json",
    "lost carried": "hf/gemma-convert/carried.safetensors",
}


@pytest.mark.share(5, 1)
@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("by", ["manifest", "source"])
def test_the_sidecar_is_verified_too(shallow, tmp_path, what, by):
    source, out = shallow("e2b"), tmp_path / "out"
    to_native(source, out)
    if what == "carried":
        file = out / OURS / "carried.safetensors"
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    elif what == "file":
        (out / "hf" / "config.json").write_bytes((out / "hf" / "config.json").read_bytes() + b" ")
    elif what == "header":
        (out / OURS / "headers" / "model.safetensors.header").write_bytes(b"x")
    elif what == "lost file":
        (out / "hf" / "tokenizer.json").unlink()
    else:
        (out / OURS / "carried.safetensors").unlink()
    if what != "carried":
        with pytest.raises(SourceError, match="damaged"):
            to_hf(out, tmp_path / "back")
    report = verify(out, against=source if by == "source" else None)
    assert any(FILES[what] in name for name in report.different)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_carried_tensors_are_those_of_the_source(shallow, tmp_path, dtype):
    """The checkpoint is intact; the source has other bits, or the same bits in another dtype."""
    source, out = shallow("e2b"), tmp_path / "out"
    to_native(source, out)
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if "_tower" in name and tensors[name].ndim == 2)
    bits = tensors[name].view(np.uint16)
    same = dtype == tensors[name].dtype.name
    tensors[name] = (bits ^ 1).view(tensors[name].dtype) if same else bits.view(dtype)
    other = shutil.copytree(source, tmp_path / "other")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert verify(out, against=other).different[name] == "differs from the tensor that was carried"


def test_a_changed_export_is_named(shallow, tmp_path):
    to_native(shallow("26b-a4b", scanned=True), tmp_path / "out", scan_layers=True)
    to_hf(tmp_path / "out", tmp_path / "back")
    file = tmp_path / "back" / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = "model.language_model.layers.4.experts.gate_up_proj"
    data[8 + length + header[name]["data_offsets"][0] + 100] ^= 1
    file.write_bytes(data)
    assert damaged(verify(tmp_path / "back", against=tmp_path / "out")) == [name]


@pytest.mark.large
def test_exports_with_options_are_verified(shallow, tmp_path):
    to_native(shallow("e4b"), tmp_path / "out")
    for number, options in enumerate(
        (
            {"dtype": "float32"},
            {"kv_shared": "omit"},
            {"text_only": True},
            {"max_shard_size": 10**5},
        )
    ):
        back = tmp_path / f"back{number}"
        to_hf(tmp_path / "out", back, **options)
        report = verify(back, against=tmp_path / "out")
        assert report.passed, report.different
        assert len(read_safetensors(back)) >= report.checked > 100


def test_checkpoints_of_maxtext_itself(oracle):
    for folder in sorted((oracle / "maxtext").iterdir()):
        source = oracle / "hf" / folder.name.split("_")[0]
        report = verify(folder, against=source)
        assert report.passed, (folder.name, report.different)


def test_what_cannot_be_verified_is_said(shallow, tmp_path):
    with pytest.raises(UsageError, match="`against`"):
        verify(shallow("31b"))
    to_native(shallow("31b"), tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "hf")
    for against in (None, shallow("31b")):
        assert damaged(verify(tmp_path / "out", against=against)) == ["hf/"]
