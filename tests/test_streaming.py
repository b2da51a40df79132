"""Layer by layer and in slices: the same figures as of the whole model, and where it drifts."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import FAMILIES, LAYOUTS, SHALLOW
from native_checkpoints import alter
from PIL import Image
from safetensors.torch import load_file, save_file
from test_sounds import noise, write

from gemma_convert.cli.app import main
from gemma_convert.errors import SourceError
from gemma_convert.forward import jax_model
from gemma_convert.forward.stored import StoredArray, open_stored, read_all
from gemma_convert.layouts.gemma_jax import tree as gemma_jax_orbax
from gemma_convert.layouts.maxtext import tree as maxtext_orbax
from gemma_convert.layouts.registry import open_model
from gemma_convert.logits import check as check_module
from gemma_convert.logits import running, streaming
from gemma_convert.logits.check import logit_check
from gemma_convert.logits.divergence import compare
from gemma_convert.logits.drift import TOLERANCE, Drift, measure_drift
from gemma_convert.logits.golden_writing import save_golden
from gemma_convert.logits.layerwise import LayerwiseReference
from gemma_convert.logits.reference import Reference
from gemma_convert.logits.report_table import render
from gemma_convert.logits.sliced import SlicedComparison
from gemma_convert.model.config import read_architecture
from gemma_convert.prompts.batches import batches, by_sequence
from gemma_convert.prompts.images import image_sequences
from gemma_convert.prompts.sounds import sound_sequences
from gemma_convert.prompts.text import TokenSequence, token_sequences


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A picture and a sound."""
    folder = tmp_path_factory.mktemp("media")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "noise.png")
    return folder / "noise.png", write(folder / "noise.wav", noise(5000).tobytes())


@pytest.fixture(scope="module")
def prompts(tiny, media):
    """prompts(family): three texts, and a picture and a sound where the model senses them."""

    def make(family):
        folder = tiny(family, layers=SHALLOW[family])
        architecture = read_architecture(folder)
        found = token_sequences(folder, architecture, ["abc"], None)
        found += image_sequences(folder, architecture, [media[0]])
        if architecture.audio is not None:
            found += sound_sequences(folder, architecture, [media[1]])
        return found

    return make


def hidden_of_layers(reference, sequence):
    """What enters the first layer and leaves each one, of the whole model, by hooks."""
    model = reference._model.model
    layers = model.language_model.layers
    seen = []
    hooks = [layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))]
    hooks += [layer.register_forward_hook(lambda _, __, out: seen.append(out)) for layer in layers]
    final = reference.hidden(sequence)
    for hook in hooks:
        hook.remove()
    return [state[0].numpy() for state in (*seen, final[None])]


@pytest.mark.share(4, 2)
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_is_the_whole_model_bit_for_bit(family, tiny, prompts):
    whole, sequences = Reference(tiny(family, layers=SHALLOW[family])), prompts(family)
    one = LayerwiseReference(tiny(family, layers=SHALLOW[family]), sequences)
    stages = list(one.stages())
    for index, sequence in enumerate(sequences):
        expected = hidden_of_layers(whole, sequence)
        assert len(stages) == len(expected) == len(whole.architecture.text.layers) + 2
        for found, state in zip(stages, expected, strict=True):
            assert np.array_equal(found[index], state)
    vocab = whole.architecture.text.vocab
    parts = [slice(0, 100), slice(100, 101), slice(101, vocab)]
    slices = one.logits(parts)
    first = next(slices)
    assert torch.is_grad_enabled(), "what follows between slices is not the model's"
    found = np.concatenate([first, *slices], axis=1)
    expected = [whole.head(whole.hidden(sequence))[sequence.compared] for sequence in sequences]
    assert np.abs(found - np.concatenate(expected)).max() < 1e-4
    assert one.device == whole.device_name


def test_buffers_that_are_not_stored_are_those_of_the_whole_model(tiny):
    for family in ("e2b", "26b-a4b"):
        whole = dict(Reference(tiny(family, layers=SHALLOW[family]))._model.named_buffers())
        ours = LayerwiseReference(tiny(family, layers=SHALLOW[family]), [])._model
        computed = {
            f"{path}.{name}": module._buffers[name]
            for path, module in ours.named_modules()
            for name in module._non_persistent_buffers_set
        }
        assert any("inv_freq" in name for name in computed)
        assert any("embed_scale" in name for name in computed)
        for name, buffer in computed.items():
            assert torch.equal(buffer, whole[name]), name
        assert ours.config.get_text_config()._attn_implementation == "eager"
        assert ours.config.get_text_config()._experts_implementation == "eager"


def test_only_rows_of_the_tables_and_one_layer_are_loaded(tiny, prompts, monkeypatch):
    one = LayerwiseReference(tiny("e2b"), prompts("e2b"))
    original, reads = one._files.read, []

    def read(name, rows=None, device=None):
        tensor = original(name, rows, device)
        reads.append((name, tensor.shape))
        return tensor

    monkeypatch.setattr(one._files, "read", read)
    text = one.architecture.text
    tables = ("model.language_model.embed_tokens", "model.language_model.embed_tokens_per_layer")
    for stage, _ in enumerate(one.stages()):
        for name, parameter in one._model.named_parameters():
            if name.removesuffix(".weight") in tables:
                assert parameter.untyped_storage().nbytes() == 4 * parameter.shape[1]
            elif not name.startswith("lm_head"):
                assert parameter.is_meta, (stage, name)
    layers = [name for name, _ in reads if ".language_model.layers." in name]
    wanted = [name for name in one._model.state_dict() if ".language_model.layers." in name]
    assert sorted(layers) == sorted(wanted)
    gathered = [shape for name, shape in reads if name.removesuffix(".weight") in tables]
    assert gathered and all(shape[0] < text.vocab / 2 for shape in gathered)


def edited_copy(source, target, edit):
    """A copy of a checkpoint in one file, with its tensors changed by `edit`."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
    save_file(edit(tensors), target / "model.safetensors")
    return target


SCALAR = "model.language_model.layers.1.layer_scalar"
NORM = "model.language_model.layers.0.self_attn.q_norm.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"


@pytest.mark.parametrize(
    "edit",
    [
        lambda tensors: {name: one for name, one in tensors.items() if name != SCALAR},
        lambda tensors: {**tensors, NORM: torch.ones(3)},
        lambda tensors: {**tensors, "model.language_model.layers.0.extra.weight": torch.ones(3)},
        lambda tensors: {**tensors, SCALAR.replace(".1.", ".77."): torch.ones(1)},
        lambda tensors: {**tensors, NORM.replace("q_norm", "k_proj"): torch.ones(2, 2)},
    ],
    ids=["missing", "another shape", "unexpected", "another layer", "wrong key kernel"],
)
def test_a_checkpoint_that_does_not_fill_the_model_is_refused_alike(edit, tiny, tmp_path):
    hf = edited_copy(tiny("31b", layers=6), tmp_path / "hf", edit)
    with pytest.raises(SourceError, match="does not fit its config") as whole:
        Reference(hf)
    with pytest.raises(SourceError, match="does not fit its config") as layerwise:
        LayerwiseReference(hf, [])
    assert str(layerwise.value.found).split(":")[0] == str(whole.value.found).split(":")[0]


def test_leftover_keys_and_values_of_layers_that_share_them_are_no_error(tiny, tmp_path):
    shared = next(one for one in read_architecture(tiny("e2b")).text.layers if not one.owns_kv)
    name = f"model.language_model.layers.{shared.index}.self_attn.k_proj.weight"
    hf = edited_copy(
        tiny("e2b"), tmp_path / "hf", lambda tensors: {**tensors, name: torch.ones(2, 2)}
    )
    LayerwiseReference(hf, [])


def test_a_head_of_its_own_is_used_as_transformers_uses_it(tiny, tmp_path):
    def untie(tensors):
        return {**tensors, "lm_head.weight": tensors[EMBEDDING].flip(0).contiguous()}

    hf = edited_copy(tiny("31b", layers=6), tmp_path / "hf", untie)
    sequence = TokenSequence("a", (5, 6, 7))
    one, whole = LayerwiseReference(hf, [sequence]), Reference(hf)
    list(one.stages())
    (found,) = one.logits([slice(0, whole.architecture.text.vocab)])
    assert np.abs(found - whole.head(whole.hidden(sequence))).max() < 1e-4


def test_files_that_cannot_be_read_are_named(tiny, tmp_path):
    shutil.copytree(
        tiny("31b", layers=6), tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors*")
    )
    for content in (None, b"no tensors"):
        if content is not None:
            (tmp_path / "hf" / "model.safetensors").write_bytes(content)
        with pytest.raises(SourceError, match="original checkpoint cannot be read"):
            LayerwiseReference(tmp_path / "hf", [])


def test_shards_are_found_by_their_index(tiny, tmp_path):
    hf = edited_copy(tiny("31b", layers=6), tmp_path / "hf", dict)
    tensors = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, hf / file)
    index = {name: file for file, held in files.items() for name in held}
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file({"other": torch.ones(1)}, hf / "c.safetensors")
    LayerwiseReference(hf, [])


def same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    return left.dtype == right.dtype and left.tobytes() == right.tobytes()


@pytest.mark.share(2)
@pytest.mark.parametrize(
    ("layout", "family", "options"),
    [
        ("maxtext", "31b", {"scan_layers": True}),
        ("maxtext", "26b-a4b", {"ocdbt": False}),
        ("maxtext", "e2b", {}),
        ("gemma-jax", "e2b", {}),
    ],
)
def test_arrays_in_their_files_are_those_that_orbax_restores(
    tiny, converted, layout, family, options
):
    folder = converted(tiny(family, layers=SHALLOW[family]), layout, **options)
    if layout == "maxtext":
        items = folder / "0" / "items"
        left, restored = maxtext_orbax.open_tree(items), maxtext_orbax.restore_tree(items)
    else:
        left, restored = gemma_jax_orbax.open_tree(folder), gemma_jax_orbax.restore_tree(folder)
    assert same(read_all(left), restored)


@pytest.fixture
def chunked(tmp_path):
    """An array [10 4 3] in chunks of three rows, and the same in memory."""
    import tensorstore as ts

    values = np.arange(120, dtype=np.float32).reshape(10, 4, 3).astype(ml_dtypes.bfloat16)
    path = str(tmp_path / "array")
    ts.open(
        {"driver": "zarr", "kvstore": {"driver": "file", "path": path}},
        create=True,
        dtype=ts.bfloat16,
        shape=values.shape,
        chunk_layout=ts.ChunkLayout(chunk_shape=[3, 4, 3]),
    ).result().write(values).result()
    return open_stored(tmp_path, "array", ocdbt=False, zarr3=False), values, tmp_path / "array"


def test_views_and_rows_are_those_of_numpy(chunked):
    stored, values, _ = chunked
    assert (stored.shape, stored.dtype, stored.chunk_rows) == (values.shape, values.dtype, 3)
    for index in (np.s_[:, 2], np.s_[:, 1, 2], np.s_[4:9], 5, np.s_[3:8, 1:3]):
        view = stored[index]
        assert isinstance(view, StoredArray) and same(np.asarray(view), values[index])
    rows = np.array([[7, 0, 7], [9, 3, 8]])
    assert same(stored[rows], values[rows]) and same(
        stored[2:][rows - 2 * (rows > 7)], values[2:][rows - 2 * (rows > 7)]
    )
    assert same(stored[:, 2][rows], values[:, 2][rows])
    assert stored[np.zeros((0,), int)].shape == (0, 4, 3)
    for outside in (np.array([10]), np.array([-1])):
        with pytest.raises(IndexError):
            stored[outside]


def test_a_chunk_that_is_broken_is_named(chunked):
    stored, _, folder = chunked
    (folder / "1.0.0").write_bytes(b"nothing")
    np.asarray(stored[0:3])
    for act in (lambda: np.asarray(stored), lambda: stored[np.array([4])]):
        with pytest.raises(SourceError, match="missing or broken") as caught:
            act()
        assert str(folder).rsplit("/", 1)[0] in str(caught.value.where)


def test_slices_of_a_table_read_a_large_chunk_once(chunked, monkeypatch):
    stored, values, _ = chunked
    reads = []
    original = jax_model.read
    monkeypatch.setattr(jax_model, "read", lambda one: reads.append(one.shape) or original(one))
    table = jax_model._RowsInOrder(stored)
    for start in range(10):
        assert same(table.rows(slice(start, start + 1)), values[start : start + 1])
    assert reads == [(3, 4, 3)] * 3 + [(1, 4, 3)]
    assert same(jax_model._RowsInOrder(stored).rows(slice(2, 10)), values[2:10])
    assert same(jax_model._RowsInOrder(values).rows(slice(2, 10)), values[2:10])


def test_no_stack_and_no_table_is_read_whole(tiny, converted, monkeypatch):
    items = converted(tiny("31b"), "maxtext", scan_layers=True) / "0" / "items"
    largest = {"whole": 0, "rows": 0}
    array, gathered = StoredArray.__array__, StoredArray._gathered

    def note(kind, original):
        def read(one, *arguments, **named):
            found = original(one, *arguments, **named)
            largest[kind] = max(largest[kind], found.nbytes)
            return found

        return read

    monkeypatch.setattr(StoredArray, "__array__", note("whole", array))
    monkeypatch.setattr(StoredArray, "_gathered", note("rows", gathered))
    monkeypatch.setattr(streaming, "_LEAST_ROWS", 64)
    monkeypatch.setattr(streaming, "LOGIT_BYTES", 0)
    assert logit_check(tiny("31b"), items, tokens=3).passed
    text = read_architecture(tiny("31b")).text
    facts = maxtext_orbax.tree_facts(items)
    stacks = [4 * int(np.prod(fact.shape)) for name, fact in facts.items() if "local" in name]
    assert largest["whole"] < max(stacks) / 2 < largest["whole"] * len(text.layers)
    assert 0 < largest["rows"] < 4 * text.embed * text.vocab / 2


def sliced(reference, native, widths):
    total, start = SlicedComparison(), 0
    for width in widths:
        total.add(reference[:, start : start + width], native[:, start : start + width])
        start += width
    assert start == reference.shape[1]
    return total.result()


def random_logits(positions, vocab, seed, scale=3.0):
    values = np.random.default_rng(seed).normal(0, scale, (positions, vocab))
    return values.astype(np.float32)


@pytest.mark.parametrize("widths", [(300,), (1, 299), (100, 3, 197), (11,) * 27 + (3,), (295, 5)])
@pytest.mark.parametrize("shift", [1.0, 1e-4])
def test_slices_of_the_vocabulary_add_up(widths, shift, monkeypatch):
    monkeypatch.setattr("gemma_convert.logits.divergence.BLOCK_BYTES", 8 * 300 * 4)
    reference = random_logits(9, 300, 1) + np.float32(20)
    native = reference + np.float32(shift) * random_logits(9, 300, 2, 1.0) - np.float32(5)
    whole, found = compare(reference, native), sliced(reference, native, widths)
    np.testing.assert_allclose(found.kl, whole.kl, rtol=1e-9, atol=1e-12)
    assert found.top1.tolist() == whole.top1.tolist()
    np.testing.assert_array_equal(found.overlap, whole.overlap)
    np.testing.assert_array_equal(found.difference, whole.difference)
    for ours, theirs in ((found.reference, whole.reference), (found.native, whole.native)):
        assert ours.ids.tolist() == theirs.ids.tolist() and ours.ids.shape == (9, 10)
        np.testing.assert_allclose(ours.probabilities, theirs.probabilities, rtol=1e-12)


def test_large_logits_do_not_overflow_in_any_order():
    reference = np.sort(random_logits(4, 60, 3, 2000.0), axis=1)
    native = reference + random_logits(4, 60, 4, 5.0)
    for turn in (slice(None), slice(None, None, -1)):
        whole = compare(reference[:, turn], native[:, turn])
        found = sliced(reference[:, turn], native[:, turn], (20, 20, 20))
        np.testing.assert_allclose(found.kl, whole.kl, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 15, 29])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_in_one_slice_poisons_its_token(value, place, side):
    sides = [random_logits(3, 30, 5), random_logits(3, 30, 6)]
    sides[side][1, place] = value
    whole, found = compare(*sides), sliced(*sides, (10, 10, 10))
    for figures in (whole, found):
        assert np.isnan(figures.kl).tolist() == [False, True, False]
        assert np.isnan(figures.difference).tolist() == [False, True, False]
        assert not figures.top1[1] and figures.overlap[1] == 0


def test_tokens_that_are_tied_in_the_reference_agree():
    """Equal ones always do; others where they are as near as noise makes them."""
    reference, native = np.zeros((2, 16)), np.zeros((2, 16))
    reference[:, [1, 4]], native[:, 4] = 1, 2
    reference[1, 4] -= 1e-3
    for found in (sliced(reference, native, (3, 3, 10)), compare(reference, native)):
        assert found.top1.tolist() == [True, False] and found.overlap.tolist() == [1, 1]
        assert replace(found, tied=np.array([0.0, 2e-3])).top1.tolist() == [True, True]
        assert replace(found, tied=np.array([2e-3, 0.0])).top1.tolist() == [True, False]


def test_likeliest_tokens_that_are_short_of_a_tie_do_not_overlap():
    reference = np.arange(20.0)[None]
    native = reference.copy()
    native[0, 9] = 10.5  # the eleventh likeliest, one behind the tenth
    for found in (sliced(reference, native, (7, 13)), compare(reference, native)):
        assert found.overlap.tolist() == [0.9]
        assert replace(found, tied=0.9).overlap.tolist() == [0.9]
        assert replace(found, tied=1.1).overlap.tolist() == [1.0]


def test_slices_that_do_not_belong_together_are_refused():
    for shapes in ([(2, 3), (2, 4)], [(2, 3), (3, 3)], [(3,), (3,)]):
        with pytest.raises(ValueError, match="shapes"):
            SlicedComparison().add(*(np.zeros(shape) for shape in shapes))
    total = SlicedComparison()
    with pytest.raises(ValueError, match="no logits"):
        total.result()
    total.add(np.zeros((2, 3)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="another number"):
        total.add(np.zeros((3, 3)), np.zeros((3, 3)))


def test_slices_cover_the_vocabulary_within_their_bounds():
    for vocab, embed, positions in ((512, 40, 9), (262144, 1536, 700), (262144, 5376, 10**6)):
        parts = streaming.vocabulary_slices(vocab, embed, positions)
        assert parts[0].start == 0 and parts[-1].stop == vocab
        assert all(one.stop == other.start for one, other in pairwise(parts))
        width = parts[0].stop
        assert width <= 256 or 4 * width * positions <= streaming.LOGIT_BYTES
        assert width <= 256 or 4 * width * embed <= streaming.TABLE_BYTES
    assert len(streaming.vocabulary_slices(262144, 1536, 700)) < 30


def test_drift_by_hand():
    reference = [[np.array([[3.0, 4.0], [0.0, 1.0]])], [np.ones((2, 2))], [np.ones((2, 2))]]
    native = [[np.array([[3.0, 4.5], [0.0, 1.01]])], [np.ones((2, 2))], [np.ones((2, 2))]]
    found = measure_drift(reference, native, 0.05)
    assert found.embedding == pytest.approx(0.1) and found.layers == (0.0,)
    assert found.final_norm == 0.0 and found.first == "the embedding"
    assert measure_drift(native, native, 0.05).first is None
    assert measure_drift([[np.zeros((1, 2))]] * 2, [[np.zeros((1, 2))]] * 2, 0.1).embedding == 0
    assert measure_drift([[np.zeros((1, 2))]] * 2, [[np.ones((1, 2))]] * 2, 0.1).first
    two = [[np.ones((1, 2)), np.ones((3, 2))], [np.ones((1, 2)), np.ones((3, 2))]]
    other = [[np.ones((1, 2)), np.ones((3, 2))], [np.ones((1, 2)), 2 * np.ones((3, 2))]]
    assert measure_drift(two, other, 0.1) == Drift(0.0, (), 1.0, 0.1)
    for wrong in ([native[0]], native[:2], [[one[0][:1]] for one in native]):
        with pytest.raises(ValueError, match=r"shape|shorter|argument"):
            measure_drift(reference, wrong, 0.1)


def test_the_first_stage_beyond_is_named_and_nan_is_beyond():
    assert Drift(0.0, (0.0, 0.2, 9.0), 0.0, 0.1).first == "layer 1"
    assert Drift(0.0, (0.0, float("nan")), 0.0, 0.1).first == "layer 1"
    assert Drift(0.0, (0.1,), 0.2, 0.1).first == "the final norm"
    assert Drift(float("nan"), (9.0,), 9.0, 0.1).first == "the embedding"
    assert Drift(0.0, (9.0,), 9.0, None).first is None


@pytest.mark.share(4, 2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_whole_model_has_the_same_figures(tiny, converted, media, layout, monkeypatch):
    """In many slices, with an image where the layout sees."""
    source = tiny("31b", layers=6)
    native = converted(source, layout)
    options = {"tokens": 3, "images": [media[0]] if layout == "gemma-jax" else []}
    whole = logit_check(source, native, **options, whole_model=True)
    monkeypatch.setattr(streaming, "_LEAST_ROWS", 100)
    monkeypatch.setattr(streaming, "LOGIT_BYTES", 0)
    streamed = logit_check(source, native, **options)
    assert whole.passed and streamed.passed and whole.verdict == streamed.verdict
    assert whole.whole_model and not streamed.whole_model and whole.drift is None
    one, other = whole.divergence, streamed.divergence
    assert (one.tokens, one.top1_agreement) == (other.tokens, other.top1_agreement)
    assert abs(one.kl_max - other.kl_max) < 1e-9
    assert abs(one.max_logit_difference - other.max_logit_difference) < 1e-4
    check_tokens(whole, streamed, images=len(options["images"]))
    drift = streamed.drift
    assert len(drift.layers) == len(read_architecture(source).text.layers)
    assert drift.first is None and drift.tolerance == TOLERANCE
    assert 0 < max(drift.layers) < TOLERANCE / 5 and 0 < drift.final_norm < TOLERANCE / 5
    found = json.loads(json.dumps(streamed.as_json(), allow_nan=False))
    assert found["layers"][2] == {"layer": 2, "drift": drift.layers[2]}
    assert found["first_drift"] is None and found["final_norm_drift"] == drift.final_norm
    assert found["embedding_drift"] == drift.embedding and not found["whole_model"]
    assert found["peak_memory_bytes"] > 1e8
    assert whole.as_json()["layers"] == [] and whole.as_json()["drift_tolerance"] is None


def check_tokens(whole, streamed, images):
    """Both have every token's KL at its place, and what is likely behind the worst ones."""
    for one, other in zip(whole.checked, streamed.checked, strict=True):
        assert (one.name, one.ids, one.pieces) == (other.name, other.ids, other.pieces)
        assert [kl is None for kl in one.kl] == [kl is None for kl in other.kl]
        np.testing.assert_allclose(one.compared, other.compared, atol=1e-9)
    for report in (whole, streamed):
        found, kl = report.divergence, [value for one in report.checked for value in one.compared]
        assert len(kl) == found.tokens and max(kl) == found.kl_max
        assert np.mean(kl) == pytest.approx(found.kl_mean)
        assert [one.medium for one in report.checked] == [None, None] + ["image"] * images
        assert report.worst[0].behind == found.worst and len(report.worst) == 5
        for one in report.worst:
            assert [each.token for each in one.reference] == [each.token for each in one.native]
            for each, same in zip(one.reference, one.native, strict=True):
                assert each.text is not None and each.probability > 0
                assert each.probability == pytest.approx(same.probability, rel=1e-3)


def scaled(array):
    return (array * 1.0625).astype(array.dtype)


GEMMA_JAX_MISTAKES = (
    ("layer_3/skip_scale", scaled, "layer 3"),
    ("layer_5/attn/query_norm/scale", lambda array: array[::-1], "layer 5"),
    ("layer_2/mlp/gating_einsum/w", lambda array: array[::-1], "layer 2"),
    ("layer_0/attn/attn_vec_einsum/w", lambda array: array[:, ::-1], "layer 0"),
    ("embedder/input_embedding", scaled, "the embedding"),
    ("final_norm/scale", scaled, "the final norm"),
    ("layer_4/post_ffw_norm/scale", lambda array: (array * np.nan).astype(array.dtype), "layer 4"),
)


@pytest.mark.share(3)
@pytest.mark.parametrize(("array", "edit", "place"), GEMMA_JAX_MISTAKES)
def test_a_mistake_is_named_by_its_layer(tiny, converted, tmp_path, array, edit, place):
    source = tiny("31b", layers=6)
    native = tmp_path / "native"
    shutil.copytree(converted(source, "gemma-jax"), native)
    alter(native, array, edit)
    report = logit_check(source, native, tokens=3)
    assert not report.passed and report.drift.first == place
    found = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert found["first_drift"] == place and f"2e-03 is {place}" in shown(report)
    if place.startswith("layer"):
        before = report.drift.layers[: int(place.split()[1])]
        assert all(drift < TOLERANCE / 5 for drift in before)


def shown(report):
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(report))
    return capture.get()


def test_a_wrong_window_is_named_by_the_first_sliding_layer(tiny, converted, tmp_path):
    """It stands in the settings, by which the native side runs."""
    native = shutil.copytree(converted(tiny("31b", layers=6), "gemma-jax"), tmp_path / "native")
    settings = json.loads((native / "gemma.json").read_text())
    settings["config"]["sliding_window_size"] += 1
    (native / "gemma.json").write_text(json.dumps(settings))
    report = logit_check(tiny("31b", layers=6), native, tokens=3)
    assert not report.passed and report.drift.first == "layer 0"


def test_layers_of_a_scan_out_of_order_are_named(tiny, converted, tmp_path):
    import tensorstore as ts

    source = tiny("31b")
    native = tmp_path / "native"
    shutil.copytree(converted(source, "maxtext", scan_layers=True), native)
    array = "scanned_blocks.global_layer.self_attention.query_norm.scale"
    items = native / "0" / "items"
    stored = open_stored(items, f"params.params.decoder.{array}", ocdbt=True, zarr3=True)
    store = ts.open(stored._store.spec(), open=True, write=True, read=True).result()
    store.write(np.asarray(stored)[:, ::-1]).result()
    report = logit_check(source, native, tokens=3)
    text = read_architecture(source).text
    assert report.drift.first == f"layer {text.period - 1}" and not report.passed


def test_rounding_sets_no_tolerance(tiny, converted):
    native = converted(tiny("31b", layers=6), "fast-llm")
    report = logit_check(tiny("31b", layers=6), native, tokens=3, dtype="bfloat16")
    assert report.drift.tolerance is None and report.drift.first is None
    assert max(report.drift.layers) > TOLERANCE and "first beyond" not in shown(report)


def test_golden_logits_are_read_in_slices_and_have_no_layers(
    tiny, converted, tmp_path, monkeypatch
):
    source, path = tiny("31b", layers=6), tmp_path / "golden.safetensors"
    save_golden(source, path, tokens=3)
    native = converted(source, "fast-llm")
    monkeypatch.setattr(streaming, "_LEAST_ROWS", 100)
    monkeypatch.setattr(streaming, "LOGIT_BYTES", 0)
    monkeypatch.setattr(running, "LayerwiseReference", None)
    monkeypatch.setattr(running, "TransformersLogits", None)
    streamed = logit_check(source, native, golden=path)
    whole = logit_check(source, native, golden=path, whole_model=True)
    assert streamed.drift is None and streamed.passed and whole.passed
    assert streamed.reference_device == whole.reference_device == "file"
    assert abs(whole.divergence.kl_max - streamed.divergence.kl_max) < 1e-9
    assert whole.divergence.tokens == streamed.divergence.tokens
    assert streamed.as_json()["layers"] == [] and "drift" not in shown(streamed)


def test_logits_before_the_layers_are_an_error(tiny, converted):
    for layout in ("fast-llm", "gemma-jax"):
        model = open_model(
            converted(tiny("31b", layers=6), layout), read_architecture(tiny("31b", layers=6))
        )
        stream = model.stream([TokenSequence("a", (5, 6))], "float32")
        with pytest.raises(ValueError, match="end"):
            next(stream.logits([slice(0, 10)]))


@pytest.mark.large
def test_whole_model_on_the_command_line(tiny, converted, monkeypatch, capsys):
    monkeypatch.setattr(running, "LayerwiseReference", None)
    native = str(converted(tiny("31b", layers=6), "fast-llm"))
    arguments = [
        "logit-check",
        str(tiny("31b", layers=6)),
        native,
        "--tokens",
        "3",
        "--whole-model",
    ]
    monkeypatch.setattr(sys, "argv", ["gemma-convert", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code and "both models whole" in capsys.readouterr().out


def test_states_come_in_the_order_of_the_sequences():
    sequences = [TokenSequence(str(n), (5,) * n) for n in (3, 100, 4)]
    groups = batches(sequences)
    assert groups == [[0, 2], [1]]
    states = [np.arange(2 * 64).reshape(2, 64, 1), -np.arange(128).reshape(1, 128, 1)]
    first, long, last = by_sequence(states, groups, sequences)
    assert first[:, 0].tolist() == [0, 1, 2] and last[:, 0].tolist() == [64, 65, 66, 67]
    assert long[:, 0].tolist() == [-n for n in range(100)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, sets glibc's malloc")
def test_blocks_freed_between_others_go_back_to_the_kernel():
    code = """
import numpy as np
from gemma_convert.cli.allocator import return_large_blocks

def resident():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) >> 10

return_large_blocks()
before = resident()
np.ones(3 << 20)
blocks = [np.ones(1 << 20) for _ in range(30)]
assert resident() > before + 200
del blocks[:-1]
assert resident() < before + 50, resident() - before
"""
    root = Path(check_module.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
