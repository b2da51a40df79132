"""Fast-LLM's forward pass equals transformers, and a wrong value, key or tensor shows."""

import copy
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import yaml
from fast_llm_by_hand import WEIGHTS, fast_llm_metadata, fast_llm_tensors, write_fast_llm
from maxtext_trees import CONFIGS, logits_of, make_model
from models import A4B, DENSE, load_architecture
from safetensors.numpy import load_file, save_file

from gemma_convert.errors import SourceError
from gemma_convert.layouts.fast_llm import forward as fast_llm
from gemma_convert.layouts.fast_llm import forward_config as fast_llm_config
from gemma_convert.layouts.fast_llm.forward import FastLLM
from gemma_convert.layouts.fast_llm.forward_config import MAX_BYTES, read_fast_llm_config
from gemma_convert.layouts.fast_llm.stored import shapes
from gemma_convert.logits.divergence import compare
from gemma_convert.model.config import parse_architecture, read_architecture

LENGTH = 23
LIMIT = 1e-5
BASE = "config.base_model"
SLIDING = f"{BASE}.decoder.blocks.sliding_attention"
FULL = f"{BASE}.decoder.blocks.full_attention"
COUNTING = (
    "epsilon",
    "router_input_scale",
    "embedding_scale",
    "theta",
    "final_logit_softcap",
    "partial_rotary_factor",
)
OPTIONAL = ("window_size", "shared_key_value", "dropout", "zero_centered", "peft")


def at(tree, path):
    """The mapping that holds the last key of a dotted path, and that key."""
    *outer, last = path.split(".")
    for key in outer:
        tree = tree[key]
    return tree, last


def changed(metadata, changes):
    """A copy with the values at dotted paths replaced; None in place of a value removes the key."""
    new = copy.deepcopy(metadata)
    for path, value in changes.items():
        below, key = at(new, path)
        if value is None:
            del below[key]
        else:
            below[key] = value(below[key]) if callable(value) else value
    return new


def leaves(tree, path):
    """Dotted path of every value below `path` that is no mapping."""
    below, key = at(tree, path)
    if isinstance(below[key], dict):
        for name in below[key]:
            yield from leaves(tree, f"{path}.{name}")
    else:
        yield path


def largest_kl(reference, found):
    vocab = reference.shape[-1]
    found = np.asarray(found)
    return compare(reference.reshape(-1, vocab), found.reshape(-1, vocab)).kl.max()


def set_apart(model, metadata):
    """Another epsilon for every norm, and other scales, in transformers' model and the metadata.

    So that no norm, no scale and no kind of layer can stand for another.
    """
    fresh = iter(np.random.default_rng(3).permutation(np.linspace(0.02, 0.5, 64)).tolist())
    kinds = model.config.layer_types
    mixed = "router" in dict(model.model.layers[0].named_children())
    for kind in sorted(set(kinds)):
        block = metadata["config"]["base_model"]["decoder"]["blocks"][kind]
        layers = [
            layer for layer, its in zip(model.model.layers, kinds, strict=True) if its == kind
        ]
        places = {
            "input_layernorm": block["normalization"],
            "post_attention_layernorm": block["post_mixer_normalization"],
            "post_feedforward_layernorm": block["post_mlp_normalization"],
            "self_attn.q_norm": block["mixer"]["query_norm"],
            "self_attn.k_norm": block["mixer"]["key_norm"],
            "self_attn.v_norm": block["mixer"]["value_norm"],
        }
        if mixed:
            routed = block["mlp"]["routed"]
            places |= {
                "pre_feedforward_layernorm": block["mlp"]["dense"]["pre_norm"],
                "post_feedforward_layernorm_1": block["mlp"]["dense"]["post_norm"],
                "pre_feedforward_layernorm_2": routed["pre_norm"],
                "post_feedforward_layernorm_2": routed["post_norm"],
                "router.norm": routed["router_normalization"],
            }
            routed["router_input_scale"] = next(fresh)
            for layer in layers:
                layer.router.scalar_root_size = routed["router_input_scale"]
        else:
            places["pre_feedforward_layernorm"] = block["pre_mlp_normalization"]
        for name, norm in places.items():
            norm["epsilon"] = next(fresh)
            for layer in layers:
                layer.get_submodule(name).eps = norm["epsilon"]
    base = metadata["config"]["base_model"]
    model.model.norm.eps = base["head"]["normalization"]["epsilon"] = next(fresh)
    base["embeddings"]["embedding_scale"] = 5.0
    model.model.embed_tokens.embed_scale.fill_(5.0)


class Case:
    """One small model of transformers in Fast-LLM's layout, with its ids and reference logits.

    The dense one uses keys as values in its full layers; in the other they have their own.
    """

    def __init__(self, kind, root):
        config = dict(CONFIGS[kind])
        if kind == "moe":
            config |= {"attention_k_eq_v": False}
        self.model = make_model_of(config)
        architecture = parse_architecture(self.model.config.to_dict(), Path("config.json"))
        hf = {name: value.float().numpy() for name, value in self.model.state_dict().items()}
        self.tensors = fast_llm_tensors(hf, architecture)
        self.metadata = fast_llm_metadata(architecture)
        set_apart(self.model, self.metadata)
        self.ids = np.random.default_rng(5).integers(3, 94, (2, LENGTH))
        self.logits = logits_of(self.model, self.ids)
        self.root = root / kind
        self.folder = self.write("right")

    def write(self, name, changes=None, tensors=None):
        metadata = changed(self.metadata, changes or {})
        return write_fast_llm(self.root / name, tensors or self.tensors, metadata)

    def kl(self, folder):
        """Largest KL over all tokens of a run of another checkpoint."""
        return largest_kl(self.logits, FastLLM(folder).forward(self.ids))


def make_model_of(config):
    """`make_model` with a config of its own."""
    from unittest import mock

    with mock.patch.dict(CONFIGS, {"this": config}):
        return make_model("this")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("fast_llm")
    return {kind: Case(kind, root) for kind in ("dense", "moe")}


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_forward_is_that_of_transformers(cases, kind):
    case = cases[kind]
    found = FastLLM(case.folder).forward(case.ids)
    assert found.dtype == torch.float32 and found.shape == (2, LENGTH, 94)
    np.testing.assert_allclose(found.cpu(), case.logits, atol=1e-4, rtol=0)
    assert largest_kl(case.logits, found.cpu()) < 1e-8
    assert case.logits.std() > 0.5  # logits that are all alike would prove nothing


MODELS = ("26b-a4b", "31b")


@pytest.mark.parametrize("family", MODELS)
def test_tiny_checkpoints_give_the_logits_of_transformers(tiny, family, tmp_path):
    from transformers import Gemma4ForConditionalGeneration

    hf = tiny(family)
    architecture = read_architecture(hf)
    tensors = fast_llm_tensors(hf_tensors(hf), architecture)
    assert {value.dtype for value in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    metadata = fast_llm_metadata(architecture)
    native = FastLLM(write_fast_llm(tmp_path, tensors, metadata))
    assert native.stored_dtypes == {"bfloat16"}
    model = Gemma4ForConditionalGeneration.from_pretrained(hf, dtype=torch.float32).eval()
    length = 2 * architecture.text.window + 5
    ids = np.random.default_rng(7).integers(3, architecture.text.vocab, (2, length))
    assert largest_kl(logits_of(model, ids), native.forward(ids).cpu()) <= 2e-6


@pytest.mark.parametrize("family", MODELS)
def test_by_hand_conversion_is_fast_llms_own_bit_for_bit(oracle, family):
    architecture = read_architecture(oracle / "hf" / family)
    ours = fast_llm_tensors(hf_tensors(oracle / "hf" / family), architecture)
    folder = oracle / "fast_llm" / family
    theirs = load_file(folder / WEIGHTS)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert value.astype(np.float32).tobytes() == theirs[name].tobytes(), name
    metadata = yaml.safe_load((folder / "metadata.yaml").read_text(encoding="utf-8"))
    assert set(metadata.pop("metadata")["state_index"]) == set(theirs)
    del metadata["config"]["distributed"]
    assert metadata | {"metadata": {}} == fast_llm_metadata(architecture)


@pytest.mark.parametrize("family", MODELS)
def test_fast_llms_own_checkpoints_give_its_own_logits(oracle, family):
    native = FastLLM(oracle / "fast_llm" / family)
    assert native.stored_dtypes == {"float32"}
    theirs = load_file(oracle / "logits" / f"transformers_{family}.safetensors")
    found = native.forward(theirs["input_ids"]).cpu().numpy()
    saved = load_file(oracle / "logits" / f"fast_llm_{family}.safetensors")["logits"]
    np.testing.assert_allclose(found, saved, atol=1e-4, rtol=0)
    assert largest_kl(theirs["logits"], found) <= 2e-6


def hf_tensors(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize(("name", "parameters"), [(A4B, 602), (DENSE, 722)])
def test_published_models_have_the_parameters_that_fast_llm_counts(tmp_path, name, parameters):
    metadata = fast_llm_metadata(load_architecture(name))
    config = read_fast_llm_config(write_fast_llm(tmp_path, {"a/weights": np.ones(1)}, metadata))
    assert len(dict(shapes(config))) == parameters


def test_batches_of_other_lengths_run_together(cases, monkeypatch):
    case = cases["moe"]
    native = FastLLM(case.folder)
    loaded, layer = [], native._layer
    monkeypatch.setattr(native, "_layer", lambda index: loaded.append(index) or layer(index))
    short, whole = native.final_hidden([case.ids[:1, :11].astype(np.int32), case.ids])
    assert loaded == list(range(6))
    assert short.shape == (1, 11, 44) and whole.shape == (2, LENGTH, 44)
    np.testing.assert_allclose(short[0].cpu(), whole[0, :11].cpu(), atol=1e-4)
    np.testing.assert_allclose(native.head(short).cpu(), case.logits[:1, :11], atol=1e-4)


def test_head_over_slices_is_the_whole(cases, monkeypatch):
    case = cases["dense"]
    native = FastLLM(case.folder)
    (hidden,) = native.final_hidden([case.ids])
    monkeypatch.setattr(fast_llm, "_VOCAB_SLICE", 25)
    parts = [native.head(hidden[:, start : start + 9]).cpu() for start in range(0, LENGTH, 9)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), case.logits, atol=1e-4)
    np.testing.assert_allclose(native.head(hidden[1, 4]).cpu(), case.logits[1, 4], atol=1e-4)


def test_router_weights_are_those_of_transformers(cases):
    case = cases["moe"]
    native = FastLLM(case.folder)
    hidden = torch.tensor(np.random.default_rng(1).normal(size=(9, 44)).astype(np.float32))
    with torch.no_grad():
        probabilities, weights, chosen = case.model.model.layers[1].router(hidden)
    facts = native.config.layers[1].mlp.routed
    found = fast_llm.router(native._layer(1), hidden.to(native.device), facts)
    shares = torch.zeros_like(probabilities).scatter(-1, chosen, weights)
    np.testing.assert_allclose(found.cpu(), shares, atol=1e-6)
    np.testing.assert_array_equal(found.cpu() != 0, shares != 0)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_bfloat16_is_as_near_as_that_of_transformers(cases, kind):
    case = cases[kind]

    def typical_kl(logits):
        # Not the mean: rounding sends a token of the mixture to another expert now and then.
        return np.median(compare(case.logits.reshape(-1, 94), logits.reshape(-1, 94)).kl)

    native = FastLLM(case.folder, "bfloat16")
    (hidden,) = native.final_hidden([case.ids])
    found = native.head(hidden)
    assert hidden.dtype == torch.bfloat16 and found.dtype == torch.float32
    theirs = logits_of(copy.deepcopy(case.model).to(torch.bfloat16), case.ids)
    assert 1e-5 < typical_kl(found.cpu().numpy()) < 2 * typical_kl(theirs)


def test_bfloat16_norms_are_float32_inside():
    x, weight = torch.randn(2, 50, 40, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = fast_llm.rms_norm(x, 1e-3, weight[0])
    expected = fast_llm.rms_norm(x.float(), 1e-3, weight[0].float()).bfloat16()
    assert torch.equal(found, expected) and found.dtype == torch.bfloat16


def test_bfloat16_head_rounds_its_table_and_not_its_logits(cases):
    case = cases["dense"]
    hidden = torch.randn(3, 40, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = FastLLM(case.folder, "bfloat16").head(hidden).cpu()
    table = torch.tensor(case.tensors["embeddings.word_embeddings_weight/weights"]).bfloat16()
    expected = 4.0 * torch.tanh(hidden.float() @ table.float().T / 4.0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_float32_products_are_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(SourceError):
            FastLLM(Path("nowhere"))
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_device_is_named(cases):
    native = FastLLM(cases["dense"].folder)
    cuda = torch.cuda.is_available()
    assert native.device.type == ("cuda" if cuda else "cpu")
    assert native.device_name == (torch.cuda.get_device_name(0) if cuda else "cpu")


@pytest.mark.parametrize("wrong", [-1, 94])
def test_token_ids_outside_the_vocabulary_are_refused(cases, wrong):
    with pytest.raises(SourceError, match=r"ids from 0 to 93"):
        FastLLM(cases["dense"].folder).forward(np.array([[5, wrong]]))


def test_every_epsilon_and_scale_of_the_metadata_counts(cases, read):
    """Each by itself, in either kind of layer; the reference has the same odd values."""
    natives = {kind: FastLLM(case.folder) for kind, case in cases.items()}
    for kind, case in cases.items():
        native = natives[kind]
        paths = [path for path in leaves(case.metadata, BASE) if path.endswith(COUNTING)]
        assert len(paths) == {"dense": 20, "moe": 30}[kind]
        for path in paths:
            index = {"metadata": {"state_index": native.config.state_index}}
            factor = 100 if path.endswith("epsilon") else 0.5
            native.config = read(case, index | {path: lambda value, by=factor: value * by})
            found = native.forward(case.ids).cpu()
            assert largest_kl(case.logits, found) > LIMIT, path


def write_metadata(folder, case, changes=None):
    """metadata.yaml alone, with a full state_index unless `changes` has another."""
    index = {"metadata": {"state_index": dict.fromkeys(case.tensors, WEIGHTS)}}
    metadata = changed(case.metadata, index | (changes or {}))
    (folder / "metadata.yaml").write_text(yaml.safe_dump(metadata), encoding="utf-8")
    return folder


# Values that Fast-LLM would take without a word, each wrong once.
WRONG_VALUES = {
    "window one too long": ("dense", {f"{SLIDING}.mixer.window_size": 8}),
    "window one too short": ("dense", {f"{SLIDING}.mixer.window_size": 6}),
    "no window": ("dense", {f"{SLIDING}.mixer.window_size": None}),
    "window on full layers": ("dense", {f"{FULL}.mixer.window_size": 7}),
    "full layers rotate all pairs": (
        "dense",
        {f"{FULL}.mixer.rotary": {"type": "default", "theta": 1_000_000.0}},
    ),
    "sliding layers rotate a quarter": (
        "dense",
        {
            f"{SLIDING}.mixer.rotary": {
                "type": "proportional",
                "theta": 10_000.0,
                "partial_rotary_factor": 0.25,
            }
        },
    ),
    "bases of rotation swapped": (
        "dense",
        {f"{SLIDING}.mixer.rotary.theta": 1e6, f"{FULL}.mixer.rotary.theta": 1e4},
    ),
    "no soft cap": ("dense", {f"{BASE}.head.final_logit_softcap": lambda _: None}),
    "one expert too many": ("moe", {f"{SLIDING}.mlp.routed.experts_per_token": 3}),
    "one expert too few": ("moe", {f"{FULL}.mlp.routed.experts_per_token": 1}),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_wrong_value_shows(cases, name, tmp_path):
    kind, changes = WRONG_VALUES[name]
    assert cases[kind].kl(cases[kind].write(f"wrong {name}", changes)) > 10 * LIMIT


def test_keys_shared_by_mistake_show(cases):
    """Four shared groups have as many rows of key_value as two groups of keys and of values."""
    case = cases["dense"]
    groups = {f"{SLIDING}.mixer.head_groups": 4, f"{SLIDING}.mixer.shared_key_value": True}
    assert case.kl(case.write("shared", groups)) > 10 * LIMIT
    groups = {f"{FULL}.mixer.head_groups": 1, f"{FULL}.mixer.shared_key_value": False}
    with pytest.raises(
        SourceError, match=r"key_value.weight/weights is \[16, 40\] instead of \[32"
    ):
        FastLLM(case.write("not shared", groups))


def rolled(axis):
    return lambda value: np.roll(value, 1, axis=axis)


def halves(value):
    return np.concatenate(np.split(value, 2)[::-1])


def transposed_in_place(value):
    return np.ascontiguousarray(value.T).reshape(value.shape)


L1, L2 = "decoder.1", "decoder.2"
LAST = "decoder.5"
MISTAKES = {
    "gate and up swapped": ("dense", f"{L1}.mlp.layer_1.weight", halves),
    "gate and up interleaved": (
        "dense",
        f"{L1}.mlp.layer_1.weight",
        lambda value: value.reshape(2, -1, 40).swapaxes(0, 1).reshape(-1, 40),
    ),
    "keys and values swapped": ("dense", f"{L1}.mixer.key_value.weight", halves),
    "keys and values by head": (
        "dense",
        f"{L1}.mixer.key_value.weight",
        lambda value: value.reshape(2, 2, 12, 40).swapaxes(0, 1).reshape(-1, 40),
    ),
    "down projection not transposed": (
        "dense",
        f"{L1}.mlp.layer_2.weight",
        transposed_in_place,
    ),
    "heads shifted": ("dense", f"{L1}.mixer.query.weight", lambda value: np.roll(value, 12, 0)),
    "output heads shifted": ("dense", f"{L2}.mixer.dense.weight", rolled(1)),
    "a layer's scale lost": ("dense", f"{L2}.output_scale", np.ones_like),
    "the last layer's scale lost": ("dense", f"{LAST}.output_scale", np.ones_like),
    "rows of the embedding shifted": ("dense", "embeddings.word_embeddings_weight", rolled(0)),
    "the final norm lost": ("dense", "head.final_norm.weight", np.ones_like),
    "experts' gate and up swapped": (
        "moe",
        f"{L1}.mlp.routed.layer_1.weight",
        lambda value: value.reshape(5, 2, 20, 44)[:, ::-1].reshape(-1, 44),
    ),
    "experts inside gate and up": (
        "moe",
        f"{L1}.mlp.routed.layer_1.weight",
        lambda value: value.reshape(5, 2, 20, 44).swapaxes(0, 1).reshape(-1, 44),
    ),
    "experts shifted": (
        "moe",
        f"{L1}.mlp.routed.layer_2.weight",
        lambda value: np.roll(value, 20, axis=0),
    ),
    "experts not transposed": (
        "moe",
        f"{L1}.mlp.routed.layer_2.weight",
        lambda value: value.reshape(5, 20, 44).swapaxes(1, 2).reshape(-1, 44),
    ),
    "router's scale lost": ("moe", f"{L1}.mlp.routed.router_scale", np.ones_like),
    "experts' scale lost": ("moe", f"{L1}.mlp.routed.router_per_expert_scale", np.ones_like),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_conversion_mistake_shows(cases, name):
    kind, tensor, mistake = MISTAKES[name]
    case = cases[kind]
    value = np.ascontiguousarray(mistake(case.tensors[f"{tensor}/weights"]))
    tensors = case.tensors | {f"{tensor}/weights": value}
    assert case.kl(case.write(f"mistake {name}", tensors=tensors)) > 10 * LIMIT


@pytest.mark.share(2, 1)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_every_norm_counts_with_its_weight(cases, kind):
    case = cases[kind]
    for index in (1, 2):
        names = [name for name in case.tensors if f".{index}." in name and "norm" in name]
        assert len(names) == {"dense": 6, "moe": 9}[kind]
        for name in names:
            lost = case.tensors | {name: np.ones_like(case.tensors[name])}
            assert case.kl(case.write("norm lost", tensors=lost)) > LIMIT, name


def test_nan_in_a_weight_fails_the_comparison(cases):
    case = cases["dense"]
    name = f"{L1}.mixer.query.weight/weights"
    value = case.tensors[name].copy()
    value[3, 5] = np.nan
    assert not case.kl(case.write("nan", tensors=case.tensors | {name: value})) <= LIMIT


# The metadata: nothing that counts may be missing, unknown or of another type.


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@pytest.fixture
def read(monkeypatch):
    """read(case, changes): the facts of changed metadata that is not written to a file first."""

    def read_changed(case, changes):
        index = {"metadata": {"state_index": {"a/weights": WEIGHTS}}}
        metadata = changed(case.metadata, index | changes)
        monkeypatch.setattr(fast_llm_config, "read_yaml", lambda *_: metadata)
        monkeypatch.setattr(Path, "is_file", lambda _: True)
        return read_fast_llm_config(Path("folder"))

    return read_changed


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_missing_key_of_the_model_is_named(cases, kind, read):
    case = cases[kind]
    paths = list(leaves(case.metadata, BASE))
    assert len(paths) > 70
    mappings = {path.rpartition(".")[0] for path in paths} - {BASE}
    for path in sorted({*paths, *mappings}):
        if path.rpartition(".")[2] in OPTIONAL:
            read(case, {path: None})
            continue
        name = path.replace(".", r"\.")
        with pytest.raises(SourceError, match=f"lacks `{name}`; .* another default in silence"):
            read(case, {path: None})


def test_unknown_key_of_the_model_is_refused(cases, read):
    for case in cases.values():
        paths = {path.rpartition(".")[0] for path in leaves(case.metadata, BASE)}
        assert len(paths) > 20
        for path in sorted(paths):
            where = rf"{path}\n  found: 'novelty'".replace(".", r"\.")
            with pytest.raises(SourceError, match=where):
                read(case, {path: lambda below: below | {"novelty": 1}})


def test_keys_outside_the_model_are_let_pass(cases, folder):
    case = cases["dense"]
    outside = {
        "config": lambda config: config | {"distributed": {"seed": 3}, "peft": {"type": "none"}},
        "metadata.run": {"steps": 4},
    }
    write_metadata(folder, case, outside)
    found = read_fast_llm_config(folder)
    write_metadata(folder, case)
    assert read_fast_llm_config(folder) == found


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_value_of_another_type_is_refused(cases, kind, read):
    case = cases[kind]
    for path in leaves(case.metadata, BASE):
        below, key = at(case.metadata, path)
        wrong = 1 if isinstance(below[key], bool) else True
        for value in (wrong, "1e-06", [1], {"a": 1}):
            with pytest.raises(SourceError, match="not that of a Gemma 4"):
                read(case, {path: value})


REFUSED = {
    "model": "mamba",
    "format": "llama",
    "shards": ["weights", "optimizer"],
    "fast_llm_version": "",
    "config.type": "multimodal",
    f"{BASE}.peft": {"type": "lora"},
    f"{BASE}.hidden_size": -40,
    f"{BASE}.embeddings.vocab_size": 2**31,
    f"{BASE}.embeddings.embedding_scale": 0.0,
    f"{BASE}.head.normalization.zero_centered": True,
    f"{BASE}.head.normalization.epsilon": float("inf"),
    f"{BASE}.head.final_logit_softcap": float("nan"),
    f"{BASE}.decoder.type": "fixed",
    f"{BASE}.decoder.num_blocks": 10**9,
    f"{BASE}.decoder.pattern": ["sliding_attention", "full_attention"],
    f"{BASE}.decoder.blocks": lambda blocks: blocks | {"local": blocks["sliding_attention"]},
    f"{SLIDING}.type": "mamba",
    f"{SLIDING}.output_scale.enabled": False,
    f"{SLIDING}.output_scale.lr_scale": 1.0,
    f"{SLIDING}.normalization.type": "layer_norm",
    f"{SLIDING}.pre_mlp_normalization": {"type": "none"},
    f"{SLIDING}.mixer.type": "gdn",
    f"{SLIDING}.mixer.add_linear_biases": True,
    f"{SLIDING}.mixer.softmax_scale_power": 0.5,
    f"{SLIDING}.mixer.dropout": 0.1,
    f"{SLIDING}.mixer.heads": 10**400,
    f"{SLIDING}.mixer.head_groups": 3,
    f"{SLIDING}.mixer.head_size": 11,
    f"{SLIDING}.mixer.window_size": 0,
    f"{SLIDING}.mixer.value_norm.type": "rms_norm",
    f"{SLIDING}.mixer.query_norm.type": "fixed_rms_norm",
    f"{SLIDING}.mixer.rotary.type": "llama3",
    f"{SLIDING}.mixer.rotary.theta": 10**400,
    f"{FULL}.mixer.rotary.partial_rotary_factor": 1.5,
    f"{FULL}.mixer.rotary.type": "default",
    f"{SLIDING}.mlp.type": "moe",
    f"{SLIDING}.mlp.activation": "silu",
    f"{SLIDING}.mlp.gated": False,
    f"{SLIDING}.mlp.add_linear_biases": True,
}
REFUSED_OF_MIXTURES = {
    f"{SLIDING}.pre_mlp_normalization": {"type": "rms_norm", "epsilon": 1e-6},
    f"{SLIDING}.mlp.dense.type": "moe",
    f"{SLIDING}.mlp.dense.activation": "silu",
    f"{SLIDING}.mlp.dense.post_norm.type": "none",
    f"{SLIDING}.mlp.routed.type": "mlp",
    f"{SLIDING}.mlp.routed.gated": False,
    f"{SLIDING}.mlp.routed.experts_per_token": 6,
    f"{SLIDING}.mlp.routed.router_scale.enabled": False,
    f"{SLIDING}.mlp.routed.router_per_expert_scale.enabled": False,
    f"{SLIDING}.mlp.routed.router_normalization.type": "rms_norm",
    f"{SLIDING}.mlp.routed.router_input_scale": -1.0,
}


def test_unsupported_value_is_refused(cases, read):
    for kind, refused in (("dense", REFUSED), ("moe", REFUSED_OF_MIXTURES)):
        read(cases[kind], {})
        for path, value in refused.items():
            with pytest.raises(SourceError, match=r"metadata\.yaml, ") as caught:
                read(cases[kind], {path: value})
            assert path.rpartition(".")[0] in caught.value.where
            assert len(caught.value.message) < 600


@pytest.mark.parametrize(
    "key", ["model", "format", "shards", "fast_llm_version", "config", "metadata"]
)
def test_missing_key_at_the_top_is_named(cases, folder, key):
    write_metadata(folder, cases["dense"], {key: None})
    with pytest.raises(SourceError, match=f"lacks `{key}`"):
        read_fast_llm_config(folder)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefghij", "bcdefghijk", strict=True)
)
BROKEN = {
    "nothing": b"",
    "a list": b"- 1\n",
    "no YAML": b"model: [gpt\n",
    "two documents": b"model: gpt\n---\nmodel: gpt\n",
    "no UTF-8": "modèle: gpt\n".encode("latin-1"),
    "control characters": b"model: \x00\x07\n",
    "an object": b"!!python/object/apply:os.system ['true']\n",
    "deep": b"[" * 100_000,
    "deep blocks": b"a: " + b"{a: " * 5000 + b"}" * 5000,
    "large": b"#" * (MAX_BYTES + 1),
    "thousands of digits": b"model: " + b"9" * 10_000 + b"\n",
    "thousands of hex digits": b"model: 0x" + b"f" * 10_000 + b"\n",
    "a lie about a type": b"model: !!bool maybe\n",
    "an empty number": b"model: !!int ''\n",
    "no date": b"model: !!timestamp never\n",
    "an endless angle": b"model: " + b"1:" * 200 + b"1.5\n",
    "aliases of aliases": (BOMB + "model: *k\n").encode(),
    "aliases as a key": (BOMB + "config: {base_model: *k}\n").encode(),
    "merges": b"a: &a {k: 1}\nmodel: {<<: [*a, *a]}\n",
    "a list of itself": b"model: &a [*a]\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_metadata_is_refused_in_few_words(folder, name):
    (folder / "metadata.yaml").write_bytes(BROKEN[name])
    with pytest.raises(SourceError) as caught:
        read_fast_llm_config(folder)
    assert len(caught.value.message) < 1000 and "metadata.yaml" in caught.value.message
    assert {"large": "too large", "merges": "merging"}.get(name, "") in caught.value.message


def test_no_metadata_is_named(folder):
    with pytest.raises(SourceError, match=r"not a Fast-LLM checkpoint(?s:.*)metadata\.yaml"):
        read_fast_llm_config(folder)
    (folder / "metadata.yaml").mkdir()
    with pytest.raises(SourceError, match="not a Fast-LLM checkpoint"):
        read_fast_llm_config(folder)


def test_aliases_that_repeat_a_norm_are_read(cases, folder):
    """PyYAML writes them where one dict stands in several places."""
    case = cases["dense"]
    norm = {"type": "rms_norm", "epsilon": 0.25}
    paths = [f"{SLIDING}.normalization", f"{SLIDING}.post_mlp_normalization"]
    write_metadata(folder, case, dict.fromkeys(paths, norm))
    assert "&id" in (folder / "metadata.yaml").read_text()
    block = read_fast_llm_config(folder).layers[0]
    assert block.pre_mixer_epsilon == block.post_mlp_epsilon == 0.25


# The tensors: all of them, no others, where state_index says.


@pytest.mark.parametrize(
    "file", ["", ".", "..", "a/b", "/etc/passwd", "../model_0.safetensors", "a\\b", "a\0b", 3, None]
)
def test_state_index_names_plain_files_only(cases, folder, file):
    case = cases["dense"]
    index = dict.fromkeys(case.tensors, WEIGHTS) | {next(iter(case.tensors)): file}
    write_metadata(folder, case, {"metadata": {"state_index": index}})
    with pytest.raises(SourceError, match="state_index"):
        read_fast_llm_config(folder)


@pytest.mark.parametrize("index", [{}, [WEIGHTS], {3: WEIGHTS}, "model_0.safetensors"])
def test_state_index_is_a_mapping_of_names(cases, folder, index):
    write_metadata(folder, cases["dense"], {"metadata": {"state_index": index}})
    with pytest.raises(SourceError, match=r"metadata\.state_index"):
        read_fast_llm_config(folder)


QUERY = f"{L1}.mixer.query.weight/weights"


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_another(name, value):
    return lambda tensors: tensors | {name: value}


WRONG_TENSORS = {
    "missing": (without(QUERY), r"mixer\.query\.weight/weights is missing instead of \[48, 40\]"),
    "tied head": (
        with_another("head.output_weights/weights", np.ones((94, 40), np.float32)),
        r"head\.output_weights/weights is not a parameter",
    ),
    "layer too many": (
        with_another("decoder.6.output_scale/weights", np.ones(1, np.float32)),
        r"decoder\.6\.output_scale/weights is not a parameter",
    ),
    "shape": (with_another(QUERY, np.ones((40, 48), np.float32)), r"\[40, 48\] instead of \[48"),
    "scalar": (
        with_another(f"{L1}.output_scale/weights", np.ones((), np.float32)),
        r"output_scale/weights is \[\] instead of \[1\]",
    ),
    "name": (
        lambda tensors: without(QUERY)(tensors) | {QUERY.removesuffix("/weights"): tensors[QUERY]},
        r"mixer\.query\.weight is not a parameter",
    ),
    "integers": (with_another(QUERY, np.ones((48, 40), np.int32)), "found: I32"),
    "all": (lambda _: {"a": np.ones(1, np.float32)}, "more"),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_do_not_fit_are_named(cases, name):
    change, found = WRONG_TENSORS[name]
    case = cases["dense"]
    with pytest.raises(SourceError, match=found) as caught:
        FastLLM(case.write(f"tensors {name}", tensors=change(case.tensors)))
    assert len(caught.value.message) < 2000


def in_two_files(case, folder, index_changes=None, second=None):
    """The checkpoint with every other tensor in a second file."""
    files = ("model_0.safetensors", "model_1.safetensors")
    index = {name: files[place % 2] for place, name in enumerate(sorted(case.tensors))}
    folder.mkdir()
    for file in files:
        held = {name: case.tensors[name] for name, place in index.items() if place == file}
        save_file(held | (second or {}), folder / file)
    index |= index_changes or {}
    index = {name: file for name, file in index.items() if file}
    return write_metadata(folder, case, {"metadata": {"state_index": index}})


def test_tensors_may_lie_in_several_files(cases, folder):
    case = cases["moe"]
    two = in_two_files(case, folder / "two")
    (two / "model_2.safetensors").write_bytes(b"not named by the index, so not read")
    assert case.kl(two) < 1e-8


def test_state_index_that_lies_is_refused(cases, folder):
    case = cases["dense"]
    first, second, *_ = sorted(case.tensors)
    for number, (changes, found) in enumerate(
        (
            ({first: "model_1.safetensors"}, f"has model_1.safetensors for {first}"),
            ({second: None}, f"has nothing for {second}"),
            ({"novelty/weights": WEIGHTS}, "lists novelty/weights"),
        )
    ):
        with pytest.raises(SourceError, match=f"state_index {found}"):
            FastLLM(in_two_files(case, folder / str(number), changes))
    twice = {first: case.tensors[first]}
    with pytest.raises(SourceError, match="found: another one in model_0"):
        FastLLM(in_two_files(case, folder / "twice", second=twice))


def test_file_that_is_not_there_or_broken_is_named(cases, folder):
    write_metadata(folder, cases["dense"])
    with pytest.raises(SourceError, match=r"not there.(?s:.*)model_0\.safetensors"):
        FastLLM(folder)
    for content in (b"", b"\xff" * 100, (cases["dense"].folder / WEIGHTS).read_bytes()[:-4]):
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(SourceError, match=r"not a safetensors file(?s:.*)model_0"):
            FastLLM(folder)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float64"])
def test_other_stored_dtypes_are_read(cases, stored):
    case = cases["moe"]
    tensors = {name: value.astype(stored) for name, value in case.tensors.items()}
    native = FastLLM(case.write(stored, tensors=tensors))
    assert native.stored_dtypes == {stored}
    found = native.forward(case.ids)
    assert found.dtype == torch.float32
    back = {name: value.astype(np.float32) for name, value in tensors.items()}
    same = FastLLM(case.write(f"{stored} in float32", tensors=back)).forward(case.ids)
    np.testing.assert_array_equal(found.cpu(), same.cpu())


def test_mixed_stored_dtypes_are_listed(cases):
    case = cases["dense"]
    mixed = case.tensors | {QUERY: case.tensors[QUERY].astype(ml_dtypes.bfloat16)}
    assert FastLLM(case.write("mixed", tensors=mixed)).stored_dtypes == {"float32", "bfloat16"}
