"""Adapters: to MaxText and Tunix and back, merged into their models, what is refused by name."""

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
from adapters import ALPHA, PER_LAYER, RANK, TARGETS, expert_matrices, matrices, one_a, save
from cases import SHALLOW
from native_checkpoints import edit_tensors, nested_tree, sums
from safetensors.numpy import load_file, save_file
from test_cli import fails, run
from trees import flatten, read_safetensors

from gemma_convert import SourceError, TargetError, UsageError, inspect, to_hf, to_native, verify
from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.checkpoint.qwix import rank_of
from gemma_convert.cli.to_native_summary import settings_lines
from gemma_convert.engine import merged as merged_module
from gemma_convert.engine.adapter_pairs import AdapterPairs
from gemma_convert.engine.merged import MergedTensors
from gemma_convert.files import patterns
from gemma_convert.model.adapter import read_adapter
from gemma_convert.model.adapter_targets import read_targets
from gemma_convert.model.config import read_architecture
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


TUNIX = {
    "self_attn.q_proj": "attn/q_einsum/w",
    "self_attn.k_proj": "attn/k_einsum/w",
    "keys and values": "attn/kv_einsum/w",
    "self_attn.o_proj": "attn/attn_vec_einsum/w",
    "mlp.gate_proj": "mlp/gate_proj/kernel",
    "mlp.up_proj": "mlp/up_proj/kernel",
    "mlp.down_proj": "mlp/down_proj/kernel",
    "per_layer_input_gate": "per_layer_input_gate/w",
    "per_layer_projection": "per_layer_projection/w",
}


def by_hand(layout: str, model: Path, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Path in a layout's tree → matrix."""
    architecture = read_architecture(model)
    if layout == "tunix":
        return in_tunix(architecture, found)
    return in_maxtext(architecture.family, found)


def in_tunix(architecture, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """qwix multiplies from the left, with a dimension for each axis of the array.

    Keys and values are one array, so one A and one B [rank kv kv_heads head_dim].
    """
    tree = {}
    for name in {name.partition(".lora_")[0] for name in found}:
        a, b = (found[f"{name}.lora_{letter}.weight"].T for letter in "AB")
        values = found.get(f"{name.replace('k_proj', 'v_proj')}.lora_B.weight")
        number, module = re.search(r"layers\.(\d+)\.(.+)$", name).groups()
        layer = architecture.text.layers[int(number)]
        if module == "self_attn.v_proj" or (module == "self_attn.k_proj" and not layer.owns_kv):
            continue
        if module == "self_attn.q_proj":
            b = b.reshape(RANK, layer.heads, layer.head_dim)
        elif module == "self_attn.o_proj":
            a = a.reshape(layer.heads, layer.head_dim, RANK)
        elif module == "self_attn.k_proj":
            b = b.reshape(RANK, layer.kv_heads, layer.head_dim)
            if values is not None:
                module = "keys and values"
                b = np.stack([b, values.T.reshape(b.shape)], axis=1)
        path = f"layers/{number}/{TUNIX[module]}"
        tree |= {f"{path}_lora_a/value": a, f"{path}_lora_b/value": b}
    return tree


def in_maxtext(family: str, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
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


SAVED_BY_TUNIX = Path(__file__).parent / "data" / "tunix"
LAYOUTS = {"maxtext": "0/items", "tunix": "0/model_params"}
"""Layout with adapters → where its tree lies."""


@pytest.fixture
def model(shallow):
    return shallow("31b")


@pytest.fixture
def adapter(model, tmp_path):
    return save(tmp_path / "adapter", model, one_a(matrices(model)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", SHALLOW)
def test_there_and_back(shallow, tmp_path, layout, family):
    model = shallow(family)
    found = matrices(model, TARGETS if layout == "maxtext" else (*TARGETS, *PER_LAYER))
    source = save(tmp_path / "adapter", model, found if layout == "maxtext" else one_a(found))
    out, back = tmp_path / "out", tmp_path / "back"
    report = to_native(source, out, layout=layout)
    assert verify(out).passed and verify(out, against=source).passed
    arrays, wanted = stored(out / LAYOUTS[layout]), by_hand(layout, model, found)
    assert len(arrays) == report.arrays_written
    assert report.tensors_converted + report.tensors_carried + report.shared == len(found)
    for path, array in arrays.items():
        assert np.array_equal(array, wanted[path]), path
    to_hf(out, back)
    assert sums(back) == sums(source)


@pytest.mark.parametrize("family", ["e2b", "26b-a4b"])
def test_the_matrices_are_those_that_tunix_saved(shallow, tmp_path, family):
    model = shallow(family)
    found = one_a(matrices(model, (*TARGETS, *PER_LAYER)))
    to_native(save(tmp_path / "adapter", model, found), tmp_path / "out", layout="tunix")
    recorded = json.loads((SAVED_BY_TUNIX / f"{family}-adapter.json").read_text())
    embedder = {name: recorded.pop(name) for name in list(recorded) if "embedder" in name}
    assert len(embedder) == (2 if family == "e2b" else 0)  # which is refused by name
    arrays = stored(tmp_path / "out" / LAYOUTS["tunix"])
    assert {name: list(array.shape) for name, array in arrays.items()} == recorded


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


def test_what_tunix_is_told(shallow, tmp_path):
    model = shallow("e2b")
    found = one_a(matrices(model, (*TARGETS, *PER_LAYER)))
    report = to_native(save(tmp_path / "adapter", model, found), tmp_path / "out", layout="tunix")
    settings, lines = report.settings, list(settings_lines(report))
    assert lines[:2] == ["import qwix", "from flax import nnx"]
    assert lines[-2] == f"model = {settings['model']}"
    assert f"rank={RANK}, alpha={float(ALPHA)}" in settings["model"]
    assert f'"{tmp_path / "out"}"' in settings["params"]
    pattern = re.compile(re.search(r'module_path="([^"]+)"', settings["model"])[1])
    arrays = stored(tmp_path / "out" / "0" / "model_params")
    modules = {path.rpartition("/value")[0].rpartition("/")[0] for path in arrays}
    assert all(pattern.fullmatch(module) for module in modules)
    assert "layers/9/per_layer_input_gate" in modules
    assert pattern.fullmatch("layers/4/attn/kv_einsum")
    assert not pattern.fullmatch("layers/5/attn/kv_einsum")  # it takes those of another layer
    assert not (tmp_path / "out" / "tunix.json").exists()


def test_an_adapter_of_a_few_modules_names_just_these(model, tmp_path):
    found = matrices(model, ("q_proj", "down_proj"))
    some = {name: found[name] for name in found if ".layers.1." in name or "q_proj" in name}
    source = save(tmp_path / "adapter", model, some)
    assert to_native(source, tmp_path / "tunix", layout="tunix").arrays_written == len(some)
    settings = to_native(source, tmp_path / "out").settings
    pattern = re.compile(settings["lora.lora_module_path"])
    assert pattern.fullmatch("decoder/layers_1/mlp/wo")
    assert pattern.fullmatch("decoder/layers_4/self_attention/query")
    for other in (0, 4):
        assert not pattern.fullmatch(f"decoder/layers_{other}/mlp/wo")


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


def test_an_adapter_that_tunix_saved(adapter, model, tmp_path):
    out, run = tmp_path / "out", tmp_path / "run"
    to_native(adapter, out, layout="tunix")
    for item in ("model_params", "optimizer_state"):
        shutil.copytree(out / "0" / "model_params", run / "20" / item)
    with pytest.raises(SourceError, match="no alpha"):
        to_hf(run, tmp_path / "back", base=model)
    asked = {"base": model, "alpha": float(ALPHA)}
    to_hf(run, tmp_path / "back", **asked)
    before, after = (read_safetensors(folder) for folder in (adapter, tmp_path / "back"))
    assert list(before) == list(after)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert read_adapter(tmp_path / "back") == read_adapter(adapter)
    assert to_hf(run, tmp_path / "back", resume=True, **asked).already_complete
    with pytest.raises(TargetError, match="exists"):
        to_hf(run, tmp_path / "back", resume=True, base=model, alpha=2.0 * ALPHA)
    assert verify(tmp_path / "back", against=run).passed
    name = next(name for name in after if "v_proj.lora_A" in name)
    edit_tensors(tmp_path / "back", {name: lambda matrix: matrix[::-1]})
    assert [*verify(tmp_path / "back", against=run).different] == [
        name.removeprefix("base_model.model.")
    ]


def test_what_inspect_says_of_an_adapter(adapter, model, tmp_path):
    words = " ".join(run("inspect", adapter).stdout.split())
    assert f"PEFT adapter, rank {RANK}, alpha {ALPHA}, base {model}" in words
    assert "towers" not in words and inspect(adapter).base_model == str(model)
    to_native(adapter, tmp_path / "out")
    words = " ".join(run("inspect", tmp_path / "out").stdout.split())
    assert f"maxtext adapter, rank {RANK}, alpha {ALPHA} " in words


@pytest.mark.parametrize("shapes", [[()], [(4, 0)], [(4, 2), (4, 3)], []])
def test_matrices_without_one_rank(shapes, tmp_path):
    specs = {f"{place}_lora_a/value": TensorSpec("float32", s) for place, s in enumerate(shapes)}
    with pytest.raises(SourceError, match="not of one rank"):
        rank_of(tmp_path, specs)


def test_what_nobody_says_is_asked_for(adapter, model, shallow, tmp_path):
    import orbax.checkpoint as ocp

    to_native(adapter, tmp_path / "out")
    ocp.PyTreeCheckpointer().save(tmp_path / "run", nested_tree(tmp_path / "out/0/items"))
    with pytest.raises(SourceError, match="which model this adapter belongs to"):
        to_hf(tmp_path / "run", tmp_path / "back")
    with pytest.raises(SourceError, match="no alpha"):
        to_hf(tmp_path / "run", tmp_path / "back", base=model)
    with pytest.raises(SourceError, match=r"lacks their weights|config\.json"):
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
    exported = run("to-hf", out, back).stdout
    assert "merged model" in exported and "restored as it was converted, bit for bit" in exported
    assert "original" not in exported
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
        merged = MergedTensors(base, AdapterPairs(base.specs, changes, read_adapter(adapter)))
        whole = b"".join(bytes(piece) for piece in merged.pieces(name))
        source = SimpleNamespace(region=SimpleNamespace(tensor=name))
        for size in (2, 14, 1000):
            data = np.empty(len(whole), np.uint8)
            for offset in range(0, len(whole), size):
                merged.read_block(source, {}, offset, data[offset : offset + size])
            assert data.tobytes() == whole


@pytest.mark.parametrize("value", [1e30, np.inf, np.nan])
def test_a_merge_makes_no_value_that_is_not_finite(model, tmp_path, value):
    found = matrices(model)
    name = next(name for name in found if name.endswith("lora_B.weight"))
    for half in (name, name.replace("lora_B", "lora_A")):
        found[half][0, 0] = value
    adapter, out = save(tmp_path / "adapter", model, found), tmp_path / "out"
    with pytest.raises(SourceError, match=f"(?s)not finite.*{name.split('.lora')[0]}"):
        to_native(adapter, out, layout="maxtext", merge=True)
    assert not out.exists()


def test_rslora_is_scaled_by_the_root_of_its_rank(model, tmp_path):
    source = save(tmp_path / "adapter", model, matrices(model), use_rslora=True)
    assert read_adapter(source).scaling == pytest.approx(ALPHA / RANK**0.5)
    report = to_native(source, tmp_path / "out")
    assert float(report.settings["lora.lora_alpha"]) == pytest.approx(ALPHA * RANK**0.5)


# Batched experts.

TARGETED = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def test_experts_are_merged_as_peft_merges_them(tmp_path):
    """What PEFT 0.21 itself stored and merged of a module with both parameters, in float32."""
    folder = Path(__file__).parent / "data" / "peft_experts"
    before_and_after = load_file(folder / "model_before_and_after.safetensors")
    base = {name: before_and_after[f"base.{name}"] for name in named(before_and_after, "base.")}
    save_file(base, tmp_path / "model.safetensors")
    adapter = read_adapter(folder)
    with (
        SafetensorsFolder(tmp_path) as weights,
        SafetensorsFolder(folder) as matrices,
    ):
        merged = MergedTensors(weights, AdapterPairs(weights.specs, matrices, adapter))
        found = {name: b"".join(map(bytes, merged.pieces(name))) for name in base}
    assert len(found) == 4 and {*found} == {*merged.merged}
    for name, data in found.items():
        wanted = before_and_after[f"merged.{name}"]
        values = np.frombuffer(data, np.float32).reshape(wanted.shape)
        assert np.allclose(values, wanted, rtol=1e-6, atol=1e-6), name
        assert not np.allclose(base[name], wanted, atol=0.1)


def named(tensors, prefix):
    return [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]


@pytest.mark.parametrize("parameters", [("gate_up_proj", "down_proj"), ("down_proj",)])
def test_experts_merged(shallow, tmp_path, parameters):
    model = shallow("26b-a4b")
    inner, outer = "experts.base_layer.lora", "experts.lora"
    found = {
        name: matrix
        for name, matrix in expert_matrices(model).items()
        if len(parameters) == 2 or inner not in name
    }
    targets = {"target_parameters": [f"experts.{name}" for name in parameters]}
    source = save(tmp_path / "adapter", model, found, use_rslora=True, **targets)
    report = to_native(source, tmp_path / "out", merge=True, layout="gemma-jax")
    assert report.adapter["weights"] == 6 * len(parameters)
    assert verify(tmp_path / "out", against=source).passed
    to_hf(tmp_path / "out", tmp_path / "back")
    before, after = read_safetensors(model), read_safetensors(tmp_path / "back")
    for name, array in before.items():
        wanted, parameter = array.astype(np.float64), name.rpartition(".")[2]
        if ".experts." in name and parameter in parameters:
            stem = name.replace(f"experts.{parameter}", inner if "gate" in parameter else outer)
            a, b = (found[f"{stem}_{letter}.weight"].astype(float) for letter in "AB")
            for expert in range(len(array)):  # A has an expert's rows together, B every n-th column
                rows = a[expert * RANK : (expert + 1) * RANK]
                wanted[expert] += ALPHA / RANK**0.5 * (b[:, expert :: len(array)] @ rows)
        assert np.array_equal(after[name], wanted.astype(ml_dtypes.bfloat16)), name


def test_experts_by_themselves_have_no_place(shallow, tmp_path):
    model = shallow("26b-a4b")
    source = save(tmp_path / "adapter", model, expert_matrices(model), **TARGETED)
    assert inspect(source).adapter.rank == RANK
    message = fails(2, "to-native", source, tmp_path / "out", "--format", "maxtext")
    assert "no place for an adapter of batched experts" in message
    assert "MaxText 0.2.5" in message and "--merge" in message
    assert not (tmp_path / "out").exists()


def test_other_pairs_of_experts_than_the_config_says(shallow, tmp_path):
    model = shallow("26b-a4b")
    both = expert_matrices(model)
    outer = {name: matrix for name, matrix in both.items() if "base_layer" not in name}
    for number, (found, named) in enumerate(
        [
            (both, ["experts.down_proj"]),
            (outer, TARGETED["target_parameters"]),
            (both, ["7.experts.gate_up_proj"]),
            (both, []),
            (outer, ["xperts.down_proj"]),
        ]
    ):
        source = save(tmp_path / f"{number}", model, found, target_parameters=named)
        with pytest.raises(SourceError, match="other pairs for batched experts"):
            to_native(source, tmp_path / "out", merge=True)
    turned = save(tmp_path / "turned", model, swapped_pairs(both), **TARGETED)
    with pytest.raises(SourceError, match="do not fit"):
        to_native(turned, tmp_path / "out", merge=True)


def swapped_pairs(found):
    """The pair of either parameter where that of the other belongs."""
    return {
        name.replace("experts.base_layer.", "experts.")
        if "base_layer" in name
        else name.replace("experts.", "experts.base_layer."): matrix
        for name, matrix in found.items()
    }


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


def test_from_one_framework_into_another(adapter, tmp_path):
    to_native(adapter, tmp_path / "one", layout="tunix")
    to_native(tmp_path / "one", tmp_path / "two")
    to_native(tmp_path / "two", tmp_path / "three", layout="tunix")
    assert verify(tmp_path / "two", against=adapter).passed
    for out in ("two", "three"):
        to_hf(tmp_path / out, tmp_path / f"{out}-back")
        assert sums(tmp_path / f"{out}-back") == sums(adapter)


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


def other_of_keys_and_values(found):
    keys = next(name for name in found if "k_proj.lora_B" in name)
    values = keys.replace("k_proj", "v_proj")
    return found | {keys: found[values], values: found[keys]}


def reversed_heads(found):
    name = next(name for name in found if "q_proj.lora_B" in name)
    return found | {name: found[name][::-1].copy()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "mistake", [other_layer, other_half, other_of_keys_and_values, reversed_heads]
)
def test_a_mistake_is_found(adapter, model, tmp_path, layout, mistake):
    wrong = save(tmp_path / "wrong", model, mistake(one_a(matrices(model))))
    to_native(wrong, tmp_path / "out", layout=layout)
    assert not verify(tmp_path / "out", against=adapter).passed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lost_scale_is_found(adapter, model, tmp_path, layout):
    wrong = save(tmp_path / "wrong", model, one_a(matrices(model)), lora_alpha=1)
    to_native(wrong, tmp_path / "out", layout=layout)
    assert list(verify(tmp_path / "out", against=adapter).different) == ["hf/adapter_config.json"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_swapped_matrices_do_not_fit(model, tmp_path, layout):
    wrong = save(tmp_path / "wrong", model, swapped(matrices(model)))
    message = fails(3, "to-native", wrong, tmp_path / "out", "--format", layout)
    assert "of a shape that config.json does not ask for" in message


# Refused by name.

REFUSED = {
    "use_dora": True,
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4},
    "modules_to_save": ["lm_head"],
    "target_parameters": "experts.gate_up_proj",
    "kasa_config": {"rank": 4},
    "arrow_config": {"top_k": 3},
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


NAMED = [
    {"target_modules": "all-linear"},
    {"target_modules": r".*\.layers\.\d+\..*_proj"},
    {"target_modules": None},
    {"layers_to_transform": list(range(6)), "exclude_modules": ["lm_head"]},
    {"layers_to_transform": list(range(6)), "layers_pattern": "layers"},
]
NOT_NAMED = [
    ({"target_modules": ["q_proj", "k_proj"]}, "layers.0.mlp.down_proj"),
    ({"target_modules": ["proj"]}, "layers.0.mlp.down_proj"),
    ({"target_modules": r".*\.q_proj"}, "layers.0.mlp.down_proj"),
    ({"target_modules": r"q_proj|k_proj"}, "layers.0.mlp.down_proj"),
    ({"target_modules": None, "target_parameters": ["experts.down_proj"]}, "layers.0."),
    ({"exclude_modules": ["mlp.down_proj"]}, "layers.0.mlp.down_proj"),
    ({"exclude_modules": r".*\.layers\.5\..*"}, "layers.5.mlp.down_proj"),
    ({"layers_to_transform": 1}, "layers.0.mlp.down_proj"),
    ({"layers_to_transform": [0, 1], "layers_pattern": ["layers"]}, "layers.2.mlp.down_proj"),
    ({"layers_to_transform": list(range(6)), "layers_pattern": "blocks"}, "layers.0."),
]
"""What a config says, and the first module, in the order of the file, that it leaves out."""


@pytest.mark.parametrize("config", NAMED)
def test_modules_that_the_config_names(model, tmp_path, config):
    source = save(tmp_path / "adapter", model, matrices(model), **config)
    assert to_native(source, tmp_path / "out").arrays_written == len(matrices(model))


@pytest.mark.parametrize(("config", "module"), NOT_NAMED)
def test_matrices_that_peft_would_not_load(model, tmp_path, config, module):
    """It drops them in silence, so what they change is no part of the model that was tried."""
    source = save(tmp_path / "adapter", model, matrices(model), **config)
    for command in (
        ("to-native", source, tmp_path / "out", "--format", "tunix"),
        ("inspect", source),
    ):
        message = fails(3, *command)
        assert "matrices of modules that its config does not name" in message
        assert f"found: model.language_model.{module}" in message
    assert not (tmp_path / "out").exists()


def test_the_number_of_a_layer_may_have_thousands_of_digits():
    config = {"target_modules": ["q_proj"], "layers_to_transform": [3]}
    targets = read_targets(config, Path("adapter_config.json"))
    long, right = f"model.layers.{'9' * 5000}.q_proj", "model.layers.03.q_proj"
    assert targets.missing([long, right]) == [long]


@pytest.mark.parametrize("pattern", ["(", r"(.*.*.*.*.*.*)*\d\d\d"])
def test_a_pattern_that_cannot_be_used(model, tmp_path, monkeypatch, pattern):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    source = save(tmp_path / "adapter", model, matrices(model), target_modules=pattern)
    with pytest.raises(SourceError, match=r"(?s)regular expression.*adapter_config\.json"):
        to_native(source, tmp_path / "out")


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
        "model.language_model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.language_model.layers.0.self_attn.q_proj.base_layer.lora_A.weight",
    ],
)
def test_a_tensor_of_another_kind(model, tmp_path, name):
    found = matrices(model) | {name: np.zeros((RANK, 4), np.float32)}
    source = save(tmp_path / "adapter", model, found)
    for more in ({}, {"merge": True}):
        with pytest.raises(SourceError, match="more than the two matrices"):
            to_native(source, tmp_path / "out", **more)


def test_what_a_layout_has_no_place_for(adapter, model, tmp_path):
    for layout, why in (("fast-llm", r"\."), ("gemma-jax", r": gm\.nn\.LoRA of the gemma")):
        with pytest.raises(UsageError, match=f"no place for an adapter{why}"):
            to_native(adapter, tmp_path / "out", layout=layout)
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


def test_weights_that_tunix_has_in_one_array(model, tmp_path):
    apart, found = matrices(model), one_a(matrices(model))
    keys = {name: array for name, array in found.items() if "v_proj" not in name}
    for name, changed, error, told in (
        ("apart", apart, SourceError, "tunix has a single tensor for two that differ here"),
        ("keys", keys, UsageError, r"one array for several weights[\s\S]*v_proj\.lora_A"),
    ):
        source = save(tmp_path / name, model, changed)
        with pytest.raises(error, match=f"{told}[\\s\\S]*merge=True"):
            to_native(source, tmp_path / "out", layout="tunix")
        assert not (tmp_path / "out").exists()
    to_native(tmp_path / "apart", tmp_path / "out", layout="tunix", merge=True)
    assert verify(tmp_path / "out", against=tmp_path / "apart").passed


def test_what_tunix_would_compute_otherwise(shallow, tmp_path):
    model, module = shallow("e2b"), "per_layer_model_projection"
    source = save(tmp_path / "adapter", model, matrices(model, (module,)))
    with pytest.raises(UsageError, match=f"no place for a part of this adapter[\\s\\S]*{module}"):
        to_native(source, tmp_path / "out", layout="tunix")
    import orbax.checkpoint as ocp

    array = {"value": np.zeros((3, 3), np.float32)}
    matrix = {f"w_lora_{letter}": array for letter in "ab"}
    ocp.PyTreeCheckpointer().save(tmp_path / "run", {"embedder": {module: matrix}})
    with pytest.raises(SourceError, match=f"are not converted[\\s\\S]*{module}"):
        to_hf(tmp_path / "run", tmp_path / "back", base=model, alpha=1.0)


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
    assert "--merge is for a source that is a PEFT adapter" in message
    source = save(tmp_path / "adapter", model, matrices(model))
    message = fails(2, "to-native", source, tmp_path / "o", "--format", "maxtext", "--text-only")
    assert "no towers to leave out" in message
    assert "--base is for an adapter" in fails(
        2, "to-hf", converted(model, "maxtext"), tmp_path / "o", "--base", model
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_shard_size": 10_000}, "An adapter is one file"),
        ({"kv_shared": "omit"}, "All matrices"),
    ],
)
def test_an_adapter_is_exported_whole(adapter, tmp_path, option, message):
    """PEFT looks for adapter_model.safetensors, and for no index."""
    to_native(adapter, tmp_path / "out")
    with pytest.raises(UsageError, match=message):
        to_hf(tmp_path / "out", tmp_path / "back", **option)
    assert not (tmp_path / "back").exists()


def test_told_by_inspect_and_refused_by_commands_for_models(adapter, tmp_path):
    for layout in LAYOUTS:
        to_native(adapter, tmp_path / layout, layout=layout)
    for folder in (adapter, *(tmp_path / layout for layout in LAYOUTS)):
        found = inspect(folder).adapter
        assert (found.rank, found.alpha) == (RANK, ALPHA)
    message = fails(3, "golden", adapter, tmp_path / "golden.safetensors")
    assert "to-native --merge" in message


def test_the_command_line(adapter, model, tmp_path):
    done = run("to-native", adapter, tmp_path / "out", "--format", "maxtext", "--base", model)
    assert f"rank {RANK}, alpha {ALPHA}, for" in done.stdout
    assert "'lora.lora_module_path=decoder/" in done.stdout
    done = run("to-native", adapter, tmp_path / "m", "--format", "maxtext", "--merge", "--verify")
    assert done.returncode == 0, done.stderr
