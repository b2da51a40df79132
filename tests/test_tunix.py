"""Tunix end to end: its tree against numpy by hand and what Tunix itself saved, and back."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cases import FAMILIES, SHALLOW
from commands import said
from gemma_jax_by_hand import nested
from models import load_config
from native_checkpoints import CARRIED, arrays_of, differing, manifest, passes, sums
from trees import read_safetensors
from tunix_by_hand import tunix_tree

from gemma_convert import SourceError, inspect, to_hf, to_native
from gemma_convert.layouts.tunix.layout import Tunix
from gemma_convert.layouts.tunix.settings import tunix_facts, tunix_settings
from gemma_convert.mapping.plan import Plan
from gemma_convert.model.config import parse_architecture, read_architecture
from gemma_convert.stores.safetensors.header import write_safetensors

RECORDED = Path(__file__).parent / "data" / "tunix"
MODELS = (*FAMILIES, "12b")


def by_hand(source: Path) -> dict[str, np.ndarray]:
    return tunix_tree(read_safetensors(source), read_architecture(source))


def facts(array: np.ndarray) -> list:
    """What is recorded of an array."""
    digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
    return [array.dtype.name, list(array.shape), digest]


# The tree.


@pytest.mark.parametrize("family", MODELS)
def test_arrays_are_those_that_tunix_itself_saved(shallow, converted, family):
    """Names on disk, dtypes, shapes and bits."""
    source = shallow(family)
    recorded = json.loads(gzip.decompress((RECORDED / f"{family}.json.gz").read_bytes()))
    file = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert file == recorded["original"], "the tiny checkpoint is another: record it again"
    found = {
        name: [
            array.dtype.name,
            list(array.shape),
            hashlib.sha256(array.tobytes()).hexdigest()[:16],
        ]
        for name, array in arrays_of(converted(source, "tunix"), "tunix").items()
    }
    assert found == recorded["arrays"]


@pytest.mark.parametrize(
    ("family", "kv_shared"), [("e2b", "omit"), ("e4b", "keep"), ("26b-a4b", "keep")]
)
def test_every_array_equals_numpy_written_by_hand(shallow, converted, family, kv_shared):
    source = shallow(family, kv_shared=kv_shared)
    assert not differing(arrays_of(converted(source, "tunix"), "tunix"), by_hand(source))


def test_on_disk_it_is_what_tunix_writes(shallow, converted):
    out = converted(shallow("31b"), "tunix")
    assert {entry.name for entry in out.iterdir()} == {"0", "hf", "tunix.json"}
    step, items = out / "0", out / "0" / "model_params"
    assert {entry.name for entry in step.iterdir()} == {
        "_CHECKPOINT_METADATA",
        "commit_success.txt",
        "model_params",
    }
    metadata = json.loads((items / "_METADATA").read_text())
    assert (metadata["use_ocdbt"], metadata["use_zarr3"]) == (True, False)
    keys = [entry["key_metadata"] for entry in metadata["tree_metadata"].values()]
    assert [{"key": key, "key_type": 2} for key in ("layers", "0", "skip_scale", "value")] in keys
    handlers = json.loads((step / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    assert handlers.keys() == {"model_params"}
    assert handlers["model_params"].endswith(".PyTreeCheckpointHandler")


def test_towers_are_carried_and_missing_keys_and_values_filled(shallow, tmp_path):
    source = shallow("e2b", kv_shared="omit")
    report = to_native(source, tmp_path / "out", layout="tunix")
    towers = {name for name in read_safetensors(source) if ".language_model." not in name}
    assert set(read_safetensors((tmp_path / "out" / CARRIED).parent)) == towers
    assert set(report.carried_why) == {"Tunix has no vision tower", "Tunix has no audio tower"}
    shared = read_architecture(source).text.kv_shared_layers
    assert len(report.filled) == 2 * shared  # kernels of both, and the norm of the keys
    assert len(manifest(tmp_path / "out")["filled"]) == 2 * shared
    to_hf(tmp_path / "out", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


# Every file comes back.


@pytest.mark.share(6)
@pytest.mark.parametrize(
    ("family", "made", "options"),
    [
        ("e2b", {"shards": 3}, {"compression": "zstd"}),
        ("e4b", {"kv_shared": "omit", "dtype": "float32"}, {"ocdbt": False}),
        ("12b", {}, {}),
        ("31b", {"dtype": "float16"}, {"text_only": True}),
        ("26b-a4b", {"shards": 2}, {"ocdbt": False}),
        ("26b-a4b", {"text_only": True}, {"dtype": "float32"}),
    ],
)
def test_every_file_comes_back_and_is_verified(shallow, converted, tmp_path, family, made, options):
    source = shallow(family, **made)
    out = converted(source, "tunix", **options)
    for against in (None, source):
        passes(out, against)
    found = inspect(out)
    assert (found.layout, found.family, found.coverage.complete) == ("tunix", family, True)
    to_hf(out, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


@pytest.mark.share(3, 1)
@pytest.mark.parametrize(
    ("family", "other"), [("e2b", "gemma-jax"), ("26b-a4b", "maxtext"), ("12b", "fast-llm")]
)
def test_another_layout_becomes_it_and_it_the_other(shallow, converted, tmp_path, family, other):
    source = shallow(family)
    to_native(converted(source, other), tmp_path / "there", layout="tunix")
    assert not differing(arrays_of(tmp_path / "there", "tunix"), by_hand(source))
    to_native(converted(source, "tunix"), tmp_path / "again", layout=other)
    straight = arrays_of(converted(source, other), other)
    assert not differing(arrays_of(tmp_path / "again", other), straight)


# Trees that others wrote.


def save(folder: Path, tree: dict, *, value: bool, optimizer: bool) -> Path:
    """Two steps, as Tunix' CheckpointManager saves them, beside an optimizer's state or not."""
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    names = tree if value else {name.removesuffix("/value"): tree[name] for name in tree}
    params = nested({name: tree[full] for name, full in zip(names, tree, strict=True)})
    state = {"mu": params, "count": np.zeros((), np.int32)}
    with ocp.CheckpointManager(folder) as manager:
        for step in (1, 12):
            items = {"model_params": params} | ({"optimizer_state": state} if optimizer else {})
            arrays = jax.tree.map(jnp.asarray, items)
            saved = {name: ocp.args.PyTreeSave(item) for name, item in arrays.items()}
            manager.save(step, args=ocp.args.Composite(**saved))
    return folder


@pytest.mark.share(3, 2)
@pytest.mark.parametrize(
    ("family", "value", "optimizer"),
    [("e2b", True, True), ("31b", False, False), ("26b-a4b", True, False)],
)
def test_what_tunix_saved_comes_back(shallow, tmp_path, family, value, optimizer):
    source = shallow(family, text_only=True)
    run = save(tmp_path / "run", by_hand(source), value=value, optimizer=optimizer)
    for path in (run, run / "12", run / "12" / "model_params"):
        found = inspect(path)
        assert (found.layout, found.family) == ("tunix", family)
    report = to_hf(run, tmp_path / "back", like=source)
    assert sums(tmp_path / "back") == sums(source)
    assert (report.layout, report.rounded) == ("tunix", {})
    passes(run, source)


def test_trained_float32_values_are_rounded_as_numpy_rounds(shallow, tmp_path):
    source, random = shallow("26b-a4b", text_only=True), np.random.default_rng(1)
    trained = {
        name: values.astype(np.float32) * random.uniform(0.9, 1.1, values.shape).astype(np.float32)
        for name, values in read_safetensors(source).items()
    }
    tree = tunix_tree(trained, read_architecture(source))
    run = save(tmp_path / "run", tree, value=True, optimizer=False)
    to_hf(run, tmp_path / "back", like=source)
    expected = {name: values.astype(ml_dtypes.bfloat16) for name, values in trained.items()}
    assert not differing(read_safetensors(tmp_path / "back"), expected)


def test_an_adapter_beside_the_weights_is_refused(shallow, tmp_path):
    adapter = "layers/3/attn/q_einsum/w_lora_a/value"
    tree = by_hand(shallow("31b")) | {adapter: np.ones((4, 2))}
    save(tmp_path / "run", tree, value=True, optimizer=False)
    code, _, errors = said("to-hf", tmp_path / "run", tmp_path / "out", "--like", shallow("31b"))
    assert code == 3 and adapter in errors and "save_only_lora_params" in errors


def test_a_tree_that_lacks_an_array_is_refused(shallow, tmp_path):
    tree = by_hand(shallow("31b"))
    del tree["layers/2/attn/_key_norm/scale/value"]
    run = save(tmp_path / "run", tree, value=True, optimizer=False)
    with pytest.raises(SourceError, match="expected: 80 arrays") as caught:
        to_hf(run, tmp_path / "out", like=shallow("31b"))
    assert "layers/2/attn/_key_norm/scale" in str(caught.value)


# What Tunix is told.


def settings_of(config: dict) -> str:
    architecture = parse_architecture(config, Path("config.json"))
    plan = object.__new__(Plan)
    object.__setattr__(plan, "architecture", architecture)
    object.__setattr__(plan, "ignored_facts", ())
    return tunix_settings(plan, Path("/out"))["config"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma-4-E2B-it", "ModelConfig.gemma4_e2b()"),
        ("gemma-4-E4B-it", "ModelConfig.gemma4_e4b()"),
        ("gemma-4-26B-A4B-it", "ModelConfig.gemma4_26b_a4b()"),
        ("gemma-4-31B-it", "ModelConfig.gemma4_31b()"),
    ],
)
def test_a_published_model_is_one_of_tunix_own(name, expected):
    assert settings_of(load_config(name)) == expected


def test_12b_is_told_in_full():
    """Tunix 0.1.7 has no config of it: that of 31B, whose text differs in sizes alone."""
    kinds = ", ".join([*["AttentionType.LOCAL_SLIDING"] * 5, "AttentionType.GLOBAL"])
    assert settings_of(load_config("gemma-4-12B")) == (
        "dataclasses.replace(ModelConfig.gemma4_31b(), embed_dim=3840, hidden_dim=15360, "
        "num_heads=16, num_kv_heads=8, num_global_kv_heads=1, num_layers=48, "
        f"attention_pattern=({kinds},))"
    )


def test_the_share_of_layers_comes_out_as_tunix_counts_it(shallow):
    """It takes the whole part of `layers - share * layers`, which rounding spoils for some."""
    source = json.loads((shallow("e2b") / "config.json").read_text())
    text = source["text_config"]
    for layers, shared in ((10, 5), (35, 29), (42, 23), (42, 18), (60, 31)):
        kinds = ["sliding_attention", "full_attention"] * (layers // 2)
        if layers % 2:
            kinds.append("full_attention")
        text |= {"num_hidden_layers": layers, "num_kv_shared_layers": shared, "layer_types": kinds}
        told = settings_of(source).partition("frac_shared_layers=")[2].partition(",")[0]
        assert int(layers - eval(told) * layers) == layers - shared


def test_layers_without_a_pattern_are_told_one_by_one(shallow):
    config = json.loads((shallow("31b") / "config.json").read_text())
    kinds = config["text_config"]["layer_types"]
    kinds[1] = "full_attention"
    assert settings_of(config).count("AttentionType.") == len(kinds)


def test_the_file_says_all(shallow, converted):
    source = shallow("e2b")
    content = json.loads((converted(source, "tunix") / "tunix.json").read_text())
    rows = {row.native for row in tunix_facts().rows if row.native}
    assert content["model"] == "gemma4_e2b"
    assert rows - set(content["config"]) == {
        "num_global_kv_heads",
        "num_experts",
        "num_experts_per_tok",
        "expert_dim",
    }
    assert content["config"]["embed_dim"] == read_architecture(source).text.embed


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size_per_layer_input", 200, "one size for both vocabularies"),
        ("rms_norm_eps", 1e-5, "epsilon"),
    ],
)
def test_what_tunix_cannot_be_told_is_refused(shallow, tmp_path, key, value, message):
    source, name = tmp_path / "in", "model.language_model.embed_tokens_per_layer.weight"
    shutil.copytree(shallow("e2b"), source)
    config = json.loads((source / "config.json").read_text())
    config["text_config"][key] = value
    (source / "config.json").write_text(json.dumps(config))
    tensors = read_safetensors(source)
    tensors[name] = tensors[name][: config["text_config"]["vocab_size_per_layer_input"]]
    (source / "model.safetensors").unlink()
    write_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(SourceError, match=message):
        to_native(source, tmp_path / "out", layout="tunix")
    assert not (tmp_path / "out").exists()


def test_an_untied_head_is_refused(tiny, tmp_path):
    source = tiny("31b", layers=SHALLOW["31b"], text_only=True, untied=True)
    with pytest.raises(SourceError, match="no output head of its own"):
        to_native(source, tmp_path / "out", layout="tunix")


def test_other_trees_are_not_taken_for_it():
    layout = Tunix()
    assert layout.stored(["embedder/input_embedding/value", "layers/0/skip_scale/value"])
    assert not layout.stored(["embedder/input_embedding", "layer_0/skip_scale"])  # gemma's
    assert not layout.stored(["params/params/token_embedder/embedding"])
    assert not layout.stored(["layers/0/skip_scale/value"])


def test_damage_is_found(shallow, converted, tmp_path):
    out = shutil.copytree(converted(shallow("31b"), "tunix"), tmp_path / "out")
    data = max((out / "0" / "model_params" / "d").iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    code, _, errors = said("verify", out)
    assert code in (1, 3), errors
