"""An output head of its own: converted, checked, brought back, refused where it has no place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml
from commands import said
from fast_llm_by_hand import fast_llm_metadata, fast_llm_tensors
from maxtext_by_hand import maxtext_tree
from models import DENSE, E2B, UNIFIED, WHERE, load_config, text_only
from native_checkpoints import arrays_of, differing, sums
from trees import read_safetensors, same_bits

from gemma_convert import (
    SourceError,
    inspect,
    list_mappings,
    logit_check,
    make_tiny,
    save_golden,
    to_hf,
    to_native,
    verify,
)
from gemma_convert.forward.stored import open_stored
from gemma_convert.layouts.fast_llm.forward import FastLLM
from gemma_convert.logits import streaming
from gemma_convert.logits.layerwise import LayerwiseReference
from gemma_convert.logits.reference import Reference
from gemma_convert.model.config import parse_architecture, read_architecture
from gemma_convert.prompts.text import TokenSequence
from gemma_convert.stores.safetensors.header import write_safetensors

HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
KERNEL, OUTPUT = "decoder/logits_dense/kernel", "head.output_weights/weights"
SOFTCAP = "text_config.final_logit_softcapping"
TIE = "tie_word_embeddings"
FORMS = (
    ("e2b", "maxtext", {}),
    ("26b-a4b", "maxtext", {}),
    ("31b", "maxtext", {"scan_layers": True}),
    ("31b", "fast-llm", {}),
)


def set_config(folder: Path, *keys: str, to: object) -> None:
    """Another value in config.json; None stands for null, and ... removes the key."""
    config = json.loads((folder / "config.json").read_text())
    section = config
    for key in keys[:-1]:
        section = section[key]
    if to is ...:
        del section[keys[-1]]
    else:
        section[keys[-1]] = to
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def set_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = read_safetensors(folder)
    edit(tensors)
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "model.safetensors", tensors)


@pytest.fixture
def uncapped(shallow, tmp_path) -> Callable[..., Path]:
    """uncapped(family, scanned): an untied checkpoint that may be changed, its logits not capped.

    That is what MaxText takes.
    """

    def make(family: str, scanned: bool = False, **options) -> Path:
        folder = tmp_path / "source"
        shutil.copytree(shallow(family, scanned, untied=True, **options), folder)
        section = () if options.get("text_only") else ("text_config",)
        set_config(folder, *section, "final_logit_softcapping", to=None)
        return folder

    return make


def by_hand(source: Path, layout: str, scanned: bool) -> dict[str, np.ndarray]:
    tensors, architecture = read_safetensors(source), read_architecture(source)
    if layout == "fast-llm":
        return fast_llm_tensors(tensors, architecture)
    return maxtext_tree(tensors, architecture, scanned)


# What is written, and comes back.


@pytest.mark.share(2, 1)
@pytest.mark.parametrize(("family", "layout", "options"), FORMS)
def test_arrays_are_those_written_by_hand_and_every_file_comes_back(
    uncapped, tmp_path, family, layout, options
):
    source, out, scanned = uncapped(family, bool(options)), tmp_path / "out", bool(options)
    report = to_native(source, out, layout=layout, text_only=True, **options)
    assert report.tied == ()
    arrays = arrays_of(out, layout)
    assert not differing(arrays, by_hand(source, layout, scanned))
    head, embedding = (read_safetensors(source)[name] for name in (HEAD, EMBEDDING))
    kernel = arrays[OUTPUT] if layout == "fast-llm" else arrays[KERNEL].T
    assert same_bits(kernel, head) and not same_bits(head, embedding)
    if layout == "maxtext":  # the embedding is scaled, as that of a tied model; the head is not
        root = np.float32(read_architecture(source).text.embed ** 0.5)
        scaled = embedding.astype(np.float32) * root
        assert same_bits(arrays["token_embedder/embedding"], scaled)
    assert verify(out).passed
    assert verify(out, against=source).passed
    to_hf(out, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)
    assert verify(tmp_path / "back", against=out).passed


@pytest.mark.parametrize("layout", ["maxtext", "fast-llm"])
def test_a_text_only_source_has_the_same_head(uncapped, tmp_path, layout):
    source = uncapped("31b", text_only=True)
    to_native(source, tmp_path / "out", layout=layout)
    assert not differing(arrays_of(tmp_path / "out", layout), by_hand(source, layout, False))
    to_hf(tmp_path / "out", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


def test_an_export_of_the_text_alone_keeps_head_and_fact(shallow, tmp_path):
    source = shallow("31b", untied=True)
    to_native(source, tmp_path / "out", layout="fast-llm")
    to_hf(tmp_path / "out", tmp_path / "back", text_only=True)
    assert same_bits(read_safetensors(tmp_path / "back")[HEAD], read_safetensors(source)[HEAD])
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["model_type"], config[TIE]) == ("gemma4_text", False)
    assert not read_architecture(tmp_path / "back").text.tied


def test_from_layout_to_layout_and_back(uncapped, tmp_path):
    source = uncapped("31b", True)
    one, other, third = (tmp_path / name for name in ("one", "other", "third"))
    to_native(source, one, layout="maxtext", scan_layers=True)
    to_native(one, other, layout="fast-llm")
    to_native(other, third, layout="maxtext")
    for out, layout in ((other, "fast-llm"), (third, "maxtext")):
        found = arrays_of(out, layout)
        text = {name: value for name, value in found.items() if "vision" not in name}
        assert not differing(text, by_hand(source, layout, False))
        assert verify(out, against=source).passed
        to_hf(out, tmp_path / f"{out.name} back")
        assert sums(tmp_path / f"{out.name} back") == sums(source)
    with pytest.raises(SourceError, match="no output head of its own"):
        to_native(one, tmp_path / "fourth", layout="gemma-jax")
    assert not (tmp_path / "fourth").exists()


def test_a_head_that_equals_the_embedding_is_still_its_own(uncapped, tmp_path):
    source = uncapped("31b")
    set_tensors(source, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].copy()}))
    for layout in ("maxtext", "fast-llm"):
        out = tmp_path / layout
        assert to_native(source, out, layout=layout).tied == ()
        assert not differing(
            {n: a for n, a in arrays_of(out, layout).items() if not n.startswith("vision")},
            by_hand(source, layout, False),
        )
        assert verify(out, against=source).passed
        to_hf(out, tmp_path / f"{layout} back")
        assert sums(tmp_path / f"{layout} back") == sums(source)


def test_frameworks_are_told(uncapped, shallow, tmp_path):
    report = to_native(uncapped("31b"), tmp_path / "out", layout="maxtext")
    assert report.settings["logits_via_embedding"] == "false"
    assert float(report.settings["final_logits_soft_cap"]) == 0
    model = yaml.safe_load((tmp_path / "out" / "models" / "gemma4-31b.yml").read_text())
    assert model["logits_via_embedding"] is False
    source = shallow("31b", untied=True)
    to_native(source, tmp_path / "other", layout="fast-llm")
    metadata = yaml.safe_load((tmp_path / "other" / "metadata.yaml").read_text())
    expected = fast_llm_metadata(read_architecture(source))["config"]["base_model"]
    assert metadata["config"]["base_model"] == expected
    assert expected["tied_embedding_weight"] is False


# What it computes.


@pytest.mark.share(4, 1)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("family", "layout", "options"), FORMS)
def test_logits_are_those_of_transformers(uncapped, tmp_path, family, layout, options, whole):
    source = uncapped(family, bool(options))
    to_native(source, tmp_path / "out", layout=layout, **options)
    report = logit_check(source, tmp_path / "out", tokens=40, whole_model=whole)
    assert report.passed and report.divergence.kl_max < 1e-8
    assert not report.warnings


def test_slices_of_the_vocabulary_are_rows_of_the_head(uncapped, tmp_path, monkeypatch):
    """A stream takes the head in many slices, here of 64 tokens, from chunks of another size."""
    source = uncapped("31b")
    to_native(source, tmp_path / "out", layout="maxtext")
    monkeypatch.setattr(streaming, "_LEAST_ROWS", 64)
    monkeypatch.setattr(streaming, "LOGIT_BYTES", 0)
    assert logit_check(source, tmp_path / "out", tokens=40).divergence.kl_max < 1e-8


def test_an_array_in_a_file_is_turned_round_where_it_lies(tmp_path):
    import tensorstore as ts

    values = np.arange(6 * 10, dtype=np.float32).reshape(6, 10).astype(ml_dtypes.bfloat16)
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/array/"}}
    layout = ts.ChunkLayout(chunk_shape=[6, 4])
    store = ts.open(spec, create=True, dtype=ts.bfloat16, shape=[6, 10], chunk_layout=layout)
    store.result().write(values).result()
    turned = open_stored(tmp_path, "array", ocdbt=False, zarr3=False).T
    assert (turned.shape, turned.chunk_shape, turned.chunk_rows) == ((10, 6), (4, 6), 4)
    assert same_bits(np.asarray(turned), np.ascontiguousarray(values.T))
    assert same_bits(np.asarray(turned[3:9]), np.ascontiguousarray(values.T[3:9]))
    assert same_bits(np.asarray(turned[3:9][2:4]), np.ascontiguousarray(values.T[5:7]))
    rows = np.array([[9, 0], [4, 4]])
    assert same_bits(turned[rows], np.ascontiguousarray(values.T[rows]))


def test_the_streamed_reference_and_golden_use_the_head(shallow, tmp_path):
    source = shallow("31b", untied=True)
    sequence = TokenSequence("a", (5, 6, 7))
    one, whole = LayerwiseReference(source, [sequence]), Reference(source)
    list(one.stages())
    (found,) = one.logits([slice(0, whole.architecture.text.vocab)])
    expected = whole.head(whole.hidden(sequence))
    assert np.abs(found - expected).max() < 1e-4
    tied = shallow("31b")
    other = Reference(tied)
    assert np.abs(other.head(other.hidden(sequence)) - expected).max() > 1
    save_golden(source, tmp_path / "golden", tokens=20)
    to_native(source, tmp_path / "out", layout="fast-llm")
    report = logit_check(source, tmp_path / "out", golden=tmp_path / "golden")
    assert report.divergence.kl_max < 1e-8


def _transposed(tensors: dict[str, np.ndarray]) -> None:
    tensors[HEAD] = np.ascontiguousarray(tensors[HEAD].T).reshape(tensors[HEAD].shape)


def _from_embedding(tensors: dict[str, np.ndarray]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].copy()


def _one_value(tensors: dict[str, np.ndarray]) -> None:
    tensors[HEAD].reshape(-1)[1234] = 3


MISTAKES = {"transposed": _transposed, "from the embedding": _from_embedding, "one": _one_value}


@pytest.mark.share(6, 2)
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("layout", ["maxtext", "fast-llm"])
def test_a_wrong_head_is_found(uncapped, tmp_path, layout, mistake):
    """By either check: verify names the tensor, logit-check is beyond its limit."""
    source = uncapped("31b")
    planted = shutil.copytree(source, tmp_path / "planted")
    set_tensors(planted, MISTAKES[mistake])
    to_native(planted, tmp_path / "out", layout=layout)
    report = verify(tmp_path / "out", against=source)
    array = OUTPUT if layout == "fast-llm" else f"params/params/{KERNEL}"
    assert not report.passed and array in report.different
    assert not logit_check(source, tmp_path / "out", tokens=40).passed


@pytest.mark.parametrize("untied", [False, True])
def test_settings_that_say_otherwise_are_refused(shallow, tmp_path, untied):
    """MaxText would look for another tree than the checkpoint has."""
    source, out = shallow("31b", untied=untied), tmp_path / "out"
    to_native(source, out, layout="maxtext", ignore_facts=[SOFTCAP])
    file = out / "models" / "gemma4-31b.yml"
    settings = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(settings | {"logits_via_embedding": untied}))
    with pytest.raises(SourceError, match="another shape") as caught:
        logit_check(source, out, tokens=40)
    assert caught.value.found == str(untied) and "logits_via_embedding" in caught.value.where
    assert "models/gemma4-31b.yml" in verify(out).different


@pytest.mark.parametrize("untied", [False, True])
def test_metadata_that_says_otherwise_is_refused(shallow, tmp_path, untied):
    source, out = shallow("31b", untied=untied), tmp_path / "out"
    to_native(source, out, layout="fast-llm")
    metadata = yaml.safe_load((out / "metadata.yaml").read_text())
    metadata["config"]["base_model"]["tied_embedding_weight"] = untied
    (out / "metadata.yaml").write_text(yaml.safe_dump(metadata))
    assert not verify(out).passed
    with pytest.raises(SourceError, match="do not fit metadata") as caught:
        FastLLM(out)
    wrong = "not a parameter" if untied else "missing instead of [317, 68]"
    assert caught.value.found == f"{OUTPUT} is {wrong}"


# What is refused, and what it is told.


def test_the_gemma_library_has_no_place_for_it(shallow, tmp_path):
    source = shallow("31b", untied=True)
    code, _, errors = said("to-native", source, tmp_path / "out", "--format", "gemma-jax")
    assert code == 3
    assert "the gemma library has no output head of its own" in errors
    assert f"key {TIE}\n" in errors and f"--ignore-fact {TIE}\n" in errors
    assert not (tmp_path / "out").exists()
    knowing = ("--ignore-fact", f"text_config.{TIE}")
    done = said("to-native", source, tmp_path / "out", "--format", "gemma-jax", *knowing)
    assert done[0] == 0 and "no output head of its own" in done[1]
    assert not logit_check(source, tmp_path / "out", tokens=40).passed
    to_hf(tmp_path / "out", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


def test_maxtext_caps_no_logits_of_it(shallow, tmp_path):
    source, out = shallow("31b", untied=True), tmp_path / "out"
    code, _, errors = said("to-native", source, out, "--format", "maxtext")
    assert code == 3
    assert "MaxText caps the logits of an output head that is tied" in errors
    assert SOFTCAP in errors and "expected: null" in errors and "found: 30.0" in errors
    assert not out.exists()
    to_native(source, out, layout="maxtext", ignore_facts=[SOFTCAP])
    report = logit_check(source, out, tokens=40)
    assert not report.passed
    assert any(SOFTCAP in warning for warning in report.warnings)
    to_hf(out, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


def test_no_head_where_config_says_that_there_is_one(shallow, tmp_path):
    source = shutil.copytree(shallow("31b", untied=True), tmp_path / "source")
    set_tensors(source, lambda tensors: tensors.pop(HEAD))
    with pytest.raises(SourceError, match="is not tied to the embedding, by") as caught:
        to_native(source, tmp_path / "out", layout="fast-llm")
    error = caught.value
    assert (error.where, error.found) == (str(source), "no such tensor")
    assert error.expected == f"{HEAD} [317, 68]" and '"tie_word_embeddings": true' in error.do
    assert inspect(source).coverage.missing == (HEAD,)
    for check in (Reference, lambda folder: LayerwiseReference(folder, [])):
        with pytest.raises(SourceError, match="does not fit its config") as caught:
            check(source)
        assert caught.value.found == f"1 missing: {HEAD}"


def test_a_head_apart_where_config_says_that_it_is_tied(shallow, tmp_path):
    source = shutil.copytree(shallow("31b", untied=True), tmp_path / "source")
    set_config(source, TIE, to=True)
    with pytest.raises(SourceError, match="says that the output head is tied") as caught:
        to_native(source, tmp_path / "out", layout="fast-llm")
    error = caught.value
    assert (error.where, error.found) == (str(source), "different values")
    assert error.expected == f"{HEAD} equal to {EMBEDDING}, bit for bit"
    assert '"tie_word_embeddings": false' in error.do
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [DENSE, UNIFIED])
@pytest.mark.parametrize(
    ("top", "within"), [(a, b) for a in (True, False, ...) for b in (True, False, ...)]
)
def test_the_key_is_the_one_that_transformers_reads(name, top, within):
    import torch
    import transformers

    config = load_config(name)
    for section, value in ((config, top), (config["text_config"], within)):
        section.pop(TIE, None)
        if value is not ...:
            section[TIE] = value
    for one in (config, text_only(config)):
        one["text_config" if "text_config" in one else "rope_parameters"]  # it is a whole config
        ours = parse_architecture(one, WHERE)
        kind = getattr(transformers, ours.reference_class)
        values = {key: value for key, value in one.items() if key not in ("architectures", "dtype")}
        with torch.device("meta"):
            model = kind(kind.config_class.from_dict(shrunk(values)))
        assert ours.text.tied == (HEAD in model.all_tied_weights_keys), one.keys()


def shrunk(config: dict) -> dict:
    """The config with one layer of each kind in the text, and in a vision tower."""
    text = config.get("text_config", config)
    text |= {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    if "num_hidden_layers" in (config.get("vision_config") or {}):
        config["vision_config"]["num_hidden_layers"] = 1
    return config


# Names, sizes, and the tiny checkpoint itself.


def test_it_is_listed_and_inspected(uncapped, tmp_path):
    source = uncapped("31b")
    found = {}
    for layout in ("maxtext", "fast-llm"):
        entries = list_mappings(layout, str(source)).tensors
        (found[layout],) = [one for one in entries if one.hf.name == HEAD]
        to_native(source, tmp_path / layout, layout=layout)
        assert inspect(tmp_path / layout).coverage.complete
    assert inspect(source).coverage.complete
    assert found["maxtext"].kind == found["fast-llm"].kind == "converted"
    assert found["maxtext"].native.name == f"params/params/{KERNEL}"
    assert (found["maxtext"].native.axes, found["maxtext"].scale) == ("embed vocab", None)
    assert found["maxtext"].native.shape == (68, 317)
    assert found["maxtext"].native.dtype == "bfloat16"
    assert found["fast-llm"].native.name == OUTPUT
    assert (found["fast-llm"].native.axes, found["fast-llm"].native.shape) == (
        "vocab embed",
        (317, 68),
    )


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("family", ["e2b", "12b", "31b"])
def test_a_tiny_one_is_a_tied_one_with_a_head(shallow, tmp_path, family, text_only):
    plain = shallow(family, text_only=text_only)
    make_tiny(family, tmp_path / "untied", untied=True, layers=10 if family == "e2b" else 6,
              text_only=text_only)  # fmt: skip
    before, after = read_safetensors(plain), read_safetensors(tmp_path / "untied")
    assert after.keys() - before.keys() == {HEAD}
    assert all(same_bits(before[name], after[name]) for name in before)
    embedding = after["model.embed_tokens.weight" if text_only else EMBEDDING]
    assert after[HEAD].shape == embedding.shape and after[HEAD].dtype == embedding.dtype
    head, table = after[HEAD].astype(np.float32), embedding.astype(np.float32)
    assert np.abs(np.corrcoef(head.ravel(), table.ravel())[0, 1]) < 0.05
    assert head.std() == pytest.approx(table.std(), rel=0.05)
    assert not read_architecture(tmp_path / "untied").text.tied
    config = json.loads((tmp_path / "untied" / "config.json").read_text())
    sections = [config] if text_only else [config, config["text_config"]]
    assert [section[TIE] for section in sections] == [False] * len(sections)
    theirs = json.loads((plain / "config.json").read_text())
    for section in sections:
        section[TIE] = True
    assert config == theirs


def test_the_command_makes_it(tmp_path):
    code, _, _ = said("tiny", "31b", tmp_path / "tiny", "--layers", 6, "--untied")
    assert code == 0 and HEAD in read_safetensors(tmp_path / "tiny")


def test_a_published_model_has_none():
    assert parse_architecture(load_config(E2B), WHERE).text.tied
