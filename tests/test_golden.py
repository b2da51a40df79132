"""Golden files: exact, readable by safetensors, refused for any other checkpoint."""

import json
import os
import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest
from maxtext_trees import config_of, logits_of, make_model, save_model

from gemma_convert.errors import SourceError, TargetError
from gemma_convert.logits import streaming, tensor_files
from gemma_convert.logits.golden import load_golden, weight_files
from gemma_convert.logits.golden_writing import save_golden
from gemma_convert.logits.layerwise import LayerwiseReference
from gemma_convert.logits.reference import Reference
from gemma_convert.logits.streaming import GoldenSlices


@pytest.fixture(scope="module")
def model():
    return make_model("ple")


@pytest.fixture(scope="module")
def hf(model, tmp_path_factory):
    return save_model(model, tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def saved(hf, tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "logits.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "_LEAST_ROWS", 10)
        patch.setattr(streaming, "LOGIT_BYTES", 0)  # ten slices of the vocabulary, the last of 4
        save_golden(hf, path)
    return path


@pytest.fixture
def copy(hf, tmp_path):
    return shutil.copytree(hf, tmp_path / "copy")


def test_logits_are_those_of_transformers(model, saved):
    golden = load_golden(saved)
    assert golden.family == "e2b" and golden.vocab == 94
    assert max(len(one.ids) for one in golden.sequences) > 7
    for index, sequence in enumerate(golden.sequences):
        slices = list(golden.slices(index, 9))
        assert {len(one) for one in slices[:-1]} == {9} and 1 <= len(slices[-1]) <= 9
        found = np.concatenate(slices)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, logits_of(model, [sequence.ids])[0], atol=1e-4)


def test_logits_are_those_of_the_whole_model_within_float32(hf, saved):
    """Their largest is about 3, where neighbouring numbers are 2.4e-7 apart."""
    golden, whole = load_golden(saved), Reference(hf)
    for index, sequence in enumerate(golden.sequences):
        (found,) = golden.slices(index, len(sequence.ids))
        expected = whole.head(whole.hidden(sequence))
        assert found.shape == expected.shape == (len(sequence.ids), 94)
        assert np.abs(found - expected).max() < 3e-6 and np.ptp(expected) > 2


def test_columns_read_are_the_columns_of_rows_read(saved):
    golden = load_golden(saved)
    rows = np.concatenate([next(golden.slices(n, 10**6)) for n in range(len(golden.sequences))])
    parts = [slice(0, 7), slice(7, 94)]
    for part, found in zip(parts, GoldenSlices(golden).logits(parts), strict=True):
        assert np.array_equal(found, rows[:, part])


def test_neither_a_whole_model_nor_all_logits_are_in_memory(hf, saved, tmp_path, monkeypatch):
    """What is written at once are rows of one slice; of the model one layer is there."""
    monkeypatch.setattr(streaming, "_LEAST_ROWS", 10)
    monkeypatch.setattr(streaming, "LOGIT_BYTES", 0)
    monkeypatch.setattr(Reference, "__init__", None)
    given, written = LayerwiseReference.logits, []

    def logits(self, vocab):
        for one in given(self, vocab):
            assert all(p.is_meta for p in self._text.layers.parameters())
            written.append(one.shape)
            yield one

    monkeypatch.setattr(LayerwiseReference, "logits", logits)
    save_golden(hf, tmp_path / "golden.safetensors")
    positions = sum(len(one.ids) for one in load_golden(saved).sequences)
    assert written == [(positions, 10)] * 9 + [(positions, 4)]
    assert (tmp_path / "golden.safetensors").read_bytes() == saved.read_bytes()


def test_files_are_mapped_anew_so_that_their_pages_do_not_stay(hf, tmp_path, monkeypatch):
    """A mapped file's pages count as resident as long as it is open: no handle sees it all."""
    opened, given = [], tensor_files.TensorFiles._file

    def file(self, path):
        if path not in self._open:
            opened.append(path)
        return given(self, path)

    monkeypatch.setattr(tensor_files.TensorFiles, "_file", file)
    save_golden(hf, tmp_path / "one", tokens=3)
    assert opened == ["model.safetensors"]
    size = (hf / "model.safetensors").stat().st_size
    monkeypatch.setattr(tensor_files, "MAPPED_BYTES", size // 10)
    save_golden(hf, tmp_path / "ten", tokens=3)
    assert 8 <= len(opened[1:]) <= 20
    assert (tmp_path / "one").read_bytes() == (tmp_path / "ten").read_bytes()


def test_file_is_plain_safetensors(saved):
    from safetensors import safe_open

    raw = saved.read_bytes()
    assert struct.unpack("<Q", raw[:8])[0] % 8 == 0
    with safe_open(str(saved), framework="numpy") as file:
        assert sorted(file.keys()) == sorted(
            f"{k}.{n}" for k in ("ids", "logits") for n in range(4)
        )
        assert file.get_tensor("ids.0").dtype == np.int32
        facts = json.loads(file.metadata()["gemma-convert"])
    assert facts["format"] == "gemma-convert/golden/1"
    assert set(facts["versions"]) == {"transformers", "torch"}


def test_its_own_checkpoint_is_accepted_with_and_without_weights(saved, hf, copy):
    golden = load_golden(saved)
    golden.check_belongs(hf)
    (copy / "model.safetensors").unlink()
    golden.check_belongs(copy)


def test_another_config_is_refused(saved, copy):
    (copy / "config.json").write_text(json.dumps(config_of(copy) | {"sliding_window": 8}))
    with pytest.raises(SourceError, match="belong to another checkpoint"):
        load_golden(saved).check_belongs(copy)


@pytest.mark.parametrize("place", [10, 0.3, -1])
def test_other_weights_of_the_same_shape_are_refused(saved, copy, place):
    path = copy / "model.safetensors"
    raw = bytearray(path.read_bytes())
    at = int(place * len(raw)) if isinstance(place, float) else place
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        load_golden(saved).check_belongs(copy)


def test_other_file_names_are_refused(saved, copy):
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    with pytest.raises(SourceError, match=r"other\.safetensors, model\.safetensors"):
        load_golden(saved).check_belongs(copy)


def test_an_existing_file_is_kept_unless_told_otherwise(hf, saved, tmp_path):
    path = tmp_path / "golden.safetensors"
    for mine in (b"mine", (hf / "model.safetensors").read_bytes(), b"", saved.read_bytes()):
        path.write_bytes(mine)
        with pytest.raises(TargetError, match="exists already"):
            save_golden(hf, path, tokens=3)
        assert path.read_bytes() == mine
        if mine and mine != saved.read_bytes():
            with pytest.raises(TargetError, match="not a golden file"):
                save_golden(hf, path, tokens=3, overwrite=True)
            assert path.read_bytes() == mine
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(TargetError, match="not a golden file"):
        save_golden(hf, tmp_path / "link", tokens=3, overwrite=True)
    (tmp_path / "link").unlink()
    golden = save_golden(hf, path, tokens=3, overwrite=True)
    assert len(golden.sequences[0].ids) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_failure_leaves_nothing_behind(hf, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(TargetError, match="No space left"):
        save_golden(hf, tmp_path / "golden.safetensors", tokens=3)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TargetError, match="folder"):
        save_golden(hf, tmp_path / "no" / "golden.safetensors", tokens=3)


def test_files_that_are_no_golden_files_are_refused(hf, saved, tmp_path):
    for name, raw in {
        "weights": (hf / "model.safetensors").read_bytes(),
        "cut": saved.read_bytes()[:-5],
        "text": b"not a safetensors file at all",
        "newer": saved.read_bytes().replace(b"golden/1", b"golden/2"),
    }.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(SourceError):
            load_golden(tmp_path / name)
    with pytest.raises(SourceError):
        load_golden(tmp_path / "missing")


def test_checkpoints_that_do_not_fill_the_model_are_refused(copy, tmp_path):
    from safetensors.numpy import load_file, save_file

    path = copy / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.self_attn.q_norm.weight"
    lost = {key: value for key, value in weights.items() if key != name}
    save_file(lost, path, {"format": "pt"})
    with pytest.raises(SourceError, match=f"1 missing: {name}"):
        save_golden(copy, tmp_path / "golden", tokens=3)
    save_file(weights | {name: np.ones(5, np.float32)}, path, {"format": "pt"})
    with pytest.raises(SourceError, match=f"1 of another shape: .*{name}"):
        save_golden(copy, tmp_path / "golden", tokens=3)
    extra = {"model.layers.1.mlp.side_proj.weight": np.ones((2, 3), np.float32)}
    save_file(weights | extra, path, {"format": "pt"})
    with pytest.raises(SourceError, match=r"1 unexpected: .*side_proj"):
        save_golden(copy, tmp_path / "golden", tokens=3)


def test_keys_and_values_of_sharing_layers_may_be_there(copy, tmp_path):
    from safetensors.numpy import load_file, save_file

    path = copy / "model.safetensors"
    weights = load_file(path)
    extra = {
        f"model.layers.{layer}.self_attn.{name}": np.ones(shape, np.float32)
        for layer, head_dim in ((6, 12), (7, 16))
        for name, shape in (("k_proj.weight", (2 * head_dim, 38)), ("k_norm.weight", (head_dim,)))
    }
    assert not extra.keys() & weights.keys()
    save_file(weights | extra, path, {"format": "pt"})
    save_golden(copy, tmp_path / "golden", tokens=3)


def test_weight_files_differ_by_header_size_and_samples(copy):
    (one,) = weight_files(copy)
    assert one == weight_files(copy)[0] and one.name == "model.safetensors"
    assert one != replace(one, samples="0" * 64)
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40))
    with pytest.raises(SourceError, match="not a safetensors file"):
        weight_files(copy)
