"""logit-check of adapters: native ones on native models, and merged ones, against PEFT's."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from adapters import ALPHA, PER_LAYER, RANK, TARGETS, expert_matrices, matrices, one_a, save
from cases import SHALLOW
from commands import said
from native_checkpoints import nested_tree
from test_cli import fails

from gemma_convert import SourceError, UsageError, logit_check, to_hf, to_native
from gemma_convert.forward.adapted_kernel import AdaptedKernel
from gemma_convert.forward.arithmetic import product
from gemma_convert.logits.reference import TransformersLogits
from gemma_convert.logits.sides import AdapterOptions, sides_of
from gemma_convert.prompts.text import TokenSequence

TOKENS = 12


@pytest.fixture
def model(shallow):
    return shallow("31b")


@pytest.fixture
def native(model, converted):
    return converted(model, "maxtext")


@pytest.fixture
def adapter(model, tmp_path):
    return save(tmp_path / "adapter", model, matrices(model))


def saved(path: Path, tree) -> Path:
    """The tree as the framework's own training leaves it, without metadata of an adapter."""
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save(path, tree)
    return path


ITEMS = {"maxtext": "0/items", "tunix": "0/model_params"}
"""Layout that runs adapters → where its tree lies."""


def tree_of(adapter: Path, folder: Path, layout: str = "maxtext"):
    to_native(adapter, folder, layout=layout)
    return nested_tree(folder / ITEMS[layout])


def as_both_have_it(model: Path, layout: str) -> dict[str, np.ndarray]:
    """Matrices of every module that the layout adapts, one A for keys and values where it is so."""
    if layout == "maxtext":
        return matrices(model)
    return one_a(matrices(model, (*TARGETS, *PER_LAYER)))


@pytest.mark.share(4)
@pytest.mark.parametrize("family", ["26b-a4b", "31b", "e4b", "12b", "e2b"])
@pytest.mark.parametrize("layout", ITEMS)
def test_the_same_adapter(shallow, converted, tmp_path, layout, family):
    model = shallow(family)
    rslora = {"use_rslora": family in {"26b-a4b", "12b"}}
    source = save(tmp_path / "adapter", model, as_both_have_it(model, layout), **rslora)
    to_native(source, tmp_path / "out", layout=layout)
    scanned = {"scan_layers": True} if (layout, family) == ("maxtext", "12b") else {}
    report = logit_check(
        source,
        tmp_path / "out",
        native_base=converted(model, layout, **scanned),
        tokens=TOKENS,
    )
    assert report.passed and report.proof and report.divergence.kl_max < 1e-6
    assert report.local is not None and report.local.passed
    assert report.original == f"{source} on {model}"
    listed = {one.file for one in report.fingerprints}
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= listed


KERNELS = {
    "maxtext": {
        "queries": "self_attention/query/kernel",
        "keys": "self_attention/key/kernel",
        "out": "self_attention/out/kernel",
        "gate": "mlp/wi_0/kernel",
        "up": "mlp/wi_1/kernel",
        "down": "mlp/wo/kernel",
    },
    "tunix": {
        "queries": "attn/q_einsum/w",
        "keys": "attn/kv_einsum/w",
        "keys that are values": "attn/k_einsum/w",
        "out": "attn/attn_vec_einsum/w",
        "gate": "mlp/gate_proj/kernel",
        "up": "mlp/up_proj/kernel",
        "down": "mlp/down_proj/kernel",
        "per-layer gate": "per_layer_input_gate/w",
        "per-layer projection": "per_layer_projection/w",
    },
}


def layer_of(tree, layout: str, number: int):
    return (
        tree["decoder"][f"layers_{number}"] if layout == "maxtext" else tree["layers"][f"{number}"]
    )


def pair_of(tree, layout: str, number: int, name: str):
    """The leaves of both matrices of a kernel; what is put into one is put into the tree."""
    *modules, kernel = KERNELS[layout][name].split("/")
    level = layer_of(tree, layout, number)
    for module in modules:
        level = level[module]
    return level[f"{kernel}_lora_a"], level[f"{kernel}_lora_b"]


def turned(pair):
    """Both matrices the wrong way round, the axes of an array behind those of another."""
    a, b = (leaf["value"] for leaf in pair)
    return np.moveaxis(b, 0, -1), np.moveaxis(a, -1, 0)


def put(pair, values) -> None:
    for leaf, value in zip(pair, values, strict=True):
        leaf["value"] = value


def failing(adapter: Path, tree, native: Path, tmp_path: Path) -> set[tuple[int, str]]:
    """The layers and parts that are wrong, of a check that fails."""
    options = ("--native-base", native, "--alpha", ALPHA, "--tokens", TOKENS, "--json")
    code, output, _ = said("logit-check", adapter, saved(tmp_path / "wrong", tree), *options)
    report = json.loads(output)
    assert code == 1 and not report["passed"]
    return {
        (part["layer"], part["part"]) for part in report["local"]["parts"] if not part["passed"]
    }


@pytest.mark.parametrize("layout", ITEMS)
def test_mistakes_are_found_where_they_are(model, converted, tmp_path, layout):
    adapter = save(tmp_path / "adapter", model, as_both_have_it(model, layout))
    tree = tree_of(adapter, tmp_path / "out", layout)

    def pair(number, name):
        return pair_of(tree, layout, number, name)

    put(pair(0, "out"), turned(pair(0, "queries")))  # fits, the wrong way
    put(pair(1, "keys"), [leaf["value"] for leaf in pair(2, "keys")])
    pair(2, "gate")[1]["value"] = pair(2, "up")[1]["value"]
    pair(3, "down")[1]["value"] = pair(3, "down")[1]["value"] * (RANK / ALPHA)
    pair(4, "queries")[1]["value"] = pair(4, "queries")[1]["value"][:, ::-1]
    wrong = {
        (0, "output projection"),
        (1, "keys"),
        (2, "dense MLP"),
        (3, "dense MLP"),
        (4, "queries"),
    }
    if layout == "tunix":
        b = pair(3, "keys")[1]["value"]  # [rank, keys and values, heads, head_dim]
        pair(3, "keys")[1]["value"] = b[:, [1, 1]]
        heads = pair(5, "keys that are values")[1]
        heads["value"] = heads["value"][:, ::-1]
        wrong |= {(1, "values"), (3, "keys"), (5, "keys"), (5, "values")}
    assert failing(adapter, tree, converted(model, layout), tmp_path) == wrong


def test_per_layer_embeddings_and_keys_that_nothing_reads(shallow, converted, tmp_path):
    model = shallow("e2b")
    adapter = save(tmp_path / "adapter", model, as_both_have_it(model, "tunix"))
    tree = tree_of(adapter, tmp_path / "out", "tunix")
    gate, projection = (
        pair_of(tree, "tunix", 0, f"per-layer {name}") for name in ("gate", "projection")
    )
    swapped = turned(projection), turned(gate)
    put(gate, swapped[0])
    put(projection, swapped[1])
    last = SHALLOW["e2b"] - 1  # it takes the keys and values of layer 4
    taken = layer_of(tree, "tunix", 4)["attn"]["kv_einsum"]
    layer_of(tree, "tunix", last)["attn"]["kv_einsum"] = taken
    assert failing(adapter, tree, converted(model, "tunix"), tmp_path) == {
        (0, "per-layer gate"),
        (0, "per-layer projection"),
    }


def test_another_alpha_is_found(adapter, native, tmp_path):
    to_native(adapter, tmp_path / "out")
    options = {"native_base": native, "tokens": 5, "whole_model": True}
    assert logit_check(adapter, tmp_path / "out", **options).passed
    found = logit_check(adapter, tmp_path / "out", alpha=ALPHA * RANK**0.5, **options)
    assert not found.passed and found.divergence.kl_max > 1e-3


def test_a_rounded_adapter_proves_nothing(adapter, native, tmp_path):
    to_native(adapter, tmp_path / "out", dtype="bfloat16")
    report = logit_check(adapter, tmp_path / "out", native_base=native, tokens=5, whole_model=True)
    assert report.lossy_rows and not report.proof and report.limit > 1e-3


@pytest.mark.parametrize("whole", [False, True])
def test_merged_with_experts(shallow, tmp_path, whole):
    model = shallow("26b-a4b")
    found = matrices(model, ("q_proj", "down_proj")) | expert_matrices(model)
    targets = {"target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}
    source = save(tmp_path / "adapter", model, found, **targets)
    to_native(source, tmp_path / "out", merge=True, scan_layers=True)
    report = logit_check(source, tmp_path / "out", tokens=TOKENS, whole_model=whole)
    assert report.passed and report.divergence.kl_max < 1e-6
    assert any("merged into" in warning for warning in report.warnings)
    if not whole:
        to_hf(tmp_path / "out", tmp_path / "hf")
        exported = logit_check(source, tmp_path / "hf", tokens=TOKENS)
        assert exported.passed and exported.divergence.kl_max == 0
        other = save(tmp_path / "other", model, found, lora_alpha=ALPHA + 1, **targets)
        assert not logit_check(other, tmp_path / "out", tokens=TOKENS).passed


def test_the_reference_is_that_of_weights_merged_by_hand(adapter, model, tmp_path):
    """Without `merged` nothing is rounded, and the weight is what PEFT multiplies by."""
    from contextlib import ExitStack

    from gemma_convert.logits.changes import adapter_changes
    from gemma_convert.logits.reference import Reference

    with ExitStack() as stack:
        changes = stack.enter_context(adapter_changes(model, adapter, merged=False))
        state = Reference(model, changes)._model.state_dict()
        plain = Reference(model)._model.state_dict()
    found = matrices(model)
    for name, before in plain.items():
        module, wanted = name.removesuffix(".weight"), before.double().numpy()
        if f"{module}.lora_A.weight" in found:
            a, b = (found[f"{module}.lora_{letter}.weight"].astype(float) for letter in "AB")
            wanted = wanted + ALPHA / RANK * (b @ a)
        assert np.array_equal(state[name].numpy(), wanted.astype(np.float32)), name


def test_layer_by_layer_is_the_whole_model(adapter, model):
    from gemma_convert.logits.changes import adapter_changes
    from gemma_convert.logits.layerwise import LayerwiseReference

    sequence = TokenSequence("tokens", tuple(range(5, 12)), None)
    with adapter_changes(model, adapter, merged=False) as changes:
        whole = next(TransformersLogits(model, [sequence], changes).slices(0, 7))
        staged = LayerwiseReference(model, [sequence], changes)
        *_, _ = staged.stages()
        logits = np.concatenate([*staged.logits([slice(0, whole.shape[1])])], axis=-1)
    assert np.allclose(logits, whole[np.flatnonzero(sequence.compared)], atol=2e-5)


# A kernel with matrices.


@pytest.mark.parametrize(
    ("equation", "kernel", "inputs"),
    [("ble,ehd->blhd", (4, 2, 3), 1), ("blhd,hde->ble", (2, 3, 4), 2), ("ble,em->blm", (4, 4), 1)],
)
def test_an_adapted_kernel_is_the_merged_one(equation, kernel, inputs):
    random = np.random.default_rng(0)
    weight = random.normal(size=kernel).astype(np.float32)
    of_x = equation.partition(",")[0]
    length = dict(zip(equation.split(",")[1], kernel, strict=False)) | {"b": 2, "l": 5}
    x = random.normal(size=[length[axis] for axis in of_x]).astype(np.float32)
    size = int(np.prod(kernel[:inputs]))
    a = random.normal(size=(size, 3)).astype(np.float32)
    b = random.normal(size=(3, weight.size // size)).astype(np.float32)
    merged = weight + 0.5 * (a @ b).reshape(kernel)
    adapted = AdaptedKernel(jax.numpy.asarray(weight), a, b, 0.5, "kernel")
    found = product(equation, jax.numpy.asarray(x), adapted)
    assert np.allclose(found, product(equation, jax.numpy.asarray(x), merged), atol=1e-5)
    swapped = AdaptedKernel(jax.numpy.asarray(weight), b.T, a.T, 0.5, "kernel")
    if len(kernel) == 2:  # it fits, and is another matrix
        other = product(equation, jax.numpy.asarray(x), swapped)
        assert not np.allclose(other, found, atol=0.1)
    else:
        with pytest.raises(SourceError, match="do not fit the array"):
            product(equation, jax.numpy.asarray(x), swapped)


def test_an_adapted_kernel_of_keys_and_values():
    """Its input is in the middle of its axes, and B has those before and behind it."""
    random = np.random.default_rng(0)
    shapes = (2, 3, 4, 5), (4, 2), (2, 2, 3, 5), (1, 6, 4)
    weight, a, b, x = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    merged = weight + 0.5 * np.einsum("er,rckd->cked", a, b)

    def made(b):
        adapted = AdaptedKernel(jax.numpy.asarray(weight), a, b, 0.5, "kernel")
        return product("ble,cked->cblkd", jax.numpy.asarray(x), adapted)

    assert np.allclose(made(b), np.einsum("ble,cked->cblkd", x, merged), atol=1e-5)
    assert np.array_equal(made(b), made(b.reshape(2, 30)))
    with pytest.raises(SourceError, match="do not fit the array"):
        made(b.swapaxes(1, 2))


# Messages.


def test_matrices_that_the_model_has_no_kernels_for(adapter, native, model, shallow, tmp_path):
    tree = tree_of(adapter, tmp_path / "out")
    options = {"native_base": native, "alpha": 6.0, "tokens": 3}
    extra = {**tree["decoder"], "layers_9": tree["decoder"]["layers_0"]}
    with pytest.raises(SourceError, match="arrays that its base model does not have") as caught:
        logit_check(adapter, saved(tmp_path / "extra", {"decoder": extra}), **options)
    assert "layer 9" in caught.value.found
    del tree["decoder"]["layers_0"]["mlp"]["wo"]["kernel_lora_b"]
    with pytest.raises(SourceError, match="lacks its partner"):
        logit_check(adapter, saved(tmp_path / "part", tree), **options)
    matrix = tree["decoder"]["layers_1"]["mlp"]["wo"]["kernel_lora_a"]
    matrix["value"] = matrix["value"][:-1]
    del tree["decoder"]["layers_0"]
    message = fails(
        3,
        *("logit-check", adapter, saved(tmp_path / "short", tree)),
        *("--native-base", native, "--alpha", 6, "--tokens", 3),
    )
    assert "do not fit the array" in message and "mlp/wo/kernel" in message


def test_matrices_that_tunix_does_not_add_so(shallow, converted, tmp_path):
    model = shallow("26b-a4b")
    adapter = save(tmp_path / "adapter", model, matrices(model, ("q_proj",)))
    tree = tree_of(adapter, tmp_path / "out", "tunix")
    options = {"native_base": converted(model, "tunix"), "alpha": 6.0, "tokens": 3}
    pair = tree["layers"]["0"]["attn"]["q_einsum"]
    tree["embedder"] = {"per_layer_model_projection": pair}
    with pytest.raises(SourceError, match="belong to no single layer") as caught:
        logit_check(adapter, saved(tmp_path / "outside", tree), **options)
    assert caught.value.found == "embedder/per_layer_model_projection/w"
    del tree["embedder"]
    for name, array in (("moe", "linear"), ("pre_ffw_norm", "scale")):
        both = {f"{array}_lora_{letter}": pair[f"w_lora_{letter}"] for letter in "ab"}
        changed = {"layers": {"0": {name: both}}}
        with pytest.raises(SourceError, match="that no adapter changes") as caught:
            logit_check(adapter, saved(tmp_path / name, changed), **options)
        assert caught.value.found == f"layer 0, {name}/{array}"


def test_which_sides_there_are(adapter, model, native, converted, tmp_path):
    from contextlib import ExitStack

    to_native(adapter, tmp_path / "out")
    out, fast = tmp_path / "out", converted(model, "fast-llm")
    tree = nested_tree(out / "0" / "items")
    bare = saved(tmp_path / "bare", tree)
    cases = [
        ((model, out, {}), "compared with the adapter of PEFT"),
        ((model, native, {"base": model}), "`base` is for adapters"),
        ((model, native, {"native_base": model}), "`native_base` is for adapters"),
        ((adapter, native, {"native_base": native}), "are for a native adapter"),
        ((adapter, out, {"native_base": fast}), "checkpoint of its own layout"),
        ((adapter, out, {"native_base": model}), "put on a native checkpoint"),
        ((adapter, out, {"native_base": native, "alpha": -1.0}), "positive number"),
        (
            (adapter, out, {"native_base": native, "golden": tmp_path / "g", "tokens": None}),
            "those of a model",
        ),
    ]
    for (hf, other, options), words in cases:
        with pytest.raises(UsageError, match=words):
            logit_check(hf, other, **{"tokens": 3, **options})
    for (hf, other, options), words in (
        ((adapter, out, {}), "on the native checkpoint of its base model"),
        ((adapter, bare, {"native_base": native}), "no alpha"),
        ((native, model, {}), f"is a maxtext checkpoint[\\s\\S]*logit-check {model} {native}"),
        ((out, adapter, {}), f"is a maxtext checkpoint[\\s\\S]*logit-check {adapter} {out}"),
    ):
        with pytest.raises(SourceError, match=words):
            logit_check(hf, other, **{"tokens": 3, **options})
    with ExitStack() as stack:
        sides = sides_of(adapter, out, AdapterOptions(model, native), stack)
        assert (sides.hf, sides.native, sides.warnings) == (model, native, ())
    flipped = out / "hf" / "adapter_config.json"
    flipped.write_text(json.dumps(json.loads(flipped.read_text()) | {"r": 4}))
    with pytest.raises(SourceError, match=r"not what was|damaged|changed"):
        logit_check(adapter, out, native_base=native, tokens=3)
