"""Adapters: to MaxText and back, merged into their models, and what is refused by name."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from adapters import ALPHA, RANK, matrices, save
from cases import SHALLOW
from native_checkpoints import nested_tree, sums
from test_cli import fails, run
from trees import flatten, read_safetensors

from gemma_convert import SourceError, TargetError, UsageError, inspect, to_hf, to_native, verify
from gemma_convert.engine import merged as merged_module
from gemma_convert.engine.merged import MergedTensors
from gemma_convert.model.adapter import read_adapter
from gemma_convert.stores.safetensors.reader import SafetensorsFolder

MODULES = {
    "self_attn.q_proj": "self_attention/query",
    "self_attn.k_proj": "self_attention/key",
    "self_attn.v_proj": "self_attention/value",
    "self_attn.o_proj": "self_attention/out",
    "mlp.gate_proj": "mlp/wi_0",
    "mlp.up_proj": "mlp/wi_1",
    "mlp.down_proj": "mlp/wo",
}
EXPERTS = {name: f"mlp/moe_block/shared_experts/{at[4:]}" for name, at in MODULES.items()}


def by_hand(family: str, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Path in MaxText's tree → matrix: qwix multiplies from the left, so both are transposed."""
    tree = {}
    for name, matrix in found.items():
        layer, module, letter = re.search(
            r"layers\.(\d+)\.(\w+\.\w+)\.lora_([AB])\.weight", name
        ).groups()
        dense = family == "26b-a4b" and module.startswith("mlp")
        path = (EXPERTS if dense else MODULES)[module]
        tree[f"decoder/layers_{layer}/{path}/kernel_lora_{letter.lower()}/value"] = matrix.T
    return tree


def stored(items: Path) -> dict[str, np.ndarray]:
    return {"/".join(keys): array for keys, array in flatten(nested_tree(items)).items()}


@pytest.fixture
def model(shallow):
    return shallow("31b")


@pytest.fixture
def adapter(model, tmp_path):
    return save(tmp_path / "adapter", model, matrices(model))


@pytest.mark.parametrize("family", SHALLOW)
def test_to_maxtext_and_back(shallow, tmp_path, family):
    model = shallow(family)
    found = matrices(model)
    source = save(tmp_path / "adapter", model, found)
    out, back = tmp_path / "out", tmp_path / "back"
    report = to_native(source, out)
    assert verify(out).passed and verify(out, against=source).passed
    arrays, wanted = stored(out / "0" / "items"), by_hand(family, found)
    assert len(arrays) == report.tensors_converted == len(wanted) - report.tensors_carried
    for path, array in arrays.items():
        assert np.array_equal(array, wanted[path]), path
    to_hf(out, back)
    assert sums(back) == sums(source)


def test_values_that_nothing_reads_are_carried(shallow, tmp_path):
    model = shallow("e2b")
    report = to_native(save(tmp_path / "adapter", model, matrices(model)), tmp_path / "out")
    assert set(report.carried_why) == {"nothing reads the keys and values of KV-shared layers"}
    assert report.tensors_carried % 4 == 0 and report.tensors_carried


def test_what_maxtext_is_told(adapter, tmp_path):
    settings = to_native(adapter, tmp_path / "out").settings
    assert settings["lora.lora_rank"] == str(RANK) and settings["lora.lora_alpha"] == "6.0"
    assert settings["lora.lora_restore_path"] == str(tmp_path / "out" / "0" / "items")
    assert "load_parameters_path" not in settings
    modules = {path.rpartition("/kernel_lora_")[0] for path in stored(tmp_path / "out/0/items")}
    pattern = re.compile(settings["lora.lora_module_path"])
    assert all(pattern.fullmatch(module) for module in modules)
    assert not pattern.fullmatch("decoder/layers_5/self_attention/value")  # its key is its value
    metadata = json.loads((tmp_path / "out/0/_CHECKPOINT_METADATA").read_text())
    assert metadata["custom_metadata"]["lora"] == {"lora_rank": RANK, "lora_alpha": float(ALPHA)}


def test_an_adapter_of_a_few_modules_names_just_these(model, tmp_path):
    found = matrices(model, ("q_proj", "down_proj"))
    some = {name: found[name] for name in found if ".layers.1." in name or "q_proj" in name}
    settings = to_native(save(tmp_path / "adapter", model, some), tmp_path / "out").settings
    pattern = re.compile(settings["lora.lora_module_path"])
    assert pattern.fullmatch("decoder/layers_1/mlp/wo")
    assert pattern.fullmatch("decoder/layers_4/self_attention/query")
    assert not pattern.fullmatch("decoder/layers_4/mlp/wo")


def test_names_of_the_text_model_alone(model, tmp_path):
    found = {
        name.replace("model.language_model.", "model."): matrix
        for name, matrix in matrices(model).items()
    }
    source = save(tmp_path / "adapter", model, found)
    to_native(source, tmp_path / "out")
    to_hf(tmp_path / "out", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)
    merged = to_native(source, tmp_path / "merged", merge=True).adapter
    facts = {"rank": RANK, "alpha": ALPHA, "merged": True, "base": str(model)}
    assert merged == facts | {"weights": len(found) // 2}


# What MaxText trained has no sidecar.


@pytest.mark.parametrize("form", ["of its converter", "of its training", "of an item"])
def test_an_adapter_that_maxtext_saved(adapter, model, tmp_path, form):
    import orbax.checkpoint as ocp

    to_native(adapter, tmp_path / "out")
    tree = nested_tree(tmp_path / "out" / "0" / "items")
    step = tmp_path / "run" / "checkpoints" / "2"
    if form == "of its converter":
        tree = {"params": {"params": tree}}
    item = step / ("items" if form != "of an item" else "model_params")
    ocp.PyTreeCheckpointer().save(item, tree)
    if form == "of its training":
        shutil.copy(tmp_path / "out/0/_CHECKPOINT_METADATA", step)
    alpha = None if form == "of its training" else float(ALPHA)
    to_hf(tmp_path / "run", tmp_path / "back", base=model, alpha=alpha)
    before, after = (read_safetensors(folder) for folder in (adapter, tmp_path / "back"))
    assert list(before) == list(after)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (
        *(RANK, ALPHA),
        str(model),
    )
    adapted = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in before}
    assert config["target_modules"] == sorted(adapted)


def test_what_nobody_says_is_asked_for(adapter, model, shallow, tmp_path):
    import orbax.checkpoint as ocp

    to_native(adapter, tmp_path / "out")
    ocp.PyTreeCheckpointer().save(tmp_path / "run", nested_tree(tmp_path / "out/0/items"))
    with pytest.raises(UsageError, match="which model this adapter belongs to"):
        to_hf(tmp_path / "run", tmp_path / "back")
    with pytest.raises(UsageError, match="no alpha"):
        to_hf(tmp_path / "run", tmp_path / "back", base=model)
    with pytest.raises(SourceError, match=r"no weight|config\.json"):
        to_hf(tmp_path / "run", tmp_path / "back", base=shallow("26b-a4b"), alpha=1.0)
    with pytest.raises(UsageError, match="positive"):
        to_hf(tmp_path / "run", tmp_path / "back", base=model, alpha=0.0)
    assert not (tmp_path / "back").exists()


# Merged.


@pytest.mark.parametrize("family", ["31b", "26b-a4b"])
def test_merged(shallow, tmp_path, family):
    model = shallow(family)
    found = matrices(model)
    out, back = tmp_path / "out", tmp_path / "back"
    to_native(save(tmp_path / "adapter", model, found), out, merge=True, scan_layers=True)
    assert verify(out).passed
    to_hf(out, back)
    before, after = read_safetensors(model), read_safetensors(back)
    assert before.keys() == after.keys()
    for name, array in before.items():
        wanted = array.astype(np.float64)
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in found:
            a, b = (found[f"{module}.lora_{letter}.weight"].astype(float) for letter in "AB")
            wanted = wanted + ALPHA / RANK * (b @ a)
            assert not np.array_equal(array, after[name])
        assert np.array_equal(after[name], wanted.astype(ml_dtypes.bfloat16)), name


def test_merged_values_do_not_depend_on_blocks(adapter, model, monkeypatch):
    monkeypatch.setattr(merged_module, "PIECE_VALUES", 1000)
    name = "model.language_model.layers.0.self_attn.o_proj.weight"
    with SafetensorsFolder(model) as base, SafetensorsFolder(adapter) as changes:
        merged = MergedTensors(base, changes, read_adapter(adapter))
        whole = b"".join(bytes(piece) for piece in merged.pieces(name))
        source = SimpleNamespace(region=SimpleNamespace(tensor=name))
        for size in (2, 14, 1000):
            data = np.empty(len(whole), np.uint8)
            for offset in range(0, len(whole), size):
                merged.read_block(source, {}, offset, data[offset : offset + size])
            assert data.tobytes() == whole


def test_rslora_is_scaled_by_the_root_of_its_rank(model, tmp_path):
    source = save(tmp_path / "adapter", model, matrices(model), use_rslora=True)
    assert read_adapter(source).scaling == pytest.approx(ALPHA / RANK**0.5)
    report = to_native(source, tmp_path / "out")
    assert float(report.settings["lora.lora_alpha"]) == pytest.approx(ALPHA * RANK**0.5)


# What stands already.


def test_exports_are_verified_replaced_and_continued(adapter, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    to_native(adapter, out)
    to_hf(out, back)
    assert verify(back, against=out).passed
    assert to_hf(out, back, resume=True).already_complete
    to_hf(out, back, overwrite=True)
    assert sums(back) == sums(adapter)
    (back / "notes.txt").write_text("mine")
    with pytest.raises(TargetError) as caught:
        to_hf(out, back, overwrite=True)
    assert "notes.txt" in caught.value.found
    (back / "notes.txt").unlink()
    flip(back / "adapter_model.safetensors")
    assert not verify(back, against=out).passed


def test_a_merged_checkpoint_is_proved_with_its_adapter(adapter, model, tmp_path):
    out, plain = tmp_path / "out", tmp_path / "plain"
    to_native(adapter, out, merge=True)
    assert verify(out, against=adapter).passed and not verify(out, against=model).passed
    assert to_native(adapter, out, merge=True, resume=True).already_complete
    other = save(tmp_path / "other", model, matrices(model, seed=1))
    assert not verify(out, against=other).passed
    with pytest.raises(TargetError, match="exists"):
        to_native(other, out, merge=True, resume=True)
    to_native(model, plain)
    with pytest.raises(TargetError, match="exists"):  # the model without it is another one
        to_native(adapter, plain, merge=True, resume=True)


def test_the_target_is_apart_from_both(adapter, model, tmp_path):
    for inside in (adapter, model):
        with pytest.raises(TargetError, match="in one another"):
            to_native(adapter, inside / "out", merge=True)
        assert not (inside / "out").exists()


def test_from_one_form_of_maxtext_into_another(adapter, model, tmp_path):
    to_native(adapter, tmp_path / "one")
    to_native(tmp_path / "one", tmp_path / "two", ocdbt=False)
    to_hf(tmp_path / "two", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(adapter)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


# Mistakes.


def swapped(found):
    """A and B the other way around, where both fit."""
    return {
        name: found[
            name.replace("lora_A", "lora_X").replace("lora_B", "lora_A").replace("lora_X", "lora_B")
        ].T.copy()
        for name in found
    }


def other_layer(found):
    return found | {
        name: found[name.replace(".layers.1.", ".layers.2.")]
        for name in found
        if ".layers.1." in name
    }


def other_half(found):
    name = next(name for name in found if "gate_proj.lora_B" in name)
    return found | {name: found[name.replace("gate_proj", "up_proj")]}


def reversed_heads(found):
    name = next(name for name in found if "q_proj.lora_B" in name)
    return found | {name: found[name][::-1].copy()}


@pytest.mark.parametrize("mistake", [other_layer, other_half, reversed_heads])
def test_a_mistake_is_found(adapter, model, tmp_path, mistake):
    wrong = save(tmp_path / "wrong", model, mistake(matrices(model)))
    to_native(wrong, tmp_path / "out")
    assert not verify(tmp_path / "out", against=adapter).passed


def test_a_lost_scale_is_found(adapter, model, tmp_path):
    wrong = save(tmp_path / "wrong", model, matrices(model), lora_alpha=1)
    to_native(wrong, tmp_path / "out")
    assert list(verify(tmp_path / "out", against=adapter).different) == ["hf/adapter_config.json"]


def test_swapped_matrices_do_not_fit(model, tmp_path):
    wrong = save(tmp_path / "wrong", model, swapped(matrices(model)))
    message = fails(3, "to-native", wrong, tmp_path / "out", "--format", "maxtext")
    assert "of a shape that config.json does not ask for" in message


# Refused by name.

REFUSED = {
    "use_dora": True,
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4},
    "modules_to_save": ["lm_head"],
    "target_parameters": ["experts.gate_up_proj"],
    "bias": "all",
    "init_lora_weights": "pissa_niter_4",
    "peft_type": "LOHA",
    "r": "4",
    "lora_alpha": None,
    "use_rslora": "no",
}
ODD = (None, True, 0, -1, 1e30, 10**400, "x", "", [], {}, [[]], "a\x1b[31m\n", 2**70, 0.5)


@pytest.mark.parametrize("key", REFUSED)
def test_a_config_of_another_kind(model, tmp_path, key):
    source = save(tmp_path / "adapter", model, matrices(model), **{key: REFUSED[key]})
    for more in ({}, {"merge": True}):
        with pytest.raises(SourceError, match=f"key {key}"):
            to_native(source, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_odd_values_are_messages(adapter, model, tmp_path):
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    for key in (*config, "bias", "use_rslora", "rank_pattern", "init_lora_weights"):
        for value in ODD:
            file.write_text(json.dumps(config | {key: value}))
            for merge in (False, True):
                with contextlib.suppress(SourceError):
                    to_native(adapter, tmp_path / "out", base=model, merge=merge, dry_run=True)


BROKEN = {
    "none": lambda a: {},
    "scalar": lambda a: {"lora_A": np.array(1, np.float32)},
    "vector": lambda a: {"lora_A": a[0].copy()},
    "scalar B": lambda a: {"lora_B": np.array(1, np.float32)},
    "integers": lambda a: {"lora_A": a.astype(np.int8)},
    "nothing in it": lambda a: {"lora_A": a[:0].copy()},
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_matrices_are_messages(model, tmp_path, how):
    found = matrices(model, ("q_proj",))
    name = next(name for name in found if "lora_A" in name)
    changes = BROKEN[how](found[name])
    found |= {name.replace("lora_A", letter): value for letter, value in changes.items()}
    source = save(tmp_path / "adapter", model, found if changes else {})
    for merge in (False, True):
        with pytest.raises(SourceError):
            to_native(source, tmp_path / "out", merge=merge)


def test_two_pairs_for_one_weight(model, tmp_path):
    found = matrices(model, ("q_proj",))
    twice = {name.replace("language_model.", ""): found[name] for name in list(found)[:2]}
    source = save(tmp_path / "adapter", model, found | twice)
    with pytest.raises(SourceError, match="change the same weight"):
        to_native(source, tmp_path / "out", merge=True)


def test_a_model_that_leads_elsewhere_is_not_read(adapter, model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    (base / "config.json").unlink()
    (base / "config.json").symlink_to(model / "config.json")
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    for merge in (False, True):
        with pytest.raises(SourceError, match="link"):
            to_native(adapter, tmp_path / "out", merge=merge)


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "model.language_model.embed_tokens.lora_embedding_A",
        "model.language_model.layers.0.experts.base_layer.lora_A.weight",
    ],
)
def test_a_tensor_of_another_kind(model, tmp_path, name):
    found = matrices(model) | {name: np.zeros((RANK, 4), np.float32)}
    source = save(tmp_path / "adapter", model, found)
    for more in ({}, {"merge": True}):
        with pytest.raises(SourceError, match="more than the two matrices"):
            to_native(source, tmp_path / "out", **more)


def test_what_a_layout_has_no_place_for(adapter, model, tmp_path):
    with pytest.raises(UsageError, match="no place for an adapter"):
        to_native(adapter, tmp_path / "out", layout="gemma-jax")
    with pytest.raises(UsageError, match="cannot apply an adapter to scanned layers"):
        to_native(adapter, tmp_path / "out", scan_layers=True)
    tower = "model.embed_vision.embedding_projection"
    outputs, inputs = read_safetensors(model)[f"{tower}.weight"].shape
    found = {
        f"{tower}.lora_A.weight": np.ones((RANK, inputs), np.float32),
        f"{tower}.lora_B.weight": np.ones((outputs, RANK), np.float32),
    }
    source = save(tmp_path / "tower", model, matrices(model) | found)
    with pytest.raises(UsageError, match="no place for a part of this adapter"):
        to_native(source, tmp_path / "out")
    assert to_native(source, tmp_path / "out", merge=True, layout="gemma-jax").adapter["merged"]


def test_a_matrix_without_its_partner(model, tmp_path):
    found = matrices(model)
    found.pop(next(name for name in found if "o_proj.lora_B" in name))
    source = save(tmp_path / "adapter", model, found)
    with pytest.raises(SourceError, match="Some of the tensors"):
        to_native(source, tmp_path / "out")
    with pytest.raises(SourceError, match="lacks its partner"):
        to_native(source, tmp_path / "out", merge=True)


def test_another_base_model(adapter, shallow, tmp_path):
    with pytest.raises(SourceError, match=r"do not fit|does not have"):
        to_native(adapter, tmp_path / "out", merge=True, base=shallow("e2b"))
    with pytest.raises(SourceError, match=r"does not ask for|does not account for"):
        to_native(adapter, tmp_path / "out", base=shallow("26b-a4b"))


def test_a_base_model_that_is_not_here(model, tmp_path):
    source = save(tmp_path / "adapter", Path("somebody/model"), matrices(model))
    message = fails(3, "to-native", source, tmp_path / "out", "--format", "maxtext")
    assert "--base" in message and "somebody/model" in message
    to_native(source, tmp_path / "out", base=model / "config.json")
    for resume in (False, True):
        again = to_native(source, tmp_path / "m", base=model, merge=True, resume=resume)
        assert again.already_complete == resume


def test_options_that_are_for_adapters(model, converted, tmp_path):
    message = fails(2, "to-native", model, tmp_path / "o", "--format", "maxtext", "--merge")
    assert "--merge is for a SRC that is a PEFT adapter" in message
    assert "--base is for an adapter" in fails(
        2, "to-hf", converted(model, "maxtext"), tmp_path / "o", "--base", model
    )


def test_told_by_inspect_and_refused_by_commands_for_models(adapter, tmp_path):
    to_native(adapter, tmp_path / "out")
    for folder in (adapter, tmp_path / "out"):
        found = inspect(folder).adapter
        assert (found.rank, found.alpha) == (RANK, ALPHA)
    message = fails(3, "logit-check", adapter, tmp_path / "out")
    assert "to-native --merge" in message


def test_the_command_line(adapter, model, tmp_path):
    done = run("to-native", adapter, tmp_path / "out", "--format", "maxtext", "--base", model)
    assert f"rank {RANK}, alpha {ALPHA}, for" in done.stdout
    assert "'lora.lora_module_path=decoder/" in done.stdout
    done = run("to-native", adapter, tmp_path / "m", "--format", "maxtext", "--merge", "--verify")
    assert done.returncode == 0, done.stderr
