"""gemma-jax end to end: the tree by Orbax against numpy by hand and the oracle, and back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cases import FAMILIES
from gemma_jax_by_hand import flat, gemma_jax_tree, nested
from native_checkpoints import (
    CARRIED,
    alter,
    arrays_of,
    damaged,
    differing,
    edit_tensors,
    edited,
    manifest,
    passes,
    sums,
)
from trees import read_safetensors, same_bits

from gemma_convert import SourceError, UsageError, inspect, to_hf, to_native, verify
from gemma_convert.model.config import read_architecture

VISION = "model.vision_tower.encoder.layers."
BLOCK = "vision_encoder/transformer/stacked_layers/block/"
TEXT = re.compile(r"model\.(language_model|layers|embed_tokens|norm|per_layer)")

FILES = {
    "gemma.json",
    "_CHECKPOINT_METADATA",
    "_METADATA",
    "commit_success.txt",
    "d",
    "hf",
    "manifest.ocdbt",
}
"""What lies in a checkpoint: the folder itself is Orbax' item."""


def by_hand(source: Path) -> dict[str, np.ndarray]:
    return gemma_jax_tree(read_safetensors(source), read_architecture(source))


def native_of(source: Path, out: Path, **options) -> Path:
    to_native(source, out, layout="gemma-jax", **options)
    return out


# The tree.


@pytest.mark.share(2)
@pytest.mark.parametrize(
    ("family", "kv_shared"), [*((f, "keep") for f in FAMILIES), ("e2b", "omit")]
)
def test_every_array_equals_numpy_written_by_hand(tiny, converted, family, kv_shared):
    source = tiny(family, kv_shared=kv_shared)
    out = converted(source, "gemma-jax")
    assert not differing(arrays_of(out, "gemma-jax"), by_hand(source))


@pytest.mark.share(2, 1)
@pytest.mark.parametrize("family", ["e4b", "26b-a4b"])
def test_dtypes_that_are_asked_for(shallow, tmp_path, family):
    source = shallow(family, text_only=True, kv_shared="omit")
    native_of(source, tmp_path / "wide", dtype="float32")
    expected = {name: array.astype(np.float32) for name, array in by_hand(source).items()}
    assert not differing(arrays_of(tmp_path / "wide", "gemma-jax"), expected)
    report = to_native(tmp_path / "wide", tmp_path / "narrow", layout="gemma-jax", dtype="bfloat16")
    assert not differing(arrays_of(tmp_path / "narrow", "gemma-jax"), by_hand(source))
    assert all(row.values == 0 for row in report.lossy_rows)


@pytest.mark.parametrize("family", ["26b-a4b", "31b"])
def test_a_text_only_source_has_the_same_text_tree(shallow, converted, family):
    out = converted(shallow(family, text_only=True, shards=2), "gemma-jax")
    towers = ("vision_encoder/", "embedder/mm_input_projection/")
    text = {n: a for n, a in by_hand(shallow(family)).items() if not n.startswith(towers)}
    assert not differing(arrays_of(out, "gemma-jax"), text)


def test_float32_towers_beside_bfloat16_text_stay_what_they_are(shallow, tmp_path):
    """The gemma library itself keeps towers in float32; nothing is rounded on the way."""
    from safetensors.torch import load_file, save_file

    source = tmp_path / "hf"
    shutil.copytree(shallow("31b"), source)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if ".language_model." not in name:
            tensors[name] = tensors[name].float() + 1e-5
    save_file(tensors, source / "model.safetensors")
    out = native_of(source, tmp_path / "out")
    found = arrays_of(out, "gemma-jax")
    assert not differing(found, by_hand(source))
    assert {array.dtype.name for array in found.values()} == {"bfloat16", "float32"}
    to_hf(out, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_and_values_are_those_that_the_gemma_library_loaded(oracle, tmp_path, family):
    out = native_of(oracle / "hf" / family, tmp_path / "out", dtype="float32")
    expected = arrays_of(oracle / "gemma_jax" / family, "gemma-jax")
    wide = {name: array.astype(np.float32) for name, array in expected.items()}
    assert not differing(arrays_of(out, "gemma-jax"), wide)


@pytest.mark.share(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_gemma_library_loaded_gives_back_the_original(oracle, tmp_path, family):
    original, native = oracle / "hf" / family, oracle / "gemma_jax" / family
    report = to_hf(native, tmp_path / "back", like=original)
    assert sums(tmp_path / "back") == sums(original)
    assert not report.rounded
    passes(native, original)


# What lies on disk.


def test_orbax_restores_it_without_being_told_how(shallow, converted):
    import orbax.checkpoint as ocp

    out = converted(shallow("e4b"), "gemma-jax")
    standard = ocp.StandardCheckpointer().restore(out)
    assert list(standard["audio_encoder"]) == [
        "conformer/stacked_layers_0",
        "conformer/stacked_layers_1",
        "feature",
        "output_projection",
    ]
    plain = ocp.PyTreeCheckpointer().restore(out)
    for restored in (standard, plain):
        found = {name: np.asarray(array) for name, array in flat(restored).items()}
        assert not differing(found, by_hand(shallow("e4b")))


def test_the_folder_is_the_item_and_holds_what_orbax_itself_writes(shallow, converted):
    out = converted(shallow("e2b"), "gemma-jax")
    assert {entry.name for entry in out.iterdir()} == FILES
    metadata = json.loads((out / "_METADATA").read_text())
    assert (metadata["use_ocdbt"], metadata["use_zarr3"]) == (True, False)
    paths = {
        tuple(key["key"] for key in entry["key_metadata"])
        for entry in metadata["tree_metadata"].values()
    }
    assert ("layer_0", "attn", "q_einsum", "w") in paths
    assert (
        "audio_encoder", "conformer/stacked_layers_1", "lconv", "ln", "scale"
    ) in paths  # fmt: skip
    assert not [path for path in paths if "conformer" in path or path[0] == "params"]
    handler = json.loads((out / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    assert handler.endswith(".StandardCheckpointHandler")


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("ocdbt", [True, False])
def test_arrays_are_zarr_v2_under_keys_joined_by_dots(shallow, tmp_path, ocdbt, compression):
    import tensorstore as ts

    source = shallow("31b")
    out = native_of(source, tmp_path / "out", ocdbt=ocdbt, compression=compression)
    base = {"driver": "file", "path": f"{out}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base} if ocdbt else base).result()
    keys = {key.decode() for key in store.list().result()}
    assert "layer_0.attn.q_einsum.w/.zarray" in keys
    assert not [key for key in keys if key.endswith("zarr.json")]
    array = json.loads(store["layer_0.attn.q_einsum.w/.zarray"])
    assert (array["zarr_format"], array["dtype"]) == (2, "bfloat16")
    assert (array["compressor"] is None) == (compression == "none")
    assert (out / "manifest.ocdbt").exists() == ocdbt
    assert not differing(arrays_of(out, "gemma-jax"), by_hand(source))


def test_what_the_report_and_the_manifest_say(shallow, tmp_path):
    source, out = shallow("e2b"), tmp_path / "out"
    report = to_native(source, out, layout="gemma-jax")
    hf, tree = read_safetensors(source), by_hand(source)
    assert (report.layout, report.framework, report.scanned) == ("gemma-jax", "gemma", False)
    assert report.settings.keys() == {"model", "config", "params"}
    assert report.settings["model"] == "gm.nn.Gemma4_E2B(config=config)"
    assert report.settings["params"] == f'gm.ckpts.load_params("{out}")'
    assert f"embed_dim={read_architecture(source).text.embed}," in report.settings["config"]
    layers = read_architecture(source).vision.layers
    assert report.shared == layers * 2 * 4
    assert report.arrays_written == len(tree)
    assert report.bytes_written == sum(array.nbytes for array in tree.values())
    assert report.tensors_converted == len(hf) - report.shared
    assert (report.tensors_carried, report.filled, report.lossy_rows) == (0, (), ())
    entries = manifest(out)["tensors"]
    shared = {name for name, entry in entries.items() if entry["kept"] == "shared"}
    expected = {
        f"{VISION}{layer}.{module}_proj.{bound}"
        for layer in range(layers)
        for module in ("self_attn.v", "mlp.up")
        for bound in ("input_min", "input_max", "output_min", "output_max")
    }
    assert shared == expected
    assert {entry["kept"] for entry in entries.values()} == {"converted", "shared"}
    assert manifest(out)["shared"][f"{VISION}0.mlp.up_proj.output_max"] == (
        f"{VISION}0.mlp.gate_proj.output_max"
    )


# Every file comes back.

ROUND_TRIPS = [
    ("e2b", {"layers": 10}, {}),
    ("e2b", {"layers": 10, "kv_shared": "omit", "shards": 3}, {"compression": "zstd"}),
    ("e2b", {"layers": 10, "text_only": True, "dtype": "float16"}, {"ocdbt": False}),
    (
        "e4b",
        {"layers": 12, "shards": 3},
        {"ocdbt": False, "compression": "zstd", "text_only": True},
    ),
    ("e4b", {"layers": 12, "kv_shared": "omit", "dtype": "float32"}, {}),
    ("26b-a4b", {"layers": 6, "shards": 3, "dtype": "float32"}, {"ocdbt": False}),
    ("26b-a4b", {"layers": 6, "text_only": True}, {"compression": "zstd"}),
    ("26b-a4b", {}, {"text_only": True}),
    ("31b", {"layers": 6, "dtype": "float16"}, {"text_only": True, "compression": "zstd"}),
]


@pytest.mark.share(5)
@pytest.mark.parametrize(("family", "made", "options"), ROUND_TRIPS)
def test_every_file_comes_back_and_is_verified(tiny, converted, tmp_path, family, made, options):
    source = tiny(family, **made)
    out = converted(source, "gemma-jax", **options)
    report = to_hf(out, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)
    assert report.bit_for_bit
    assert report.identical == report.tensors == len(read_safetensors(source))
    hf = read_safetensors(source)
    arrays = arrays_of(out, "gemma-jax")
    carried = {n for n in hf if not TEXT.match(n)} if options.get("text_only") else set()
    assert report.tensors_from_original == len(carried)
    assert (out / CARRIED).exists() == bool(carried)
    if carried:
        stored = read_safetensors(out / CARRIED.parent)
        assert not differing(stored, {name: hf[name] for name in carried})
        assert not [name for name in arrays if name.startswith(("vision_", "audio_"))]
    for against in (None, source):
        assert passes(out, against).checked >= len(arrays)
    assert passes(tmp_path / "back", out).checked == len(hf)


def test_small_blocks_give_the_same_checkpoint(tiny, tmp_path, monkeypatch):
    """Blocks of real models are cut along their slowest axes; here blocks are made tiny."""
    monkeypatch.setattr("gemma_convert.mapping.plan.BLOCK_BYTES", 10_000)
    monkeypatch.setattr("gemma_convert.mapping.plan.GATHER_BYTES", 1_000)
    source = tiny("e2b", layers=10, kv_shared="omit", shards=3)
    report = to_native(source, tmp_path / "cut", layout="gemma-jax")
    cut = [target for target in report.plan.filled.values() if target.chunk != target.spec.shape]
    assert cut and all(target.chunk[0] == 1 for target in cut)
    assert not differing(arrays_of(tmp_path / "cut", "gemma-jax"), by_hand(source))
    passes(tmp_path / "cut")
    passes(tmp_path / "cut", source)
    to_hf(tmp_path / "cut", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


# Keys and values that nothing reads.


def filled_names(source: Path) -> dict[str, int]:
    """Array → value, of the layers that take their keys and values from another."""
    owners = [layer.owns_kv for layer in read_architecture(source).text.layers]
    shared = [index for index, owns in enumerate(owners) if not owns]
    return {f"layer_{index}/attn/kv_einsum/w": 0 for index in shared} | {
        f"layer_{index}/attn/key_norm/scale": 1 for index in shared
    }


@pytest.mark.share(2)
@pytest.mark.parametrize("family", ["e2b", "e4b"])
def test_what_the_source_lacks_is_filled_in_and_left_out_again(tiny, tmp_path, family):
    depth = {"e2b": 10, "e4b": 12}[family]
    source, out = tiny(family, layers=depth, kv_shared="omit", shards=2), tmp_path / "out"
    report = to_native(source, out, layout="gemma-jax", dtype="float32")
    expected, arrays = filled_names(source), arrays_of(out, "gemma-jax")
    assert len(expected) > 4
    assert set(report.filled) == expected.keys()
    assert manifest(out)["filled"] == expected
    for name, value in expected.items():
        assert arrays[name].dtype == np.float32
        assert (arrays[name] == value).all()
    assert all((array != 0).any() for name, array in arrays.items() if name not in expected)
    to_hf(out, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)
    assert inspect(out).coverage.complete


def test_a_source_with_leftovers_keeps_their_values(shallow, converted):
    source = shallow("e2b")
    out = converted(source, "gemma-jax")
    arrays, hf = arrays_of(out, "gemma-jax"), read_safetensors(source)
    assert manifest(out)["filled"] == {}
    for name in filled_names(source):
        layer = name.partition("/")[0].removeprefix("layer_")
        at = f"model.language_model.layers.{layer}.self_attn."
        if name.endswith("scale"):
            assert same_bits(arrays[name], hf[at + "k_norm.weight"])
        else:
            for place, word in enumerate("kv"):
                rows = arrays[name][place].transpose(0, 2, 1).reshape(-1, arrays[name].shape[2])
                assert same_bits(np.ascontiguousarray(rows), hf[f"{at}{word}_proj.weight"])


@pytest.mark.share(2, 1)
@pytest.mark.parametrize(
    ("array", "value"), [("attn/kv_einsum/w", -0.0), ("attn/key_norm/scale", 1.5)]
)
def test_a_value_altered_in_what_was_filled_in_is_named(tiny, tmp_path, array, value):
    source = tiny("e2b", layers=10, kv_shared="omit", text_only=True)
    out = native_of(source, tmp_path / "out")
    *_, name = (name for name in filled_names(source) if name.endswith(array))

    def one_value(values):
        values.reshape(-1)[-1] = value
        return values

    alter(out, name, one_value)
    for against in (None, source):
        assert damaged(verify(out, against=against)) == [name]


@pytest.mark.share(2)
@pytest.mark.parametrize("name", ["layer_2/attn/kv_einsum/w", "layer_2/skip_scale"])
def test_one_changed_bit_is_named(tiny, tmp_path, name):
    source = tiny("e2b", layers=10, text_only=True)
    out = native_of(source, tmp_path / "out")

    def one_bit(values):
        values.view(np.uint16).reshape(-1)[-1] ^= 1
        return values

    alter(out, name, one_bit)
    for against in (None, source):
        assert damaged(verify(out, against=against)) == [name]


# Bounds that the gemma library has once.


def bound(value: float):
    return lambda values: np.full_like(values, value)


def bits_of(word: int):
    return lambda values: np.full_like(values, 0).view(np.uint16).__ior__(word).view(values.dtype)


@pytest.mark.share(2)
@pytest.mark.parametrize(
    ("first", "second", "edge"),
    [
        ("self_attn.k_proj", "self_attn.v_proj", "output_max"),
        ("mlp.gate_proj", "mlp.up_proj", "input_min"),
    ],
)
def test_bounds_that_differ_are_refused_by_name_and_value(
    shallow, converted, tmp_path, first, second, edge
):
    one, two = (f"{VISION}1.{module}.{edge}" for module in (first, second))
    source = edited(shallow("e2b"), tmp_path / "hf", {two: bound(17.5)})
    value = read_safetensors(source)[one]
    with pytest.raises(SourceError) as caught:
        native_of(source, tmp_path / "work" / "out")
    assert caught.value.expected == f"{two} equal to {one}, bit for bit"
    assert caught.value.found.startswith("17.5 and ")
    assert float(caught.value.found.removeprefix("17.5 and ")) == pytest.approx(value, rel=1e-4)
    assert caught.value.exit_code == 3
    assert "--text-only" in caught.value.do
    assert not (tmp_path / "work").exists()
    native_of(source, tmp_path / "text", text_only=True)
    to_hf(tmp_path / "text", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)
    to_native(source, tmp_path / "maxtext")
    with pytest.raises(SourceError, match="a single tensor for two that differ"):
        native_of(tmp_path / "maxtext", tmp_path / "work" / "out")
    assert not (tmp_path / "work").exists()
    report = verify(converted(shallow("e2b"), "gemma-jax"), against=source)
    assert report.different[two] == f"is not {one}"


@pytest.mark.parametrize(("one", "two"), [(0x0000, 0x8000), (0x7FC0, 0x7FC1)])
def test_bounds_are_compared_by_their_bits(shallow, tmp_path, one, two):
    """Zeros of two signs are not one bound, nor are NaNs of two payloads."""
    names = [f"{VISION}0.self_attn.{word}_proj.input_max" for word in "kv"]
    edits = {names[0]: bits_of(one), names[1]: bits_of(two)}
    source = edited(shallow("e2b"), tmp_path / "hf", edits)
    with pytest.raises(SourceError, match="a single tensor for two that differ"):
        native_of(source, tmp_path / "out")


def test_infinite_bounds_and_nans_come_back(tiny, tmp_path):
    edges = {"input_min": 0xFF80, "input_max": 0x7F80, "output_min": 0xFFC1, "output_max": 0x7FC0}
    edits = {
        f"{VISION}0.{module}_proj.{edge}": bits_of(word)
        for edge, word in edges.items()
        for module in ("self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
    }
    source = edited(tiny("e2b", layers=10), tmp_path / "hf", edits)
    out = native_of(source, tmp_path / "out")
    arrays = arrays_of(out, "gemma-jax")
    for edge, word in edges.items():
        for module in ("attn/kv_einsum", "mlp/gating_einsum"):
            assert arrays[f"{BLOCK}{module}/clip_{edge}"].view(np.uint16)[0] == word
    passes(out)
    passes(out, source)
    to_hf(out, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)
    passes(tmp_path / "back", out)


def test_an_export_whose_bounds_came_apart_is_named(shallow, converted, tmp_path):
    out = converted(shallow("e2b"), "gemma-jax")
    to_hf(out, tmp_path / "back")
    name = f"{VISION}0.mlp.up_proj.input_max"
    edit_tensors(tmp_path / "back", {name: bound(3.0)})
    assert verify(tmp_path / "back", against=out).different == {
        name: "1 value differs in the region at []"
    }


# What is refused.


def test_keys_and_values_from_other_layers_than_the_library_takes_are_refused(tiny, tmp_path):
    source = tmp_path / "hf"
    shutil.copytree(tiny("e4b"), source)
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    owners = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    assert text["layer_types"][owners - 2 : owners] == ["sliding_attention", "full_attention"]
    text["num_kv_shared_layers"] += 1
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="last two layers that own them") as caught:
        native_of(source, tmp_path / "out")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    to_native(source, tmp_path / "maxtext", text_only=True)
    with pytest.raises(UsageError, match="last two layers that own them"):
        native_of(tmp_path / "maxtext", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_there_is_no_scanned_form(shallow, tmp_path):
    with pytest.raises(UsageError, match="no scanned form"):
        native_of(shallow("31b"), tmp_path / "out", scan_layers=True)
    assert not (tmp_path / "out").exists()


def test_a_tree_of_another_model_is_refused(shallow, converted, tmp_path):
    out = converted(shallow("31b"), "gemma-jax")
    with pytest.raises(SourceError, match="do not match the original"):
        to_hf(out, tmp_path / "back", like=shallow("26b-a4b"))
    with pytest.raises(SourceError, match="do not match the original"):
        verify(out, against=shallow("e2b"))


# Trees that others wrote.


def bare(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tree with the weights of the dense feed-forward as leaves, not below `w`."""
    parts = ("mlp/gating_einsum/w", "mlp/linear/w", "mlp2/gating_einsum/w", "mlp2/linear/w")
    dense = {
        name
        for name, array in tree.items()
        if name.startswith("layer_") and name.partition("/")[2] in parts
        if array.ndim == (3 if "gating" in name else 2)
    }
    assert dense
    return {name.removesuffix("/w") if name in dense else name: a for name, a in tree.items()}


def save_by_manager(folder: Path, tree: dict) -> Path:
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder) as manager:
        for step in (3, 12):
            manager.save(step, args=ocp.args.StandardSave(tree))
    assert (folder / "12" / "default" / "_METADATA").exists()
    return folder


def save_by_standard(folder: Path, tree: dict) -> Path:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def save_by_pytree(folder: Path, tree: dict) -> Path:
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder, tree)
    return folder


@pytest.mark.share(4, 1)
@pytest.mark.parametrize(
    ("family", "save", "form"),
    [
        ("26b-a4b", save_by_standard, bare),
        ("31b", save_by_manager, bare),
        ("31b", save_by_pytree, dict),
        ("e2b", save_by_standard, bare),
    ],
)
def test_trees_saved_by_orbax_itself_are_read(tiny, tmp_path, family, save, form):
    """As jax arrays, which Orbax writes in chunks of its own, under a step or not."""
    import jax
    import jax.numpy as jnp

    source = tiny(family, layers=10 if family == "e2b" else 6)
    tree = form(by_hand(source))
    run = save(tmp_path / "run", jax.tree.map(jnp.asarray, nested(tree)))
    report = to_hf(run, tmp_path / "back", like=source)
    assert sums(tmp_path / "back") == sums(source)
    assert (report.layout, report.family, report.rounded) == ("gemma-jax", family, {})
    assert inspect(run).family == family
    passes(run, source)
    passes(tmp_path / "back", run)
    native_of(run, tmp_path / "again", like=source)
    assert not differing(arrays_of(tmp_path / "again", "gemma-jax"), by_hand(source))


@pytest.mark.large
def test_trained_float32_values_are_rounded_as_numpy_rounds(tiny, tmp_path):
    import jax
    import jax.numpy as jnp

    source, random = tiny("26b-a4b", layers=6), np.random.default_rng(1)
    hf = read_safetensors(source)
    trained = {
        name: (values.astype(np.float32) * random.uniform(0.9, 1.1, values.shape)).astype(
            np.float32
        )
        for name, values in hf.items()
    }
    tree = gemma_jax_tree(trained, read_architecture(source))
    run = save_by_standard(tmp_path / "run", jax.tree.map(jnp.asarray, nested(tree)))
    report = to_hf(run, tmp_path / "back", like=source)
    expected = {name: values.astype(ml_dtypes.bfloat16) for name, values in trained.items()}
    assert not differing(read_safetensors(tmp_path / "back"), expected)
    rounded = {n: int((expected[n].astype(np.float32) != trained[n]).sum()) for n in trained}
    assert report.rounded == {name: count for name, count in rounded.items() if count}
    to_hf(run, tmp_path / "wide", like=source, dtype="float32")
    assert not differing(read_safetensors(tmp_path / "wide"), trained)
    passes(tmp_path / "wide", run)
    passes(tmp_path / "back", run)


def test_an_export_of_the_text_model_alone(shallow, converted, tmp_path):
    source = shallow("e2b")
    to_hf(converted(source, "gemma-jax"), tmp_path / "back", text_only=True)
    expected = {
        name.replace("model.language_model.", "model."): array
        for name, array in read_safetensors(source).items()
        if ".language_model." in name
    }
    assert not differing(read_safetensors(tmp_path / "back"), expected)
    passes(tmp_path / "back", converted(source, "gemma-jax"))


@pytest.mark.large
def test_an_export_without_leftovers_of_shared_layers(shallow, converted, tmp_path):
    source, lean = shallow("e2b"), shallow("e2b", kv_shared="omit")
    to_hf(converted(source, "gemma-jax"), tmp_path / "back", kv_shared="omit")
    found, expected = read_safetensors(tmp_path / "back"), read_safetensors(lean)
    assert not differing(found, expected)
    assert len(found) < len(read_safetensors(source))
    passes(tmp_path / "back", converted(source, "gemma-jax"))


def test_the_dense_mlp_of_a_mixture_is_told_by_its_own_name_too(shallow, tmp_path):
    """The library sizes it by moe_dense_hidden_dim, and a dense model's by hidden_dim."""
    for family, names in (
        ("26b-a4b", ["hidden_dim", "moe_dense_hidden_dim"]),
        ("31b", ["hidden_dim"]),
    ):
        source = shallow(family, text_only=True)
        report = to_native(source, tmp_path / family, layout="gemma-jax", dry_run=True)
        fields = dict(re.findall(r"(\w+)=(\d+)", report.settings["config"]))
        mlp = read_architecture(source).text.layers[0].mlp
        told = [
            key for key, value in fields.items() if key.endswith("hidden_dim") and int(value) == mlp
        ]
        assert told == names
