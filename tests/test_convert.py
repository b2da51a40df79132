"""to_native end to end: trees and values by Orbax, against hand-written numpy and the oracle."""

from __future__ import annotations

import json
import math
import resource
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xxhash
from cases import CASES, FAMILIES
from maxtext_by_hand import maxtext_tree
from trees import read_safetensors, restore, same_bits

from gemma_convert import SourceError, TargetError, UsageError, to_native
from gemma_convert.mapping import plan as planning
from gemma_convert.model.config import read_architecture
from gemma_convert.version import __version__

OURS = Path("hf", "gemma-convert")


@pytest.mark.parametrize(("family", "scanned"), CASES)
def test_every_text_array_equals_numpy_written_by_hand(tiny, tmp_path, family, scanned):
    source = tiny(family)
    to_native(source, tmp_path / "out", scan_layers=scanned, text_only=True)
    found = restore(tmp_path / "out" / "0" / "items")
    expected = maxtext_tree(read_safetensors(source), read_architecture(source), scanned)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not same_bits(found[name], expected[name])]


@pytest.mark.parametrize(("family", "scanned"), CASES)
def test_tree_and_bits_equal_what_maxtext_itself_writes(oracle, tmp_path, family, scanned):
    form = "scanned" if scanned else "unscanned"
    report = to_native(
        oracle / "hf" / family, tmp_path / "out", scan_layers=scanned, dtype="float32"
    )
    found = restore(tmp_path / "out" / "0" / "items")
    expected = restore(oracle / "maxtext" / f"{family}_{form}" / "0" / "items")
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not same_bits(found[name], expected[name])]
    assert not report.lossy_rows
    assert not report.exceptions


def test_bfloat16_equals_what_maxtext_writes_by_default(oracle, tmp_path):
    report = to_native(
        oracle / "hf" / "26b-a4b",
        tmp_path / "out",
        scan_layers=True,
        dtype="bfloat16",
        scaled_dtype="bfloat16",
        text_only=True,
    )
    found = restore(tmp_path / "out" / "0" / "items")
    expected = restore(oracle / "maxtext" / "26b-a4b_scanned_bfloat16" / "0" / "items")
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not same_bits(found[name], expected[name])]
    (row,) = report.lossy_rows
    assert row.tensor == "model.language_model.embed_tokens.weight"
    assert row.values > 0


@pytest.mark.parametrize("family", ["26b-a4b", "31b"])
def test_vision_tower_is_converted(shallow, tmp_path, family):
    source = shallow(family)
    to_native(source, tmp_path / "out")
    hf, found = read_safetensors(source), restore(tmp_path / "out" / "0" / "items")
    vision = read_architecture(source).vision
    encoder = "vision_encoder/Gemma4VisionEncoderLayer_0/"
    at = "model.vision_tower."
    expected = {
        "vision_encoder/Gemma4VisionProjector_0/projection/kernel": hf[
            "model.embed_vision.embedding_projection.weight"
        ].T,
        encoder + "vision_entry/input_projection/kernel": hf[
            at + "patch_embedder.input_proj.weight"
        ].T,
        encoder + "vision_entry/pos_emb_param": hf[
            at + "patch_embedder.position_embedding_table"
        ].transpose(1, 0, 2),
        encoder + "std_scale": hf[at + "std_scale"],
        encoder + "std_bias": hf[at + "std_bias"],
    }
    for layer in range(vision.layers):
        theirs, ours = f"{at}encoder.layers.{layer}.", f"{encoder}layer_{layer}/"
        for word, name in (("q", "query"), ("k", "key"), ("v", "value")):
            weight = hf[f"{theirs}self_attn.{word}_proj.linear.weight"]
            expected[f"{ours}attention/{name}/kernel"] = weight.T.reshape(
                vision.embed, vision.heads, vision.head_dim
            )
        out = hf[theirs + "self_attn.o_proj.linear.weight"]
        expected[ours + "attention/out/kernel"] = out.T.reshape(
            vision.heads, vision.head_dim, vision.embed
        )
        for word, name in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
            expected[f"{ours}mlp/{name}/kernel"] = hf[f"{theirs}mlp.{word}_proj.linear.weight"].T
        for word, name in (("q", "query"), ("k", "key")):
            expected[f"{ours}attention/{name}_norm/scale"] = hf[
                f"{theirs}self_attn.{word}_norm.weight"
            ]
        for theirs_name, ours_name in (
            ("input", "pre_attention"),
            ("post_attention", "post_attention"),
            ("pre_feedforward", "pre_ffw"),
            ("post_feedforward", "post_ffw"),
        ):
            expected[f"{ours}{ours_name}_norm/scale"] = hf[
                f"{theirs}{theirs_name}_layernorm.weight"
            ]
    assert {name for name in found if name.startswith("vision_encoder/")} == expected.keys()
    assert not [name for name in expected if not same_bits(found[name], expected[name])]


@pytest.mark.each(1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text_only", [False, True])
def test_what_is_not_converted_is_carried_bit_for_bit(shallow, tmp_path, family, text_only):
    source = shallow(family)
    report = to_native(source, tmp_path / "out", text_only=text_only)
    hf = read_safetensors(source)
    tree = restore(tmp_path / "out" / "0" / "items")
    manifest = json.loads((tmp_path / "out" / OURS / "manifest.json").read_text())
    kept = {name: entry["kept"] for name, entry in manifest["tensors"].items()}
    assert kept.keys() == hf.keys()
    carried = {name for name, how in kept.items() if how == "carried"}
    stored = read_safetensors(tmp_path / "out" / OURS) if carried else {}
    assert stored.keys() == carried
    assert all(same_bits(stored[name], hf[name]) for name in carried)
    assert report.tensors_carried == len(carried)
    assert report.tensors_converted == len(hf) - len(carried)
    towers = {n for n in hf if ".language_model." not in n}
    assert bool(towers & carried) == (text_only or family in {"e2b", "e4b"})
    assert any(name.startswith("vision_encoder/") for name in tree) == (
        not text_only and family in {"26b-a4b", "31b"}
    )
    for name, tensor in hf.items():
        digest = xxhash.xxh3_128(np.ascontiguousarray(tensor).tobytes()).hexdigest()
        assert manifest["tensors"][name]["xxh3_128"] == digest


def test_other_files_and_headers_are_kept_byte_for_byte(shallow, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(shallow("31b", shards=3), source)
    (source / "extra").mkdir()
    (source / "extra" / "notes.txt").write_bytes(b"\x00\xffnotes")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("ref")
    (source / "old.bin").write_bytes(b"pickle")
    report = to_native(source, tmp_path / "out")
    for file in report.files_carried:
        assert (tmp_path / "out" / "hf" / file).read_bytes() == (source / file).read_bytes()
    assert "extra/notes.txt" in report.files_carried
    assert "model.safetensors.index.json" in report.files_carried
    assert sorted(report.not_carried) == [".git/", "old.bin"]
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) == 3
    for shard in shards:
        header = (tmp_path / "out" / OURS / "headers" / f"{shard.name}.header").read_bytes()
        assert shard.read_bytes().startswith(header)
        assert len(header) == 8 + int.from_bytes(header[:8], "little")


def test_sharded_source_gives_the_same_tree(shallow, tmp_path):
    to_native(shallow("e4b"), tmp_path / "one")
    to_native(shallow("e4b", shards=3), tmp_path / "three")
    one, three = (restore(tmp_path / name / "0" / "items") for name in ("one", "three"))
    assert one.keys() == three.keys()
    assert all(same_bits(one[name], three[name]) for name in one)


def test_source_of_symbolic_links_like_the_hub_cache(shallow, tmp_path):
    real, snapshot = shallow("e2b"), tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(real.iterdir()):
        (tmp_path / "blobs" / str(number)).hardlink_to(file)
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    report = to_native(snapshot, tmp_path / "out")
    assert "config.json" in report.files_carried
    assert not (tmp_path / "out" / "hf" / "config.json").is_symlink()


def test_text_only_source_gives_the_same_text_tree(shallow, tmp_path):
    source = shallow("26b-a4b", scanned=True, text_only=True)
    to_native(source, tmp_path / "out", scan_layers=True)
    found = restore(tmp_path / "out" / "0" / "items")
    expected = maxtext_tree(read_safetensors(source), read_architecture(source), scanned=True)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not same_bits(found[name], expected[name])]


@pytest.mark.parametrize("kv_shared", ["keep", "omit"])
def test_leftovers_of_kv_shared_layers_do_not_matter(shallow, tmp_path, kv_shared):
    report = to_native(shallow("e2b", kv_shared=kv_shared), tmp_path / "out")
    leftovers = report.carried_why.get("nothing reads the keys and values of KV-shared layers", 0)
    assert (leftovers > 0) == (kv_shared == "keep")
    assert report.arrays_written == len(restore(tmp_path / "out" / "0" / "items"))


@pytest.mark.each(1)
@pytest.mark.parametrize("dtype", ["keep", "float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_dtype_policy(shallow, tmp_path, stored, dtype):
    source = shallow("31b", dtype=stored)
    report = to_native(source, tmp_path / "out", dtype=dtype)
    tree = restore(tmp_path / "out" / "0" / "items")
    wanted = stored if dtype == "keep" else dtype
    kernel, embedding = tree["decoder/layers_0/mlp/wi_0/kernel"], tree["token_embedder/embedding"]
    assert kernel.dtype.name == wanted
    assert embedding.dtype.name == "float32"
    original = read_safetensors(source)["model.language_model.layers.0.mlp.gate_proj.weight"]
    rounded = original.astype(np.float32).astype(kernel.dtype)
    assert same_bits(kernel, np.ascontiguousarray(rounded.T))
    assert bool(report.lossy_rows) == (dtype == "bfloat16" and stored != "bfloat16")
    if report.lossy_rows:
        row = next(
            row for row in report.lossy_rows if row.tensor.endswith("0.mlp.gate_proj.weight")
        )
        back = rounded.astype(original.dtype)
        assert row.values == np.count_nonzero(back != original)


def test_values_that_scaling_loses_are_carried_whole(shallow, tmp_path):
    """A float32 embedding times a root is rounded in many places: its original travels along."""
    report = to_native(shallow("31b", dtype="float32"), tmp_path / "out")
    (name,) = read_safetensors(tmp_path / "out" / OURS)
    assert name == "model.language_model.embed_tokens.weight"
    assert report.carried_why == {"its values do not come back from the stored dtype": 1}


def test_few_values_that_scaling_loses_are_kept_one_by_one(shallow, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(shallow("31b"), source)
    name = "model.language_model.embed_tokens.weight"
    original = read_safetensors(source)[name]
    bits = {5: 0x7F7F, 700: 0x7FC1, 701: 0x7F80, 702: 0x0001}  # huge, NaN payload, inf, denormal
    _patch(source / "model.safetensors", name, bits)
    report = to_native(source, tmp_path / "out")
    stored = read_safetensors(tmp_path / "out" / OURS)
    places, values = stored[f"{name}/index"], stored[f"{name}/bits"]
    scaled = restore(tmp_path / "out" / "0" / "items")["token_embedder/embedding"]
    divided = (scaled / np.float32(math.sqrt(original.shape[1]))).ravel()
    flat = divided.astype(ml_dtypes.bfloat16).view(np.uint16)
    payload = np.isnan(divided)
    flat[payload] = divided[payload].view(np.uint32) >> 16
    assert report.exceptions == len(places) == len(values) > 0
    flat[places] = values
    assert np.array_equal(flat, read_safetensors(source)[name].view(np.uint16).ravel())


def _patch(file: Path, tensor: str, bits: dict[int, int]) -> None:
    """Overwrites 16-bit elements of one tensor in a safetensors file."""
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start = 8 + length + json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0]
    for place, value in bits.items():
        data[start + 2 * place : start + 2 * place + 2] = value.to_bytes(2, "little")
    file.write_bytes(data)


@pytest.mark.each(1)
@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("ocdbt", [True, False])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_forms_of_the_store_hold_the_same_values(shallow, tmp_path, scanned, ocdbt, compression):
    options = {"scan_layers": scanned, "ocdbt": ocdbt, "compression": compression}
    source = shallow("26b-a4b", scanned)
    to_native(source, tmp_path / "out", text_only=True, **options)
    found = restore(tmp_path / "out" / "0" / "items")
    expected = maxtext_tree(read_safetensors(source), read_architecture(source), scanned)
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert (tmp_path / "out" / "0" / "items" / "manifest.ocdbt").exists() == ocdbt


@pytest.mark.share(2)
@pytest.mark.parametrize(("family", "scanned"), [("e2b", False), ("26b-a4b", True)])
def test_small_blocks_give_the_same_checkpoint(shallow, tmp_path, monkeypatch, family, scanned):
    """Blocks of real models are cut along their slowest axes; here blocks are made tiny."""
    source = shallow(family, scanned)
    to_native(source, tmp_path / "whole", scan_layers=scanned)
    monkeypatch.setattr(planning, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(planning, "GATHER_BYTES", 64)
    report = to_native(source, tmp_path / "cut", scan_layers=scanned)
    chunks = [math.prod(t.chunk) * t.spec.itemsize for t in report.plan.targets.values()]
    assert max(chunks) <= 3000
    whole, cut = (restore(tmp_path / name / "0" / "items") for name in ("whole", "cut"))
    assert all(same_bits(whole[name], cut[name]) for name in whole)


def test_plain_orbax_checkpointers_restore_it(shallow, tmp_path):
    import jax
    import orbax.checkpoint as ocp

    to_native(shallow("31b"), tmp_path / "out", text_only=True)
    items = tmp_path / "out" / "0" / "items"
    plain = ocp.PyTreeCheckpointer().restore(items)
    assert plain["step"] == 0
    assert plain["opt_state"] == {}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {"params": plain["params"]},
    )
    abstract |= {"step": 0, "opt_state": {}}
    standard = ocp.StandardCheckpointer().restore(items, abstract)
    for left, right in zip(
        jax.tree.leaves(plain["params"]), jax.tree.leaves(standard["params"]), strict=True
    ):
        assert same_bits(np.asarray(left), np.asarray(right))
    step = json.loads((items.parent / "_CHECKPOINT_METADATA").read_text())
    assert step["custom_metadata"] == {"scan_layers": False, "gemma_convert": __version__}
    assert (items.parent / "commit_success.txt").exists()


def test_tied_head_must_equal_the_embedding(shallow, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(shallow("31b"), source)
    tensors = _with_head(source, change=False)
    report = to_native(source, tmp_path / "same")
    assert report.tied == ("lm_head.weight",)
    assert len(restore(tmp_path / "same" / "0" / "items")) == report.arrays_written
    assert "lm_head.weight" in tensors
    _with_head(source, change=True)
    with pytest.raises(SourceError, match="output head is tied"):
        to_native(source, tmp_path / "different")
    assert not (tmp_path / "different").exists()


def _with_head(source: Path, *, change: bool) -> dict[str, np.ndarray]:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    head = tensors["model.language_model.embed_tokens.weight"].clone()
    if change:
        head[3, 5] += 1
    tensors["lm_head.weight"] = head
    assert head.dtype == torch.bfloat16
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return tensors


def test_dry_run_reads_headers_alone_and_writes_nothing(shallow, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(shallow("31b"), source)
    file = source / "model.safetensors"
    header = file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")]
    size = file.stat().st_size
    with file.open("wb") as hollow:
        hollow.write(header)
        hollow.truncate(size)
    report = to_native(source, tmp_path / "out", dry_run=True)
    assert report.dry_run
    assert report.arrays_written == report.tensors_converted == len(report.plan.targets)
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == [source]


def test_overwrite_replaces_a_checkpoint_and_nothing_else(shallow, tmp_path):
    out = tmp_path / "out"
    to_native(shallow("31b"), out)
    with pytest.raises(TargetError, match="exists"):
        to_native(shallow("26b-a4b"), out)
    to_native(shallow("26b-a4b"), out, overwrite=True)
    assert any("MoeBlock_0" in name for name in restore(out / "0" / "items"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / "thesis.txt").write_text("years of work")
    with pytest.raises(TargetError, match="not a native checkpoint"):
        to_native(shallow("31b"), papers, overwrite=True)
    assert (papers / "thesis.txt").exists()


def test_source_and_target_must_lie_apart(shallow, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(shallow("31b"), source)
    for target in (source, source / "out", tmp_path):
        with pytest.raises(TargetError):
            to_native(source, target, overwrite=True)
    assert (source / "model.safetensors").exists()


def test_scanning_is_refused_where_maxtext_refuses_it(shallow, tmp_path):
    for family in ("e2b", "e4b"):
        with pytest.raises(UsageError, match="MaxText scans no model"):
            to_native(shallow(family), tmp_path / "out", scan_layers=True)
    assert not (tmp_path / "out").exists()


def test_full_disk_ends_in_a_message_and_leaves_nothing(shallow, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 5))
    with pytest.raises(TargetError, match="not enough space"):
        to_native(shallow("31b"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [20_000, 300_000])
def test_write_that_fails_halfway_leaves_nothing(shallow, tmp_path, limit):
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(TargetError, match="cannot be written"):
            to_native(shallow("26b-a4b"), tmp_path / "out", dtype="float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_source_that_shrinks_or_changes_meanwhile_is_noticed(shallow, tmp_path, monkeypatch):
    from gemma_convert.stores.safetensors.reader import SafetensorsFolder

    source = tmp_path / "source"
    shutil.copytree(shallow("31b"), source)
    file = source / "model.safetensors"
    read = SafetensorsFolder.read_into

    def shrink_first(self, tensor, offset, buffer):
        with file.open("r+b") as shard:
            shard.truncate(60_000)
        read(self, tensor, offset, buffer)

    monkeypatch.setattr(SafetensorsFolder, "read_into", shrink_first)
    with pytest.raises(SourceError, match="became shorter"):
        to_native(source, tmp_path / "out")
    shutil.copy(shallow("31b") / "model.safetensors", file)

    def touch_first(self, tensor, offset, buffer):
        file.touch()
        read(self, tensor, offset, buffer)

    monkeypatch.setattr(SafetensorsFolder, "read_into", touch_first)
    with pytest.raises(SourceError, match="changed while it was read"):
        to_native(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_source_is_never_written(shallow, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(shallow("e2b"), source)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.rglob("*")}
    to_native(source, tmp_path / "out")
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.rglob("*")}
    assert before == after
