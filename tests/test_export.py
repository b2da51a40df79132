"""to_hf end to end: files back bit for bit, and trained values rounded as numpy rounds them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cases import CASES, FAMILIES
from maxtext_by_hand import maxtext_tree
from native_checkpoints import edit_manifest
from trees import read_safetensors, restore, same_bits

from gemma_convert import SourceError, TargetError, UsageError, to_native
from gemma_convert.mapping import plan as planning
from gemma_convert.model.config import read_architecture
from gemma_convert.stores.orbax import reader as orbax_reader
from gemma_convert.tasks.to_hf import ToHFReport, to_hf

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OURS = Path("hf", "gemma-convert")
EMBEDDING = "model.language_model.embed_tokens.weight"
PLE_FAMILIES = ("e2b", "e4b")

ODD_BITS = {5: 0x7F7F, 700: 0x7FC1, 701: 0x7F80, 702: 0x0001}
"""Place in the embedding → bfloat16 bits: huge, NaN with a payload, infinite, denormal."""

Leaves = Mapping[str, np.ndarray]


def digests(folder: Path) -> dict[str, str]:
    """Name → sha256 of every file below `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def round_trip(source: Path, work: Path, **options) -> ToHFReport:
    """The report of source → work/native → work/back; `options` are those of to_native."""
    to_native(source, work / "native", **options)
    return to_hf(work / "native", work / "back")


def comes_back(source: Path, work: Path, **options) -> ToHFReport:
    """Asserts that a round trip gives back every file of `source`, and that the report says so."""
    report = round_trip(source, work, **options)
    assert digests(work / "back") == digests(source)
    assert report.bit_for_bit
    assert report.identical == report.tensors == len(read_safetensors(source)) > 0
    assert not report.rounded
    assert not report.different
    assert not report.unchecked
    return report


def split(file: Path) -> tuple[dict[str, dict], bytes]:
    """The header of a safetensors file as JSON, and its data."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(file: Path, header: Mapping[str, object], data: bytes, padding: int = 0) -> None:
    text = json.dumps(header).encode() + b" " * padding
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def patch(file: Path, tensor: str, bits: Mapping[int, int], width: int = 2) -> None:
    """Overwrites single elements of one tensor in a safetensors file."""
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start = 8 + length + json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0]
    for place, value in bits.items():
        at = start + width * place
        data[at : at + width] = value.to_bytes(width, "little")
    file.write_bytes(data)


def reorder(file: Path, padding: int) -> None:
    """The same tensors, last first, listed in yet another order, with metadata of its own."""
    header, data = split(file)
    header.pop("__metadata__")
    entries, parts, place = {}, [], 0
    for name in sorted(header, reverse=True):
        begin, end = header[name]["data_offsets"]
        parts.append(data[begin:end])
        offsets = [place, place + end - begin]
        entries[name] = {"data_offsets": offsets, **header[name]} | {"data_offsets": offsets}
        place += end - begin
    listed = {name: entries[name] for name in sorted(entries, key=lambda name: name[::-1])}
    listed["__metadata__"] = {"format": "pt", "made by": "übung"}
    join(file, listed, b"".join(parts), padding)


def with_head(source: Path) -> None:
    """Adds the tied output head that some checkpoints spell out."""
    header, data = split(source / SINGLE)
    begin, end = header[EMBEDDING]["data_offsets"]
    entry = header[EMBEDDING] | {"data_offsets": [len(data), len(data) + end - begin]}
    join(source / SINGLE, header | {"lm_head.weight": entry}, data + data[begin:end])


@pytest.fixture
def copied(shallow, tmp_path) -> Callable[..., Path]:
    """copied(family, scanned): a tiny checkpoint that a test may change."""

    def copy(family: str, scanned: bool = False, **options) -> Path:
        shutil.copytree(shallow(family, scanned, **options), tmp_path / "source")
        return tmp_path / "source"

    return copy


# Every file comes back.


@pytest.mark.share(5)
@pytest.mark.parametrize(
    ("family", "scanned", "shards", "kv_shared"),
    [
        ("e2b", False, 1, "keep"),
        ("e2b", False, 3, "omit"),
        ("e4b", False, 3, "keep"),
        ("e4b", False, 1, "omit"),
        ("26b-a4b", False, 3, "keep"),
        ("26b-a4b", True, 1, "keep"),
        ("31b", False, 1, "keep"),
        ("31b", True, 3, "keep"),
    ],
)
def test_every_file_comes_back(shallow, tmp_path, family, scanned, shards, kv_shared):
    source = shallow(family, scanned, shards=shards, kv_shared=kv_shared)
    report = comes_back(source, tmp_path, scan_layers=scanned)
    assert report.scanned is scanned
    assert report.family == family
    assert len(report.shards) == shards


@pytest.mark.share(6, 3)
@pytest.mark.parametrize(("family", "scanned"), CASES)
def test_text_only_sources_come_back(shallow, tmp_path, family, scanned):
    comes_back(shallow(family, scanned, text_only=True, shards=2), tmp_path, scan_layers=scanned)


@pytest.mark.parametrize("family", ["26b-a4b", "31b"])
def test_towers_that_were_only_carried_come_back(shallow, tmp_path, family):
    source = shallow(family, scanned=True)
    report = comes_back(source, tmp_path, text_only=True, scan_layers=True)
    towers = [name for name in read_safetensors(source) if ".language_model." not in name]
    assert report.tensors_from_original == len(towers) > 0


@pytest.mark.share(6, 2)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("family", "scanned"), [("e2b", False), ("26b-a4b", True), ("31b", False)])
def test_sources_of_other_dtypes_come_back(shallow, tmp_path, family, scanned, dtype):
    comes_back(shallow(family, scanned, dtype=dtype), tmp_path, scan_layers=scanned)
    carried = tmp_path / "native" / OURS / "carried.safetensors"
    whole = carried.exists() and EMBEDDING in split(carried)[0]
    assert whole == (dtype == "float32")


@pytest.mark.each(1)
@pytest.mark.parametrize(("family", "scanned"), [("e4b", False), ("26b-a4b", True)])
@pytest.mark.parametrize(
    ("ocdbt", "compression"), [(True, "zstd"), (False, "none"), (False, "zstd")]
)
def test_every_form_of_the_store_comes_back(shallow, tmp_path, family, scanned, ocdbt, compression):
    options = {"ocdbt": ocdbt, "compression": compression, "scan_layers": scanned}
    comes_back(shallow(family, scanned, shards=3), tmp_path, **options)


@pytest.mark.parametrize("family", ["e2b", "31b"])
def test_an_output_head_that_is_spelt_out_comes_back(copied, tmp_path, family):
    source = copied(family)
    with_head(source)
    comes_back(source, tmp_path)
    assert "lm_head.weight" in read_safetensors(tmp_path / "back")


def test_an_index_of_another_hand_comes_back(copied, tmp_path):
    source = copied("e4b", shards=3)
    index = json.loads((source / INDEX).read_text())
    weight_map = dict(sorted(index["weight_map"].items(), key=lambda entry: entry[0][::-1]))
    metadata = {"note": "übung", "total_size": 17, "more": {"a": [1, None]}}
    text = json.dumps({"weight_map": weight_map, "metadata": metadata}, indent=1)
    (source / INDEX).write_text(text)
    comes_back(source, tmp_path)


@pytest.mark.parametrize("padding", [0, 1003])
def test_headers_of_another_hand_come_back(copied, tmp_path, padding):
    source = copied("26b-a4b", scanned=True, shards=3)
    before = {name: tensor.copy() for name, tensor in read_safetensors(source).items()}
    for file in source.glob("*.safetensors"):
        reorder(file, padding)
    after = read_safetensors(source)
    assert all(same_bits(after[name], before[name]) for name in before)
    comes_back(source, tmp_path, scan_layers=True)


def test_files_of_any_kind_come_back(copied, tmp_path):
    source = copied("31b")
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / "notes.bin.txt").write_bytes(bytes(range(256)))
    (source / "empty").write_bytes(b"")
    config = (source / "config.json").read_text().replace("\n", "\r\n") + "\r\n\r\n"
    (source / "config.json").write_bytes(config.encode())
    comes_back(source, tmp_path)


@pytest.mark.share(4, 1)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_that_scaling_loses_come_back(copied, tmp_path, family):
    source = copied(family)
    patch(source / SINGLE, EMBEDDING, ODD_BITS)
    comes_back(source, tmp_path)
    manifest = json.loads((tmp_path / "native" / OURS / "manifest.json").read_text())
    assert manifest["exceptions"] > 0


def test_few_float32_values_that_scaling_loses_come_back_one_by_one(copied, tmp_path):
    """Most of this embedding are powers of two, which scaling keeps; so only a few are lost."""
    source = copied("31b", dtype="float32")
    header, _ = split(source / SINGLE)
    size = math.prod(header[EMBEDDING]["shape"])
    coarse = {place: (100 + place % 50) << 23 for place in range(size)}
    fine = {place: 0x3F800000 + place * 7919 % (1 << 23) for place in range(1, size, 200)}
    patch(source / SINGLE, EMBEDDING, coarse | fine, width=4)
    comes_back(source, tmp_path)
    kept = read_safetensors(tmp_path / "native" / OURS)
    assert 0 < len(kept[f"{EMBEDDING}/index"]) <= len(fine)


@pytest.mark.share(4, 1)
@pytest.mark.parametrize(
    ("family", "scanned", "whole_chunks"),
    [
        ("e2b", False, True),
        ("26b-a4b", True, True),
        ("31b", True, False),
        ("31b", False, False),
    ],
)
def test_parts_as_small_as_those_of_real_models_come_back(
    shallow, tmp_path, monkeypatch, family, scanned, whole_chunks
):
    """Real arrays are read in many parts, of one chunk or of many; here parts are made tiny."""
    if not whole_chunks:
        monkeypatch.setattr(planning, "BLOCK_BYTES", 4000)
        monkeypatch.setattr(planning, "GATHER_BYTES", 64)
    source = shallow(family, scanned, shards=3)
    to_native(source, tmp_path / "native", scan_layers=scanned)
    monkeypatch.setattr(planning, "BLOCK_BYTES", 1000)
    monkeypatch.setattr("gemma_convert.stores.safetensors.checked_writer.PIECE_BYTES", 1022)
    monkeypatch.setattr("gemma_convert.stores.safetensors.writer.LET_GO_BYTES", 5000)
    report = to_hf(tmp_path / "native", tmp_path / "back", like=source)
    assert digests(tmp_path / "back") == digests(source)
    assert report.unchecked == report.tensors
    assert to_hf(tmp_path / "native", tmp_path / "again").bit_for_bit
    assert digests(tmp_path / "again") == digests(source)


def test_the_native_side_is_never_written(shallow, tmp_path):
    to_native(shallow("e2b"), tmp_path / "native")
    before = digests(tmp_path / "native")
    to_hf(tmp_path / "native", tmp_path / "back")
    assert digests(tmp_path / "native") == before


# What is lossy by request, and nothing else.


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint16)


def differing(left: Leaves, right: Leaves) -> set[str]:
    assert left.keys() == right.keys()
    return {name for name in left if not same_bits(left[name], right[name])}


@pytest.mark.share(4, 2)
@pytest.mark.parametrize(("family", "scanned"), [("e2b", False), ("26b-a4b", True)])
@pytest.mark.parametrize("head", [False, True])
def test_embedding_stored_in_bfloat16_alone_differs(copied, tmp_path, family, scanned, head):
    source = copied(family, scanned)
    if head:
        with_head(source)
    report = round_trip(source, tmp_path, scan_layers=scanned, scaled_dtype="bfloat16")
    before, after = read_safetensors(source), read_safetensors(tmp_path / "back")
    root = np.float32(math.sqrt(before[EMBEDDING].shape[1]))
    scaled = (before[EMBEDDING].astype(np.float32) * root).astype(ml_dtypes.bfloat16)
    expected = (scaled.astype(np.float32) / root).astype(ml_dtypes.bfloat16)
    assert same_bits(after[EMBEDDING], expected)
    lossy = {EMBEDDING, "lm_head.weight"} if head else {EMBEDDING}
    assert differing(before, after) == lossy == set(report.different)
    assert not report.bit_for_bit
    assert report.identical == len(before) - len(lossy)
    same = digests(source).items() & digests(tmp_path / "back").items()
    assert {name for name, _ in same} == digests(source).keys() - {SINGLE}
    (row,) = json.loads((tmp_path / "native" / OURS / "manifest.json").read_text())["lossy_rows"]
    assert row["values"] == np.count_nonzero(
        bfloat16_bits(expected) != bfloat16_bits(before[EMBEDDING])
    )


@pytest.mark.share(4, 1)
@pytest.mark.parametrize("stored", ["float32", "float16"])
@pytest.mark.parametrize(("family", "scanned"), [("e4b", False), ("26b-a4b", True)])
def test_weights_stored_in_bfloat16_differ_where_numpy_says(
    copied, tmp_path, family, scanned, stored
):
    source = copied(family, scanned, dtype=stored)
    header, data = split(source / SINGLE)
    data = bytearray(data)
    for name, entry in header.items():
        if ".layers.1." in name:  # values that bfloat16 holds
            begin, end = entry["data_offsets"]
            values = np.frombuffer(data[begin:end], stored)
            data[begin:end] = values.astype(ml_dtypes.bfloat16).astype(stored).tobytes()
    join(source / SINGLE, header, bytes(data))
    report = round_trip(source, tmp_path, scan_layers=scanned, dtype="bfloat16")
    before, after = read_safetensors(source), read_safetensors(tmp_path / "back")
    manifest = json.loads((tmp_path / "native" / OURS / "manifest.json").read_text())
    converted = {n for n, entry in manifest["tensors"].items() if entry["kept"] == "converted"}
    expected = dict(before)
    for name in converted - {EMBEDDING}:
        expected[name] = before[name].astype(ml_dtypes.bfloat16).astype(stored)
    assert not differing(expected, after)
    assert set(report.different) == differing(before, expected)
    assert any(".layers.0." in name for name in report.different)
    assert not any("language_model.layers.1." in name for name in report.different)
    assert report.identical == report.tensors - len(report.different)
    assert not report.bit_for_bit
    assert not report.rounded
    assert digests(source)["config.json"] == digests(tmp_path / "back")["config.json"]


def test_a_value_changed_on_the_native_side_is_reported(shallow, tmp_path):
    """Arrays without a compressor have no checksum of their own: the manifest's must say it."""
    to_native(shallow("31b"), tmp_path / "native", ocdbt=False)
    (chunk,) = (tmp_path / "native" / "0" / "items").glob("*layers_3.mlp.wo.kernel/0.0")
    data = bytearray(chunk.read_bytes())
    data[77] ^= 1
    chunk.write_bytes(data)
    report = to_hf(tmp_path / "native", tmp_path / "back")
    name = "model.language_model.layers.3.mlp.down_proj.weight"
    assert report.different == (name,)
    assert report.identical == report.tensors - 1
    assert not report.bit_for_bit
    back = read_safetensors(tmp_path / "back")
    assert differing(read_safetensors(shallow("31b")), back) == {name}


# Checkpoints that MaxText wrote.


@pytest.mark.share(2)
@pytest.mark.parametrize(
    "name",
    [
        "e2b_unscanned",
        "e4b_unscanned",
        "26b-a4b_unscanned",
        "26b-a4b_scanned",
        "26b-a4b_scanned_bfloat16",
        "31b_unscanned",
        "31b_scanned",
        "31b_scanned_training",
        "e2b_unscanned_training",
    ],
)
def test_what_maxtext_wrote_gives_back_the_original(oracle, tmp_path, name):
    original = oracle / "hf" / name.partition("_")[0]
    report = to_hf(oracle / "maxtext" / name, tmp_path / "back", like=original)
    assert digests(tmp_path / "back") == digests(original)
    assert not report.rounded
    assert report.scanned == ("_scanned" in name)


def test_logits_of_the_export_are_those_of_the_original(oracle, tmp_path):
    original = oracle / "hf" / "26b-a4b"
    to_hf(oracle / "maxtext" / "26b-a4b_scanned", tmp_path / "back", like=original)
    golden = oracle / "logits" / "transformers_26b-a4b.safetensors"
    from safetensors.numpy import load_file

    ids = load_file(golden)["input_ids"][:1, :24]
    assert np.array_equal(logits(tmp_path / "back", ids), logits(original, ids))


def logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """transformers' logits in float32, from a checkpoint that must load without a remark."""
    import torch

    model = loaded(folder).float().eval()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)).logits.numpy()


def loaded(folder: Path):
    """transformers' model of a checkpoint, with no key missing and none unexpected."""
    import transformers

    config = json.loads((folder / "config.json").read_text())
    (name,) = config["architectures"]
    model, info = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, dtype="auto"
    )
    assert not {key: found for key, found in info.items() if found}
    return model


# Trained checkpoints.


def trained_tensors(source: Path, seed: int = 3) -> dict[str, np.ndarray]:
    """Float32 values that no bfloat16 holds, for the text tensors; in Hugging Face's names."""
    random = np.random.default_rng(seed)
    return {
        name: (tensor.astype(np.float32) + random.normal(size=tensor.shape, scale=0.03)).astype(
            np.float32
        )
        for name, tensor in read_safetensors(source).items()
        if ".language_model." in name
    }


def nest(leaves: Leaves, *tail: str) -> dict:
    tree: dict = {}
    for path, leaf in leaves.items():
        *keys, last = [*path.split("/"), *tail]
        branch = tree
        for key in keys:
            branch = branch.setdefault(key, {})
        branch[last] = leaf
    return tree


def save_training(items: Path, leaves: Leaves, step: int, *, ocdbt: bool = True) -> None:
    """A training state as MaxText saves it: params, step, optimizer state as a list, nnx_aux.

    Of the moments, which are as many as the parameters, there are a few here.
    """
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    poison = {path: np.full_like(leaves[path], np.nan) for path in [*leaves][::20]}
    moments = {"mu": {"params": nest(poison)}, "nu": {"params": nest(poison)}}
    rngs = {"aqt": {"count": np.uint32(3), "key": np.arange(4, dtype=np.uint32)}}
    state = {
        "params": {"params": nest(leaves)},
        "step": np.int32(step),
        "opt_state": [{"count": np.int32(step), **moments}, None, {"count": np.int32(step)}],
        "nnx_aux": {"model": {"decoder": {"dropout": {"rngs": rngs}}}},
    }
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=ocdbt)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(items.absolute(), jax.tree.map(jnp.asarray, state))


@pytest.fixture
def trained(shallow, tmp_path) -> Callable[..., tuple[Path, Path, dict[str, np.ndarray]]]:
    """trained(family, scanned): (the original, a run folder, the trained Hugging Face tensors)."""

    def train(family: str, scanned: bool = False, *, older: bool = False):
        source, run = shallow(family, scanned), tmp_path / "run"
        values, architecture = trained_tensors(source), read_architecture(source)
        save_training(run / "12" / "items", maxtext_tree(values, architecture, scanned), 12)
        if older:
            twice = {name: value * np.float32(2) for name, value in values.items()}
            save_training(run / "3" / "items", maxtext_tree(twice, architecture, scanned), 3)
        for name in ("40.orbax-checkpoint-tmp-1", "final", *(() if older else ("3",))):
            (run / name / "items").mkdir(parents=True)
            shutil.copy(run / "12" / "items" / "_METADATA", run / name / "items")
        (run / "99").mkdir()
        return source, run, values

    return train


def exported(values: Leaves, source: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """By numpy: what an export of trained values holds, and name → values that are rounded."""
    expected, rounded, leftovers = read_safetensors(source), {}, leftover_names(source)
    for name, value in values.items():
        if name in leftovers:
            continue
        native, back = value, value
        root = np.float32(1)
        if name == EMBEDDING:
            root = np.float32(math.sqrt(value.shape[1]))
            native = value * root
            back = native / root
        expected[name] = back.astype(ml_dtypes.bfloat16)
        again = expected[name].astype(np.float32) * root
        if lost := np.count_nonzero(again != native):
            rounded[name] = int(lost)
    return expected, rounded


def leftover_names(source: Path) -> set[str]:
    """The keys and values of KV-shared layers, which nothing reads and no native tree holds."""
    return {
        f"model.language_model.layers.{layer.index}.self_attn.{word}.weight"
        for layer in read_architecture(source).text.layers
        if not layer.owns_kv
        for word in ("k_proj", "v_proj", "k_norm")
    }


@pytest.mark.share(6, 3)
@pytest.mark.parametrize(("family", "scanned"), [("e2b", False), ("26b-a4b", True), ("31b", False)])
@pytest.mark.parametrize("like", ["huggingface", "converted"])
def test_trained_values_are_rounded_as_numpy_rounds(trained, tmp_path, family, scanned, like):
    source, run, values = trained(family, scanned)
    model = source
    if like == "converted":
        model = tmp_path / "converted"
        to_native(source, model, text_only=True)
    report = to_hf(run, tmp_path / "back", like=model)
    expected, rounded = exported(values, source)
    assert not differing(expected, read_safetensors(tmp_path / "back"))
    assert report.rounded == rounded
    assert sum(rounded.values()) > 10_000
    assert not report.bit_for_bit
    assert report.scanned is scanned
    same = {name for name, _ in digests(source).items() & digests(tmp_path / "back").items()}
    assert same == digests(source).keys() - {SINGLE}
    if like == "converted":
        assert set(report.different) == differing(expected, read_safetensors(source))
        assert report.identical + len(report.different) == report.tensors
    else:
        assert report.unchecked == report.tensors


@pytest.mark.large
def test_the_run_the_step_and_the_items_folder_are_accepted(trained, tmp_path):
    source, run, values = trained("31b", older=True)
    expected, _ = exported(values, source)
    for number, path in enumerate([run, run / "12", run / "12" / "items"]):
        to_hf(path, tmp_path / f"back{number}", like=source)
        assert not differing(expected, read_safetensors(tmp_path / f"back{number}"))
    twice = {name: value * np.float32(2) for name, value in values.items()}
    to_hf(run / "3", tmp_path / "older", like=source)
    expected, _ = exported(twice, source)
    assert not differing(expected, read_safetensors(tmp_path / "older"))


@pytest.mark.large
def test_trained_values_in_float32_are_the_trained_values(trained, tmp_path):
    source, run, values = trained("e4b")
    report = to_hf(run, tmp_path / "back", like=source, dtype="float32")
    expected = {n: t.astype(np.float32) for n, t in read_safetensors(source).items()}
    expected |= {n: value for n, value in values.items() if n not in leftover_names(source)}
    root = np.float32(math.sqrt(values[EMBEDDING].shape[1]))
    native = values[EMBEDDING] * root
    expected[EMBEDDING] = native / root
    assert not differing(expected, read_safetensors(tmp_path / "back"))
    lost = np.count_nonzero(expected[EMBEDDING] * root != native)
    assert report.rounded == ({EMBEDDING: lost} if lost else {})


def test_a_training_run_knows_no_original(trained, tmp_path):
    _, run, _ = trained("31b")
    with pytest.raises(SourceError, match="has no sidecar"):
        to_hf(run, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("ocdbt", [True, False])
def test_optimizer_state_is_never_read(shallow, tmp_path, monkeypatch, ocdbt):
    source = shallow("31b", scanned=True)
    leaves = maxtext_tree(trained_tensors(source), read_architecture(source), scanned=True)
    save_training(tmp_path / "run" / "7" / "items", leaves, 7, ocdbt=ocdbt)
    if not ocdbt:
        for folder in tmp_path.glob("run/7/items/opt_state.*"):
            for chunk in folder.iterdir():
                if chunk.name[0] != ".":
                    chunk.unlink()
    opened, read = set(), set()
    open_array, read_array = orbax_reader.open_array, orbax_reader.OrbaxArray.read

    def spy_open(tree, name, *arguments):
        opened.add(name)
        return open_array(tree, name, *arguments)

    def spy_read(self, box, into=None):
        read.add(self.name)
        return read_array(self, box, into)

    monkeypatch.setattr("gemma_convert.checkpoint.orbax_layout.open_array", spy_open)
    monkeypatch.setattr(orbax_reader.OrbaxArray, "read", spy_read)
    to_hf(tmp_path / "run", tmp_path / "back", like=source)
    wanted = {f"params/params/{name}" for name in leaves}
    assert opened == read == wanted
    assert not any(np.isnan(t).any() for t in read_safetensors(tmp_path / "back").values())


def test_nnx_nesting_is_accepted(shallow, tmp_path):
    import orbax.checkpoint as ocp

    source = shallow("e2b")
    values = trained_tensors(source)
    leaves = maxtext_tree(values, read_architecture(source), scanned=False)
    state = nest(leaves, "value") | {"step": {"value": np.int32(4)}, "opt_state": {"value": 1}}
    ocp.PyTreeCheckpointer().save(tmp_path / "run" / "4" / "items", state)
    to_hf(tmp_path / "run", tmp_path / "back", like=source)
    expected, _ = exported(values, source)
    assert not differing(expected, read_safetensors(tmp_path / "back"))


def test_originals_in_the_sidecar_do_not_cover_trained_values(copied, tmp_path):
    """Where training changed a value, what the sidecar keeps of the old one must not come back."""
    source = copied("31b")
    patch(source / SINGLE, EMBEDDING, ODD_BITS)
    to_native(source, tmp_path / "converted", text_only=True)
    original = read_safetensors(source)
    tree = restore(tmp_path / "converted" / "0" / "items")
    leaves = {name: leaf.astype(np.float32) for name, leaf in tree.items()}
    flat = leaves["token_embedder/embedding"].reshape(-1)
    flat[5], flat[701] = 0.375, -3.25  # 700 and 702 are untouched
    save_training(tmp_path / "run" / "1" / "items", leaves, 1)
    to_hf(tmp_path / "run", tmp_path / "back", like=tmp_path / "converted")
    root = np.float32(math.sqrt(original[EMBEDDING].shape[1]))
    expected = original[EMBEDDING].copy()
    for place in (5, 701):
        expected.reshape(-1)[place] = flat[place] / root
    back = read_safetensors(tmp_path / "back")
    assert same_bits(back[EMBEDDING], expected)
    assert differing(original, back) == {EMBEDDING}


@pytest.mark.parametrize("like", ["huggingface", "converted"])
def test_originals_that_were_carried_whole_do_not_cover_trained_values(shallow, tmp_path, like):
    source = shallow("31b", dtype="float32")
    to_native(source, tmp_path / "converted", text_only=True)
    original = read_safetensors(source)
    leaves = restore(tmp_path / "converted" / "0" / "items")
    table = leaves["token_embedder/embedding"] = leaves["token_embedder/embedding"].copy()
    table[10:20] *= np.float32(1.25)
    save_training(tmp_path / "run" / "1" / "items", leaves, 1)
    model = source if like == "huggingface" else tmp_path / "converted"
    to_hf(tmp_path / "run", tmp_path / "back", like=model)
    root = np.float32(math.sqrt(table.shape[1]))
    expected = original[EMBEDDING].copy()
    expected[10:20] = table[10:20] / root
    back = read_safetensors(tmp_path / "back")
    assert same_bits(back[EMBEDDING], expected)
    assert differing(original, back) == {EMBEDDING}


def test_a_trained_tree_without_towers_takes_them_from_the_original(trained, tmp_path):
    """A sidecar holds the towers only where the conversion had no place for them."""
    source, run, _ = trained("26b-a4b", scanned=True)
    to_native(source, tmp_path / "converted")
    with pytest.raises(SourceError, match="neither in the native checkpoint nor in the sidecar"):
        to_hf(run, tmp_path / "back", like=tmp_path / "converted")
    assert not (tmp_path / "back").exists()
    report = to_hf(run, tmp_path / "back", like=tmp_path / "converted", text_only=True)
    assert all(name.startswith("model.") for name in read_safetensors(tmp_path / "back"))
    assert report.tensors == len(read_safetensors(tmp_path / "back"))


SHARDED_SAVE = """
import sys
from pathlib import Path
import jax, numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

assert jax.device_count() == 16
axes = ("a", "b", "c", "d")
mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2, 2), axes)

def shard(leaf):
    for dim, size in enumerate(leaf.shape[:2] if leaf.size > 20000 else ()):
        count = next(n for n in (4, 3, 2, 1, 0) if size % 2**n == 0)
        if count:
            spec = PartitionSpec(*[None] * dim, axes[:count])
            return jax.device_put(leaf, NamedSharding(mesh, spec))
    return leaf

source, target = map(Path, sys.argv[1:])
tree = ocp.PyTreeCheckpointer().restore(source)["params"]
ocp.PyTreeCheckpointer().save(target, {"params": jax.tree.map(shard, tree)})
"""


@pytest.mark.large
def test_arrays_sharded_over_devices_come_back(shallow, tmp_path, monkeypatch):
    """Chunks as sixteen devices write them: along the first axis, or along the second."""
    source = shallow("31b", scanned=True)
    to_native(source, tmp_path / "native", scan_layers=True, text_only=True)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=16", "JAX_PLATFORMS": "cpu"}
    folders = tmp_path / "native" / "0" / "items", tmp_path / "run" / "5" / "items"
    command = [sys.executable, "-c", SHARDED_SAVE, *folders]
    subprocess.run(command, check=True, env=os.environ | flags)
    chunks = orbax_reader.read_orbax_tree(folders[1]).chunks
    kernel = "params/params/decoder/scanned_blocks/local_layers/self_attention/query/kernel"
    assert chunks[kernel][0] * 4 == 68
    assert chunks["params/params/token_embedder/embedding"] == (317, 17)
    for block in (None, 500):
        if block is not None:
            monkeypatch.setattr(planning, "BLOCK_BYTES", block)
        report = to_hf(tmp_path / "run", tmp_path / f"back{block}", like=source)
        assert digests(tmp_path / f"back{block}") == digests(source)
        assert not report.rounded
        again = tmp_path / f"again{block}"
        assert to_hf(tmp_path / "run", again, like=tmp_path / "native").bit_for_bit
        assert digests(again) == digests(source)


# Options.


@pytest.mark.share(3, 1)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", PLE_FAMILIES)
def test_omitting_leftovers_drops_exactly_them(copied, shallow, tmp_path, family, shards):
    source = copied(family, shards=shards)
    if shards > 1:
        index = json.loads((source / INDEX).read_text())
        index["metadata"] |= {"note": "mine", "total_parameters": 1}
        (source / INDEX).write_text(json.dumps(index))
    to_native(source, tmp_path / "native")
    report = to_hf(tmp_path / "native", tmp_path / "back", kv_shared="omit")
    before, after = read_safetensors(source), read_safetensors(tmp_path / "back")
    without = read_safetensors(shallow(family, kv_shared="omit")).keys()
    assert len(before) > len(without)
    assert not differing({name: before[name] for name in without}, after)
    assert len(report.shards) == shards
    assert report.identical == report.tensors == len(without)
    loaded(tmp_path / "back")
    if shards > 1:
        index = json.loads((tmp_path / "back" / INDEX).read_text())
        assert index["metadata"]["note"] == "mine"
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
        assert index["metadata"]["total_parameters"] == sum(t.size for t in after.values())
        check_weight_map(tmp_path / "back")
    else:
        same = digests(shallow(family, kv_shared="omit"))
        assert digests(tmp_path / "back") == same


def check_weight_map(folder: Path) -> None:
    """Asserts that an index places every tensor where it is."""
    placed = {
        name: file.name
        for file in folder.glob("*.safetensors")
        for name in split(file)[0]
        if name != "__metadata__"
    }
    assert json.loads((folder / INDEX).read_text())["weight_map"] == placed


@pytest.mark.share(4, 3)
@pytest.mark.parametrize(("family", "shards"), [("e2b", 1), ("31b", 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_edits_the_words_of_the_config_and_casts(shallow, tmp_path, family, shards, dtype):
    stored = "bfloat16" if dtype == "float32" else "float32"
    source = shallow(family, shards=shards, dtype=stored)
    to_native(source, tmp_path / "native")
    report = to_hf(tmp_path / "native", tmp_path / "back", dtype=dtype)
    config = (source / "config.json").read_bytes()
    old, new = f'"dtype": "{stored}"'.encode(), f'"dtype": "{dtype}"'.encode()
    assert config.count(old) >= 1
    assert (tmp_path / "back" / "config.json").read_bytes() == config.replace(old, new)
    before, after = read_safetensors(source), read_safetensors(tmp_path / "back")
    kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    expected = {name: tensor.astype(kind) for name, tensor in before.items()}
    if dtype == "bfloat16":
        root = np.float32(math.sqrt(before[EMBEDDING].shape[1]))
        expected[EMBEDDING] = (before[EMBEDDING] * root / root).astype(kind)
    assert not differing(expected, after)
    assert not report.bit_for_bit
    assert bool(report.rounded) == (dtype == "bfloat16" or EMBEDDING in report.rounded)
    if dtype == "bfloat16":
        name = "model.language_model.layers.0.self_attn.o_proj.weight"
        lost = np.count_nonzero(expected[name].astype(np.float32) != before[name])
        assert report.rounded[name] == lost > 0
    others = digests(source).keys() - {"config.json", INDEX}
    others = {name for name in others if not name.endswith(".safetensors")}
    assert all(digests(source)[n] == digests(tmp_path / "back")[n] for n in others)
    assert len(report.shards) == shards
    if shards > 1:
        check_weight_map(tmp_path / "back")
    assert str(loaded(tmp_path / "back").dtype) == f"torch.{dtype}"


def test_the_dtype_that_it_has_changes_nothing(shallow, tmp_path):
    source = shallow("31b", shards=3)
    to_native(source, tmp_path / "native")
    assert to_hf(tmp_path / "native", tmp_path / "back", dtype="bfloat16").bit_for_bit
    assert digests(tmp_path / "back") == digests(source)


def test_config_with_other_line_ends_keeps_them(copied, tmp_path):
    source = copied("31b")
    text = (source / "config.json").read_bytes().replace(b"\n", b"\r\n")
    (source / "config.json").write_bytes(text)
    to_native(source, tmp_path / "native")
    to_hf(tmp_path / "native", tmp_path / "back", dtype="float32")
    edited = (tmp_path / "back" / "config.json").read_bytes()
    assert edited == text.replace(b'"dtype": "bfloat16"', b'"dtype": "float32"')


@pytest.mark.share(4, 2)
@pytest.mark.parametrize("family", FAMILIES)
def test_new_shards_are_right_and_transformers_loads_them(shallow, tmp_path, family):
    source, limit = shallow(family), 150_000
    to_native(source, tmp_path / "native")
    report = to_hf(tmp_path / "native", tmp_path / "back", max_shard_size=limit)
    before, after = read_safetensors(source), read_safetensors(tmp_path / "back")
    assert not differing(before, after)
    count = len(report.shards)
    assert count > 3
    names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    assert sorted(p.name for p in (tmp_path / "back").glob("*.safetensors")) == names
    for name in names:
        header, data = split(tmp_path / "back" / name)
        assert len(data) <= limit or len(header) == 2
        assert header["__metadata__"] == {"format": "pt"}
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in before.values())
    check_weight_map(tmp_path / "back")
    assert report.bit_for_bit
    loaded(tmp_path / "back")


def test_one_large_shard_needs_no_index(shallow, tmp_path):
    source = shallow("31b", shards=3)
    to_native(source, tmp_path / "native")
    report = to_hf(tmp_path / "native", tmp_path / "back", max_shard_size=10**9)
    assert report.shards == (SINGLE,)
    assert digests(tmp_path / "back") == digests(shallow("31b"))
    with pytest.raises(UsageError, match="`max_shard_size` is a size"):
        to_hf(tmp_path / "native", tmp_path / "none", max_shard_size=0)


TEXT_ONLY = [
    ("e2b", False, True),
    ("e4b", False, True),
    ("26b-a4b", True, True),
    ("31b", False, True),
    ("26b-a4b", False, False),
    ("31b", True, False),
]
"""(family, scanned, whether the native tree has the text model alone)."""


@pytest.mark.share(6, 1)
@pytest.mark.parametrize(("family", "scanned", "text_tree"), TEXT_ONLY)
def test_text_model_alone(shallow, tmp_path, family, scanned, text_tree):
    source = shallow(family, scanned, shards=3)
    to_native(source, tmp_path / "native", scan_layers=scanned, text_only=text_tree)
    report = to_hf(tmp_path / "native", tmp_path / "back", text_only=True)
    before, after = read_safetensors(source), read_safetensors(tmp_path / "back")
    text = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in before.items()
        if ".language_model." in name
    }
    assert not differing(text, after)
    assert report.identical == report.tensors == len(text)
    if len(report.shards) > 1:
        check_weight_map(tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == ["Gemma4ForCausalLM"]
    assert config["model_type"] == "gemma4_text"
    text_config = json.loads((source / "config.json").read_text())["text_config"]
    assert {key: config[key] for key in text_config} == text_config
    ids = np.random.default_rng(0).integers(8, 200, (1, 30))
    assert np.array_equal(logits(tmp_path / "back", ids), logits(source, ids))


def test_text_model_comes_back_as_itself(shallow, tmp_path):
    """A text-only export is a source in its own right."""
    to_native(shallow("e2b"), tmp_path / "first")
    to_hf(tmp_path / "first", tmp_path / "text", text_only=True)
    comes_back(tmp_path / "text", tmp_path)


# Sources and targets that will not do.


def refused(work: Path, error: type[Exception], match: str, *arguments, **options) -> None:
    """Asserts that an export ends in one error and leaves nothing behind in `work`."""
    before = sorted(work.iterdir())
    with pytest.raises(error, match=match):
        to_hf(*arguments, **options)
    assert sorted(work.iterdir()) == before


@pytest.fixture
def native(shallow, converted, tmp_path) -> Path:
    """A converted 31b that a test may damage."""
    shutil.copytree(converted(shallow("31b"), "maxtext"), tmp_path / "native")
    return tmp_path / "native"


@pytest.fixture
def unpacked(shallow, converted, tmp_path) -> Path:
    """The same, zarr without OCDBT: one folder an array."""
    options = {"ocdbt": False, "compression": "zstd"}
    shutil.copytree(converted(shallow("31b"), "maxtext", **options), tmp_path / "native")
    return tmp_path / "native"


@pytest.mark.parametrize(
    ("family", "options"),
    [("26b-a4b", {}), ("31b", {"scanned": True}), ("e2b", {}), ("31b", {"text_only": True})],
)
def test_like_of_another_model(shallow, native, tmp_path, family, options):
    other = shallow(family, **options)
    refused(tmp_path, SourceError, "do not match the original", native, tmp_path / "b", like=other)


def test_like_of_another_width(copied, native, tmp_path):
    """Every name is the same, and one length differs."""
    source = copied("31b")
    text = (source / "config.json").read_text()
    assert text.count('"intermediate_size": 116') == 1
    narrow = text.replace('"intermediate_size": 116', '"intermediate_size": 115')
    (source / "config.json").write_text(narrow)
    header, _ = split(source / SINGLE)
    place = 0
    for name, entry in header.items():
        if name != "__metadata__":
            mlp = "language_model" in name and ".mlp." in name
            entry["shape"] = [size - (mlp and size == 116) for size in entry["shape"]]
            entry["data_offsets"] = [place, place + 2 * math.prod(entry["shape"])]
            place = entry["data_offsets"][1]
    join(source / SINGLE, header, bytes(place))
    match = "does not have the shape"
    refused(tmp_path, SourceError, match, native, tmp_path / "back", like=source)


def test_like_that_is_no_checkpoint(native, tmp_path):
    (tmp_path / "empty").mkdir()
    for like in (tmp_path / "empty", tmp_path / "absent", native / "hf" / "config.json"):
        refused(tmp_path, SourceError, "checkpoint", native, tmp_path / "back", like=like)


def test_source_that_is_no_checkpoint(shallow, tmp_path):
    for source in (shallow("31b"), tmp_path / "absent", tmp_path):
        made = source == shallow("31b")
        match = "a Hugging Face checkpoint already" if made else "no Orbax checkpoint"
        refused(tmp_path, SourceError, match, source, tmp_path / "back", like=shallow("31b"))


def test_array_that_is_missing_or_unknown(shallow, tmp_path):
    source = shallow("31b")
    leaves = maxtext_tree(trained_tensors(source), read_architecture(source), scanned=False)
    gone = "decoder/layers_4/mlp/wi_1/kernel"
    less = {name: leaf for name, leaf in leaves.items() if name != gone}
    save_training(tmp_path / "less" / "items", less, 1)
    save_training(tmp_path / "more" / "items", leaves | {"decoder/extra": np.ones(3)}, 1)
    back = tmp_path / "back"
    refused(tmp_path, SourceError, gone, tmp_path / "less", back, like=source)
    refused(tmp_path, SourceError, "decoder/extra", tmp_path / "more", back, like=source)


def test_checkpoint_without_parameters(shallow, tmp_path):
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save(tmp_path / "run" / "0" / "items", {"weights": np.ones(3)})
    match = "no parameters in a supported layout"
    refused(tmp_path, SourceError, match, tmp_path / "run", tmp_path / "b", like=shallow("31b"))


def kernel_folder(native: Path) -> Path:
    (folder,) = (native / "0" / "items").glob("*layers_3.mlp.wo.kernel")
    return folder


def test_chunk_that_is_broken(unpacked, tmp_path):
    (chunk,) = (path for path in kernel_folder(unpacked).iterdir() if path.name[0] != ".")
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    chunk.write_bytes(data)
    refused(tmp_path, SourceError, "layers_3/mlp/wo/kernel", unpacked, tmp_path / "back")
    chunk.write_bytes(data[:20])
    refused(tmp_path, SourceError, "layers_3/mlp/wo/kernel", unpacked, tmp_path / "back")


def test_array_whose_data_is_gone(unpacked, tmp_path):
    shutil.rmtree(kernel_folder(unpacked))
    refused(
        tmp_path,
        SourceError,
        r"layers_3\.mlp\.wo\.kernel/\S* is missing",
        unpacked,
        tmp_path / "back",
    )


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/tmp/model.safetensors",
        "deep/model.safetensors",
        "..",
        "",
        "model.bin",
        None,
        3,
        "model.safe\0.safetensors",
    ],
)
def test_manifest_that_names_a_file_elsewhere(native, tmp_path, file):
    (shard,) = json.loads((native / OURS / "manifest.json").read_text())["shards"]
    edit_manifest(native, shards=[shard | {"file": file}])
    refused(
        tmp_path,
        SourceError,
        "manifest is malformed",
        native,
        tmp_path / "back",
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "manifest is not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"schema": "gemma-convert/manifest/9"}', "version that this release"),
        ('{"schema": "gemma-convert/manifest/1"}', "manifest is malformed"),
        ('{"schema": "gemma-convert/manifest/1", "shards": {}}', "manifest is malformed"),
        ('{"schema": "gemma-convert/manifest/1", "shards": [3]}', "manifest is malformed"),
        ('{"schema": "gemma-convert/manifest/1", "adapter": {"rank": 3}}', "key adapter"),
        ('{"schema": "gemma-convert/manifest/1", "shards": []}', "lacks"),
        ("[" * 100_000, "manifest is not valid JSON"),
        ("\xff", "manifest is not valid JSON"),
    ],
)
def test_manifest_that_is_none(native, tmp_path, text, match):
    (native / OURS / "manifest.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, SourceError, match, native, tmp_path / "back")


def test_sidecar_with_parts_missing(native, tmp_path):
    header = native / OURS / "headers" / f"{SINGLE}.header"
    kept = header.read_bytes()
    header.write_bytes(kept[:-50])
    refused(tmp_path, SourceError, "header", native, tmp_path / "back")
    header.unlink()
    refused(tmp_path, SourceError, "header is missing", native, tmp_path / "back")
    (native / OURS / "manifest.json").unlink()
    refused(tmp_path, SourceError, "no manifest", native, tmp_path / "back")


def test_exceptions_that_are_broken(copied, tmp_path):
    from safetensors.numpy import load_file, save_file

    source = copied("31b")
    patch(source / SINGLE, EMBEDDING, ODD_BITS)
    to_native(source, tmp_path / "native")
    file = tmp_path / "native" / OURS / "exceptions.safetensors"
    kept = load_file(file)
    index, bits = f"{EMBEDDING}/index", f"{EMBEDDING}/bits"
    broken = [
        {index: kept[index]},
        {index: kept[index] + 10**9, bits: kept[bits]},
        {index: kept[index][:-1], bits: kept[bits]},
        {index: kept[index].astype(np.float32), bits: kept[bits]},
    ]
    for tensors in broken:
        save_file(tensors, file)
        refused(tmp_path, SourceError, "exceptions", tmp_path / "native", tmp_path / "back")


def test_target_that_exists_is_replaced_on_request_alone(shallow, native, tmp_path):
    back = tmp_path / "back"
    to_hf(native, back)
    kept = digests(back)
    refused(tmp_path, TargetError, "The target exists", native, back, kv_shared="omit")
    assert digests(back) == kept
    to_hf(native, back, overwrite=True, dtype="float32")
    assert digests(back) != kept
    to_hf(native, back, overwrite=True)
    assert digests(back) == kept == digests(shallow("31b"))
    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / "thesis.txt").write_text("years of work")
    refused(tmp_path, TargetError, "not a Hugging Face checkpoint", native, papers, overwrite=True)
    assert (papers / "thesis.txt").exists()


def test_source_and_target_must_lie_apart(native):
    before = digests(native)
    for target in (native, native / "0", native / "back", native.parent):
        with pytest.raises(TargetError):
            to_hf(native, target, overwrite=True)
    assert digests(native) == before


def test_the_original_is_not_replaced_by_its_export(copied, tmp_path):
    """--like names the original; writing over it would destroy what is being read."""
    source = copied("31b")
    to_native(source, tmp_path / "native")
    before = digests(source)
    for target in (source, source / "back"):
        with pytest.raises(TargetError):
            to_hf(tmp_path / "native", target, like=source, overwrite=True)
    assert digests(source) == before


def test_full_disk_is_noticed_beforehand(native, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 5))
    refused(tmp_path, TargetError, "not enough space", native, tmp_path / "back")


@pytest.mark.parametrize("limit", [100, 3_000, 300_000])
def test_write_that_fails_leaves_nothing(native, tmp_path, limit):
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        refused(tmp_path, TargetError, "cannot be written", native, tmp_path / "back")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# Without writing.


@pytest.mark.share(3, 1)
@pytest.mark.parametrize("options", [{}, {"text_only": True}, {"dtype": "float32"}])
def test_dry_run_reads_no_values_and_writes_nothing(shallow, tmp_path, monkeypatch, options):
    to_native(shallow("e2b"), tmp_path / "native")

    def refuse(*_):
        raise AssertionError("a value was read")

    monkeypatch.setattr(orbax_reader.OrbaxArray, "read", refuse)
    monkeypatch.setattr("gemma_convert.checkpoint.original.Original.read_bytes", refuse)
    report = to_hf(tmp_path / "native", tmp_path / "back", dry_run=True, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]
    monkeypatch.undo()
    real = to_hf(tmp_path / "native", tmp_path / "back", **options)
    assert report.dry_run
    assert not report.bit_for_bit
    for field in ("tensors", "bytes_written", "shards", "files", "largest_decode_bytes", "family"):
        assert getattr(report, field) == getattr(real, field)
    written = sum(file.stat().st_size for file in (tmp_path / "back").glob("*.safetensors"))
    assert real.bytes_written == written


def test_the_largest_chunk_is_told_beforehand(shallow, tmp_path):
    source = shallow("31b", scanned=True)
    leaves = maxtext_tree(trained_tensors(source), read_architecture(source), scanned=True)
    save_training(tmp_path / "run" / "1" / "items", leaves, 1)
    report = to_hf(tmp_path / "run", tmp_path / "back", like=source, dry_run=True)
    assert report.largest_decode_bytes == max(leaf.nbytes for leaf in leaves.values())


def test_exceptions_come_back_in_another_dtype_too(copied, tmp_path):
    """A huge bfloat16 overflows when it is scaled; as float32 it comes back all the same."""
    source = copied("31b")
    patch(source / SINGLE, EMBEDDING, {5: 0x7F7F})
    to_native(source, tmp_path / "native")
    report = to_hf(tmp_path / "native", tmp_path / "back", dtype="float32")
    value = read_safetensors(tmp_path / "back")[EMBEDDING].reshape(-1)[5]
    assert value == read_safetensors(source)[EMBEDDING].reshape(-1)[5].astype(np.float32)
    assert np.isfinite(value)
    assert EMBEDDING not in report.rounded
