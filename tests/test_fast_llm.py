"""fast-llm end to end: tensors by the safetensors library against numpy by hand, and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml
from cases import FAMILIES
from commands import said
from fast_llm_by_hand import fast_llm_metadata, fast_llm_tensors, write_fast_llm
from native_checkpoints import (
    CARRIED,
    arrays_of,
    differing,
    edit_tensors,
    manifest,
    passes,
    sums,
)
from test_cli import fails
from trees import read_safetensors

from gemma_convert import SourceError, UsageError, inspect, to_hf, to_native, verify
from gemma_convert.layouts.fast_llm import layout as fast_llm
from gemma_convert.layouts.registry import open_native
from gemma_convert.model.config import read_architecture
from gemma_convert.stores.open_files import OpenFiles

LARGE = ("26b-a4b", "31b")
SMALL = ("e2b", "e4b")
METADATA = "metadata.yaml"
WEIGHTS = "model_0.safetensors"
QUERY = "decoder.3.mixer.query.weight/weights"

PLACELESS = (
    "embed_tokens_per_layer.weight",
    "per_layer_model_projection.weight",
    "per_layer_projection_norm.weight",
    "layers.{layer}.per_layer_input_gate.weight",
    "layers.{layer}.per_layer_projection.weight",
    "layers.{layer}.post_per_layer_input_norm.weight",
)
"""Below `model.language_model.`: what Fast-LLM has no place for in E2B and E4B."""


def by_hand(source: Path) -> dict[str, np.ndarray]:
    return fast_llm_tensors(read_safetensors(source), read_architecture(source))


def native_of(source: Path, out: Path, **options) -> Path:
    to_native(source, out, layout="fast-llm", **options)
    return out


def state_index(folder: Path) -> dict[str, str]:
    return yaml.safe_load((folder / METADATA).read_text())["metadata"]["state_index"]


# The tensors.


@pytest.mark.parametrize("family", LARGE)
def test_every_tensor_equals_numpy_written_by_hand(tiny, converted, family):
    out = converted(tiny(family), "fast-llm")
    assert not differing(arrays_of(out, "fast-llm"), by_hand(tiny(family)))
    assert {entry.name for entry in out.iterdir()} == {"hf", METADATA, WEIGHTS}
    assert state_index(out) == dict.fromkeys(by_hand(tiny(family)), WEIGHTS)


@pytest.mark.parametrize("family", LARGE)
def test_dtypes_that_are_asked_for(shallow, tmp_path, family):
    source = shallow(family, text_only=True)
    native_of(source, tmp_path / "wide", dtype="float32")
    expected = {name: array.astype(np.float32) for name, array in by_hand(source).items()}
    assert not differing(arrays_of(tmp_path / "wide", "fast-llm"), expected)
    report = to_native(tmp_path / "wide", tmp_path / "narrow", layout="fast-llm", dtype="bfloat16")
    assert not differing(arrays_of(tmp_path / "narrow", "fast-llm"), by_hand(source))
    assert all(row.values == 0 for row in report.lossy_rows)


@pytest.mark.parametrize("family", LARGE)
def test_tensors_are_those_that_fast_llm_itself_writes(oracle, tmp_path, family):
    out = native_of(oracle / "hf" / family, tmp_path / "out", dtype="float32")
    theirs = oracle / "fast_llm" / family
    assert not differing(arrays_of(out, "fast-llm"), read_safetensors(theirs))
    assert state_index(out).keys() == state_index(theirs).keys()


@pytest.mark.parametrize("family", LARGE)
def test_what_fast_llm_wrote_gives_back_the_original(oracle, tmp_path, family):
    original, native = oracle / "hf" / family, oracle / "fast_llm" / family
    report = to_hf(native, tmp_path / "back", like=original)
    assert sums(tmp_path / "back") == sums(original)
    assert not report.rounded
    passes(native, original)


def test_what_the_report_says(shallow, tmp_path):
    source, out = shallow("26b-a4b"), tmp_path / "out"
    report = to_native(source, out, layout="fast-llm")
    tensors, hf = by_hand(source), read_safetensors(source)
    assert (report.layout, report.framework, report.scanned) == ("fast-llm", "Fast-LLM", False)
    assert report.settings == {
        "pretrained.path": str(out),
        "pretrained.format": "fast_llm",
        "pretrained.model_weights": "true",
    }
    assert report.arrays_written == len(tensors)
    assert report.bytes_written == sum(array.nbytes for array in tensors.values())
    towers = {name for name in hf if ".language_model." not in name}
    assert report.tensors_carried == len(towers)
    assert report.carried_why == {"Fast-LLM has no place for Gemma 4's vision tower": len(towers)}
    assert not differing(read_safetensors(out / CARRIED.parent), {n: hf[n] for n in towers})
    assert (report.shared, report.filled, report.lossy_rows) == (0, (), ())


# Every file comes back.

ROUND_TRIPS = [
    ("26b-a4b", {}, {}),
    ("26b-a4b", {"layers": 6, "shards": 3, "dtype": "float32"}, {"text_only": True}),
    ("26b-a4b", {"layers": 6, "text_only": True, "dtype": "float16"}, {}),
    ("31b", {"layers": 6, "dtype": "float32"}, {}),
    ("31b", {"layers": 6, "shards": 3}, {}),
    ("31b", {"shards": 3, "text_only": True}, {}),
]


@pytest.mark.share(6, 4)
@pytest.mark.parametrize(("family", "made", "options"), ROUND_TRIPS)
def test_every_file_comes_back_and_is_verified(tiny, converted, tmp_path, family, made, options):
    source = tiny(family, **made)
    out = converted(source, "fast-llm", **options)
    report = to_hf(out, tmp_path / "back")
    hf, tensors = read_safetensors(source), arrays_of(out, "fast-llm")
    assert sums(tmp_path / "back") == sums(source)
    assert report.bit_for_bit
    assert report.identical == report.tensors == len(hf)
    assert not differing(tensors, by_hand(source))
    for against in (None, source):
        assert passes(out, against).checked >= len(tensors)
    assert passes(tmp_path / "back", out).checked == len(hf)


@pytest.mark.share(2)
@pytest.mark.parametrize("family", LARGE)
def test_small_blocks_give_the_same_files(shallow, converted, tmp_path, monkeypatch, family):
    monkeypatch.setattr("gemma_convert.mapping.plan.BLOCK_BYTES", 10_000)
    monkeypatch.setattr("gemma_convert.mapping.plan.GATHER_BYTES", 1_000)
    native_of(shallow(family), tmp_path / "cut")
    whole = converted(shallow(family), "fast-llm")
    for file in (WEIGHTS, METADATA):
        assert (tmp_path / "cut" / file).read_bytes() == (whole / file).read_bytes()
    passes(tmp_path / "cut")
    passes(tmp_path / "cut", shallow(family))
    to_hf(tmp_path / "cut", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(shallow(family))


def test_an_export_reads_every_byte_once(shallow, tmp_path, monkeypatch):
    """By the tensors that it writes: of transposed arrays piece by piece, and none for the seal."""
    monkeypatch.setattr("gemma_convert.mapping.plan.BLOCK_BYTES", 2_000)
    monkeypatch.setattr("gemma_convert.mapping.plan.GATHER_BYTES", 500)
    monkeypatch.setattr("gemma_convert.stores.safetensors.reader.SHORT_ROW_BYTES", 0)
    source = shallow("31b", text_only=True)
    native_of(source, tmp_path / "cut")
    pieces: list[int] = []
    fill = OpenFiles._fill

    def counted(self, descriptor, start, buffer, *names):
        pieces.append(len(buffer))
        fill(self, descriptor, start, buffer, *names)

    monkeypatch.setattr(OpenFiles, "_fill", counted)
    assert to_hf(tmp_path / "cut", tmp_path / "back").bit_for_bit
    written = sum(array.nbytes for array in arrays_of(tmp_path / "cut", "fast-llm").values())
    assert sum(pieces) == written
    assert len(pieces) > 1000
    assert sums(tmp_path / "back") == sums(source)


@pytest.mark.share(2)
@pytest.mark.parametrize("limit", [1, 20_000])
def test_a_file_is_closed_when_it_has_its_parameters(shallow, tmp_path, monkeypatch, limit):
    """Tensors follow in the order of the source; the one that reaches the limit ends a file."""
    monkeypatch.setattr(fast_llm, "FILE_PARAMETERS", limit)
    source, out = shallow("26b-a4b", text_only=True), tmp_path / "out"
    report = to_native(source, out, layout="fast-llm")
    index, expected = state_index(out), by_hand(source)
    groups: list[list[str]] = [[]]
    for name in report.plan.targets:
        if sum(expected[other].size for other in groups[-1]) >= limit:
            groups.append([])
        groups[-1].append(name)
    assert len(groups) == len(expected) if limit == 1 else 3 < len(groups) < len(expected)
    assert {file.name for file in out.glob("*.safetensors")} == set(index.values())
    assert index == {
        name: f"model_{number}.safetensors" for number, group in enumerate(groups) for name in group
    }
    for file in set(index.values()):
        data = (out / file).read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert header.keys() - {"__metadata__"} == {name for name in index if index[name] == file}
    assert not differing(arrays_of(out, "fast-llm"), expected)
    passes(out)
    passes(out, source)
    to_hf(out, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


def test_files_take_as_many_parameters_as_those_of_fast_llm():
    assert fast_llm.FILE_PARAMETERS == 2**32


def test_exports_with_options(shallow, converted, tmp_path):
    source = shallow("31b")
    out = converted(source, "fast-llm")
    to_hf(out, tmp_path / "text", text_only=True)
    expected = {
        name.replace("model.language_model.", "model."): array
        for name, array in read_safetensors(source).items()
        if ".language_model." in name
    }
    assert not differing(read_safetensors(tmp_path / "text"), expected)
    passes(tmp_path / "text", out)
    to_hf(out, tmp_path / "wide", dtype="float32", max_shard_size=300_000)
    wide = {name: array.astype(np.float32) for name, array in read_safetensors(source).items()}
    assert not differing(read_safetensors(tmp_path / "wide"), wide)
    passes(tmp_path / "wide", out)


def test_trained_float32_values_are_rounded_as_numpy_rounds(shallow, tmp_path):
    source, random = shallow("26b-a4b"), np.random.default_rng(1)
    trained = {
        name: (values * random.uniform(0.9, 1.1, values.shape)).astype(np.float32)
        for name, values in read_safetensors(source).items()
        if ".language_model." in name
    }
    architecture = read_architecture(source)
    tensors = fast_llm_tensors(trained, architecture)
    run = write_fast_llm(tmp_path / "run", tensors, fast_llm_metadata(architecture))
    report = to_hf(run, tmp_path / "back", like=source)
    expected = read_safetensors(source)
    expected |= {name: values.astype(ml_dtypes.bfloat16) for name, values in trained.items()}
    assert not differing(read_safetensors(tmp_path / "back"), expected)
    rounded = {n: int((expected[n].astype(np.float32) != trained[n]).sum()) for n in trained}
    assert report.rounded == {name: count for name, count in rounded.items() if count}
    passes(tmp_path / "back", run)


# Models that Fast-LLM cannot hold.


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("kv_shared", ["keep", "omit"])
def test_models_with_per_layer_embeddings_are_refused(shallow, tmp_path, family, kv_shared):
    source = shallow(family, kv_shared=kv_shared)
    with pytest.raises(UsageError) as caught:
        native_of(source, tmp_path / "out", text_only=True)
    error, layers = caught.value, len(read_architecture(source).text.layers)
    assert error.exit_code == 2
    assert error.what.startswith("Fast-LLM has no per-layer embeddings; ")
    assert "share the keys and values" in error.what
    assert ("width of the feed-forward" in error.what) == (family == "e2b")
    assert f"{family}, no place for {3 + 3 * layers} tensors: " in error.found
    assert all(f"model.language_model.{name}" in error.found for name in PLACELESS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["huggingface", "maxtext", "gemma-jax"])
def test_they_are_refused_at_the_command_line(shallow, converted, tmp_path, form):
    source = shallow("e2b") if form == "huggingface" else converted(shallow("e2b"), form)
    message = fails(2, "to-native", source, tmp_path / "out", "--format", "fast-llm")
    assert message.startswith("error: Fast-LLM has no per-layer embeddings")
    assert "per_layer_input_gate" in message
    assert list(tmp_path.iterdir()) == []


def test_layers_of_one_kind_with_several_sizes_are_refused(tiny, tmp_path):
    """Fast-LLM has one block for each kind of layer; a config may say more."""
    from gemma_convert.mapping.inventory import huggingface_tensors
    from gemma_convert.stores.safetensors.header import write_safetensors
    from gemma_convert.tiny.weights import random_weights

    source = tmp_path / "hf"
    made = {"layers": 6, "text_only": True, "config_spelling": "saved"}
    shutil.copytree(tiny("31b", **made), source)
    config = json.loads((source / "config.json").read_text())
    config["per_layer_config"]["0"] = {"head_dim": 2 * config["head_dim"]}
    (source / "config.json").write_text(json.dumps(config))
    shapes = huggingface_tensors(read_architecture(source), kv_leftovers=False)
    (source / "model.safetensors").unlink()
    write_safetensors(source / "model.safetensors", random_weights(shapes, 0, "bfloat16"))
    with pytest.raises(UsageError, match="the same sizes in all layers of a kind"):
        native_of(source, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_there_is_no_scanned_form(shallow, tmp_path):
    with pytest.raises(UsageError, match="no scanned form"):
        native_of(shallow("31b"), tmp_path / "out", scan_layers=True)


# What is damaged.


@pytest.fixture
def out(shallow, converted, tmp_path) -> Path:
    """A converted 31b that a test may damage."""
    shutil.copytree(converted(shallow("31b"), "fast-llm"), tmp_path / "out")
    return tmp_path / "out"


def one_bit(values: np.ndarray) -> np.ndarray:
    values.view(np.uint16).reshape(-1)[-1] ^= 1
    return values


@pytest.mark.parametrize("name", [QUERY, "decoder.5.output_scale/weights"])
def test_one_changed_bit_is_named(shallow, out, name):
    edit_tensors(out, {name: one_bit})
    for against in (None, shallow("31b")):
        assert list(verify(out, against=against).different) == [name]


def test_keys_and_values_exchanged_are_named(shallow, out):
    name = "decoder.3.mixer.key_value.weight/weights"
    edit_tensors(out, {name: lambda values: np.concatenate(np.split(values, 2)[::-1])})
    for against in (None, shallow("31b")):
        assert list(verify(out, against=against).different) == [name]


def rename_in_index(change):
    def damage(out: Path) -> None:
        metadata = yaml.safe_load((out / METADATA).read_text())
        change(metadata["metadata"]["state_index"])
        (out / METADATA).write_text(yaml.safe_dump(metadata))

    return damage


def write_metadata(text: str | bytes):
    data = text.encode() if isinstance(text, str) else text
    return lambda out: (out / METADATA).write_bytes(data)


def change_metadata(change):
    def damage(out: Path) -> None:
        metadata = yaml.safe_load((out / METADATA).read_text())
        change(metadata)
        (out / METADATA).write_text(yaml.safe_dump(metadata))

    return damage


def extra_tensor(out: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(out / WEIGHTS)
    tensors["head.output_weights/weights"] = tensors[QUERY].clone()
    save_file(tensors, out / WEIGHTS)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

DAMAGES = {
    "parent folder": rename_in_index(lambda index: index.update({QUERY: "../model_0.safetensors"})),
    "absolute": rename_in_index(lambda index: index.update({QUERY: "/etc/model_0.safetensors"})),
    "no weights": rename_in_index(lambda index: index.update({QUERY: "metadata.yaml"})),
    "a number": rename_in_index(lambda index: index.update({QUERY: 3})),
    "a number as name": rename_in_index(lambda index: index.update({3: WEIGHTS})),
    "missing file": rename_in_index(lambda index: index.update({QUERY: "model_7.safetensors"})),
    "missing entry": rename_in_index(lambda index: index.pop(QUERY)),
    "extra entry": rename_in_index(lambda index: index.update({"more/weights": WEIGHTS})),
    "empty index": rename_in_index(lambda index: index.clear()),
    "no index": change_metadata(lambda metadata: metadata.pop("metadata")),
    "index of another kind": change_metadata(lambda metadata: metadata.update(metadata=[1])),
    "another format": change_metadata(lambda metadata: metadata.update(format="llama")),
    "extra tensor": extra_tensor,
    "lost weights": lambda out: (out / WEIGHTS).unlink(),
    "cut weights": lambda out: (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:-2]),
    "not YAML": write_metadata("format: [fast_llm"),
    "not text": write_metadata(b"\xff\xfe\x00"),
    "not a mapping": write_metadata("- fast_llm\n"),
    "empty": write_metadata(""),
    "a bad value": write_metadata("format: !!bool maybe\n"),
    "an object": write_metadata("format: !!python/object/apply:os.getcwd []\n"),
    "nested without end": write_metadata("[" * 600),
    "a bomb": write_metadata(BOMB + "format: *i\n"),
    "a bomb as index": write_metadata(
        BOMB + "format: fast_llm\nmetadata: {state_index: {x: *i}}\n"
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_an_error_of_the_source(out, tmp_path, damage):
    DAMAGES[damage](out)
    for action in (inspect, lambda folder: to_hf(folder, tmp_path / "back")):
        with pytest.raises(SourceError) as caught:
            action(out)
        assert len(str(caught.value)) < 2000
    assert verify(out).different
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["../other.safetensors", "{}/other.safetensors", "model_0"])
def test_a_file_elsewhere_is_not_read(out, name):
    """Though it is there, and holds just what the state_index says."""
    shutil.copy(out / WEIGHTS, out.parent / "other.safetensors")
    shutil.copy(out / WEIGHTS, out / "model_0")
    index = dict.fromkeys(state_index(out), name.format(out.parent))
    rename_in_index(lambda old: old.update(index))(out)
    with pytest.raises(SourceError, match="not a plain file name"):
        inspect(out)


@pytest.mark.parametrize("shape", [[], [1, 1], [2]])
def test_a_tensor_of_another_shape_is_not_read_beyond_its_end(shallow, out, tmp_path, shape):
    from safetensors.torch import load_file, save_file

    name = "decoder.4.output_scale/weights"
    tensors = load_file(out / WEIGHTS)
    whole = tensors[name].repeat(2)[: 2 if shape == [2] else 1]
    tensors[name] = whole.reshape(shape).clone()
    save_file(tensors, out / WEIGHTS)
    with pytest.raises(SourceError, match="does not have the shape"):
        to_hf(out, tmp_path / "back")
    for against in (None, shallow("31b")):
        assert WEIGHTS in verify(out, against=against).different


@pytest.mark.parametrize("dtype", ["int8", "bool", "int32", "float64"])
def test_numbers_that_are_no_weights_are_not_exported(shallow, out, tmp_path, dtype):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(out / WEIGHTS)
    tensors[QUERY] = (tensors[QUERY].astype(np.float32) * 100).astype(dtype)
    save_file(tensors, out / WEIGHTS)
    shutil.rmtree(out / "hf")
    with pytest.raises(SourceError, match=f"(?s)dtype that weights do not have.*{QUERY}.*{dtype}"):
        to_hf(out, tmp_path / "back", like=shallow("31b"))
    assert not (tmp_path / "back").exists()


def test_the_same_values_in_a_wider_dtype_are_told(out, tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(out / WEIGHTS)
    tensors[QUERY] = tensors[QUERY].astype(np.float32)
    save_file(tensors, out / WEIGHTS)
    code, printed, _ = said("to-hf", out, tmp_path / "back")
    assert code == 0 and "tensors match its checksums" in printed and "no checksum" not in printed


def test_a_checkpoint_that_is_not_finished_is_refused(out, tmp_path):
    """Its tensors and metadata may all be there, while the journal says that more is to come."""
    (out / ".gemma-convert.journal").write_text('{"key": "0"}\n')
    for action in (inspect, verify, lambda folder: to_hf(folder, tmp_path / "back")):
        with pytest.raises(SourceError, match="unfinished"):
            action(out)


def test_the_manifest_is_that_of_any_other_layout(shallow, converted):
    ours = manifest(converted(shallow("31b"), "fast-llm"))
    theirs = manifest(converted(shallow("31b"), "maxtext", text_only=True))
    for key in ("shards", "files_sha256", "dtype", "family", "not_carried"):
        assert ours[key] == theirs[key]
    assert ours["tensors"] == theirs["tensors"]


# Reading by region.


def test_boxes_of_a_tensor_are_those_of_numpy(shallow, converted):
    out, random = converted(shallow("26b-a4b"), "fast-llm"), np.random.default_rng(7)
    tensors = arrays_of(out, "fast-llm")
    with open_native(out) as native:
        assert native.specs.keys() == tensors.keys()
        assert {array.ndim for array in tensors.values()} == {1, 2}
        for name in [*[*tensors][::7], "decoder.0.output_scale/weights", QUERY]:
            array = native.opener(name, 0)
            assert array.spec.shape == tensors[name].shape
            for whole in ((), (0,), (1,), (0, 1)):
                box = tuple(
                    (0, size)
                    if axis in whole
                    else (
                        int(start := random.integers(size)),
                        int(random.integers(1, size - start + 1)),
                    )
                    for axis, size in enumerate(tensors[name].shape)
                )
                found = array.read(box)
                expected = tensors[name][tuple(slice(at, at + length) for at, length in box)]
                assert found.dtype == expected.dtype
                np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))
                found[...] = 0  # a new array that may be written


def part(random: np.random.Generator, size: int) -> tuple[int, int]:
    """Where a part of an axis starts, and how long it is."""
    start = int(random.integers(size))
    return start, int(random.integers(1, size - start + 1))


@pytest.mark.parametrize(
    "box", [((0, 1),), ((0, 1), (0, 1), (0, 1)), ((-1, 2), (0, 1)), ((0, 1), (1, 1 << 20)), ()]
)
def test_boxes_outside_of_a_tensor_are_refused(shallow, converted, box):
    with open_native(converted(shallow("26b-a4b"), "fast-llm")) as native:
        array = native.opener(QUERY, 0)
        with pytest.raises(SourceError, match="unexpected shape"):
            array.read(box)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_recognised(shallow, converted, family):
    if family in LARGE:
        report = inspect(converted(shallow(family), "fast-llm"))
        assert (report.layout, report.family, report.scanned) == ("fast-llm", family, False)
        assert report.coverage.complete
        assert report.towers == ()
