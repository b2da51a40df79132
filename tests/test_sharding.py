"""Eight devices give the logits of one, and each of them holds about an eighth of the weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from compiling import QUICK_XLA
from PIL import Image
from test_sounds import noise, write

from gemma_convert.forward import sharding
from gemma_convert.forward.encoder import encoded
from gemma_convert.forward.stored import StoredArray, open_stored
from gemma_convert.layouts.gemma_jax import tree as gemma_jax_orbax
from gemma_convert.layouts.maxtext import tree as maxtext_orbax
from gemma_convert.layouts.registry import open_model
from gemma_convert.logits import streaming
from gemma_convert.logits.streaming import compared_slices
from gemma_convert.model.config import read_architecture
from gemma_convert.prompts.images import image_sequences
from gemma_convert.prompts.sounds import sound_sequences
from gemma_convert.prompts.text import token_sequences

ROOT = Path(sharding.__file__).parents[2]
DEVICES = 8
TOLERANCE = 1e-4
"""Largest difference of a logit: sums are taken in another order; 3e-5 was seen."""

SHARE = 6
"""An ordinary run has one case computed by eight devices, streamed and whole; `test_distributed`
splits a tower too."""

CASES = {
    "maxtext 31b scanned": ("maxtext", "31b", {"scan_layers": True}),
    "maxtext e2b": ("maxtext", "e2b", {}),
    "maxtext 26b-a4b": ("maxtext", "26b-a4b", {}),
    "gemma-jax e2b": ("gemma-jax", "e2b", {}),
    "gemma-jax 26b-a4b": ("gemma-jax", "26b-a4b", {}),
    "maxtext 31b untied": ("maxtext", "31b", {}),
}
UNTIED = {"ignore_facts": ("text_config.final_logit_softcapping",)}
WHOLE = ("maxtext 31b scanned", "gemma-jax 26b-a4b", "maxtext 31b untied")
SENSED = ("maxtext 26b-a4b", "gemma-jax e2b")
"""Those that are given an image, and a sound where the model hears; the others are given text."""


def logits_of(job, whole):
    """Logits of all compared positions, streamed in slices of 64 entries, or of the whole model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "_LEAST_ROWS", 64)
        patch.setattr(streaming, "LOGIT_BYTES", 0)
        return _logits_of(job, whole)


def _logits_of(job, whole):
    hf = Path(job["hf"])
    architecture = read_architecture(hf)
    if job["sensed"]:
        sequences = image_sequences(hf, architecture, [Path(job["image"])])
        if architecture.audio is not None:
            sequences += sound_sequences(hf, architecture, [Path(job["sound"])])
    else:
        sequences = token_sequences(hf, architecture, [], 3)
    model, text = open_model(Path(job["native"]), architecture), architecture.text
    if whole:
        ours = model.run(sequences, "float32")
        slices = [np.concatenate(list(ours.slices(n, 50))) for n in range(len(sequences))]
        pairs = zip(slices, sequences, strict=True)
        return np.concatenate([logits[one.compared] for logits, one in pairs])
    stream = model.stream(sequences, "float32")
    for _ in stream.stages():
        pass
    vocab = compared_slices(sequences, vocab=text.vocab, embed=text.embed)
    return np.concatenate(list(stream.logits(vocab)), axis=1)


def on_devices(tree):
    """Bytes of all arrays of a pytree, and the most of them that one device holds."""
    import jax

    held = dict.fromkeys(jax.devices(), 0)
    arrays = jax.tree.leaves(tree)
    for array in arrays:
        assert array.sharding.device_set == set(jax.devices())
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return sum(array.nbytes for array in arrays), max(held.values())


def eight_devices(folder):
    """The other side of the tests below, in a process of its own: logits and what devices hold."""
    import jax

    from gemma_convert.forward import decoder, jax_model

    held = {"layer": [0, 0], "tower": [0, 0], "tree": [0, 0], "table": [0, 0]}

    def note(kind, tree):
        found = on_devices(tree)
        held[kind] = [before + now for before, now in zip(held[kind], found, strict=True)]

    run_layer, encoders, whole = (
        decoder.layer,
        jax_model.JaxModel._encoders,
        jax_model.JaxModel._whole,
    )

    def layer(weights, hidden, *others):
        assert hidden.is_fully_replicated
        note("layer", weights)
        return run_layer(weights, hidden, *others)

    def noted(kind, original):
        def make(*arguments):
            tree = original(*arguments)
            note(kind, tree)
            return tree

        return make

    decoder.layer = layer
    jax_model.JaxModel._encoders = noted("tower", encoders)
    jax_model.JaxModel._whole = noted("tree", whole)
    head = jax_model.head
    jax_model.head = lambda table, *others: note("table", table) or head(table, *others)
    assert jax.device_count() == DEVICES
    found = {}
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        for mode in job["modes"]:
            for kind in held:
                held[kind] = [0, 0]
            logits = logits_of(job, mode == "whole")
            np.save(folder / f"{name} {mode}.npy", logits)
            found[f"{name} {mode}"] = dict(held)
    for name, check in (("stored", stored_parts), ("in memory", placed_parts)):
        found[name] = check(folder)
    (folder / "found.json").write_text(json.dumps(found))


def stored_parts(folder):
    """Which parts of an array in a file are read to place it, by the axes that it is said to have.

    It is [24 16 4] in chunks of [3 16 4].
    """
    stored = open_stored(folder, "array", ocdbt=False, zarr3=False)
    values, reads = np.asarray(stored), []
    read = StoredArray.__array__

    def noted(one, *arguments, **named):
        reads.append(one.shape)
        return read(one, *arguments, **named)

    StoredArray.__array__ = noted
    found = {}
    for axes in (("heads", "embed", "kv"), ("kv", "heads", "gate_up"), ("kv", "gate_up", "one")):
        reads.clear()
        placed = sharding.place(stored, axes)
        assert placed.dtype == values.dtype and np.array_equal(np.asarray(placed), values)
        for shard in placed.addressable_shards:
            assert np.array_equal(np.asarray(shard.data), values[shard.index])
        found[" ".join(axes)] = [reads[:], list(placed.addressable_shards[0].data.shape)]
    StoredArray.__array__ = read
    return found


def placed_parts(folder):
    """Shapes of what one device holds of arrays in memory."""
    values = np.arange(48 * 5, dtype=np.float32).reshape(48, 5)
    table = sharding.place(values, ("vocab", "embed"))
    rows = np.array([[47, 0], [7, 13]])
    found = sharding.gather(table, rows)
    assert found.is_fully_replicated and np.array_equal(found, values[rows])
    assert np.array_equal(sharding.gather(values, rows), values[rows])
    assert sharding.place(table, ("embed", "vocab")) is table
    asked = []
    for shape in ((48, 5), (5, 48), (5, 5)):
        part = values.reshape(-1)[: shape[0] * shape[1]].reshape(shape)

        def rows_of(first, last, part=part):
            asked.append([first, last])
            return part[first:last]

        placed = sharding.place_rows(shape, rows_of)
        assert np.array_equal(placed, part)
    tree = sharding.place_all({"a": {"b/c": values}, "b": values}, {"a/b/c": ("heads", "kv")})
    shapes = [tree["a"]["b/c"], tree["b"], table]
    return {
        "asked": asked,
        "shapes": [list(one.addressable_shards[0].data.shape) for one in shapes],
    }


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "noise.png")
    sound = write(folder / "noise.wav", noise(5000).tobytes())
    return {"image": str(folder / "noise.png"), "sound": str(sound)}


@pytest.fixture(scope="module")
def jobs(shallow, converted, media):
    def source(name, family, options):
        return shallow(family, "scan_layers" in options, untied=name.endswith("untied"))

    def more(name):
        return UNTIED if name.endswith("untied") else {}

    return {
        name: {
            "hf": str(source(name, family, options)),
            "native": str(
                converted(source(name, family, options), layout, **options, **more(name))
            ),
            "sensed": name in SENSED,
            "modes": ["streamed", "whole"] if name in WHOLE else ["streamed"],
            **media,
        }
        for name, (layout, family, options) in CASES.items()
    }


@pytest.fixture(scope="module")
def found(request, jobs, tmp_path_factory):
    """What eight simulated devices compute and hold; XLA makes them when a process starts."""
    import tensorstore as ts

    folder = tmp_path_factory.mktemp("devices")
    step = 1 if request.config.getoption("--every") else SHARE
    shared = {name: jobs[name] for name in list(jobs)[::step]}
    (folder / "jobs.json").write_text(json.dumps(shared))
    values = np.arange(24 * 16 * 4, dtype=np.float32).reshape(24, 16, 4).astype(ml_dtypes.bfloat16)
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/array/"}}
    layout = ts.ChunkLayout(chunk_shape=[3, 16, 4])
    store = ts.open(
        spec, create=True, dtype=ts.bfloat16, shape=values.shape, chunk_layout=layout
    ).result()
    store.write(values).result()
    code = f"import test_sharding; test_sharding.eight_devices(test_sharding.Path({str(folder)!r}))"
    flags = f"{QUICK_XLA} --xla_force_host_platform_device_count={DEVICES}"
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=1500)
    return SimpleNamespace(folder=folder, held=json.loads((folder / "found.json").read_text()))


@pytest.mark.share(SHARE)
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_one_device(jobs, found, name):
    expected = logits_of(jobs[name], whole=False)
    assert expected.std() > 0.1
    for mode in jobs[name]["modes"]:
        logits = np.load(found.folder / f"{name} {mode}.npy")
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


MOST_OF_A_DEVICE = {"e2b": 0.35, "26b-a4b": 0.17, "31b": 0.42}
"""The share of a layer's bytes that one of eight devices may hold; axes that eight does not divide
are many in the tiny 31B, few in the tiny 26B-A4B."""


@pytest.mark.share(SHARE)
@pytest.mark.parametrize("name", CASES)
def test_each_device_holds_a_part(jobs, found, name):
    family = CASES[name][1]
    for mode in jobs[name]["modes"]:
        held = found.held[f"{name} {mode}"]
        whole, of_one = held["layer"]
        assert 0 < of_one <= MOST_OF_A_DEVICE[family] * whole, of_one / whole
        for kind in ("tower", "tree"):
            whole, of_one = held[kind]
            assert (whole > 0) == (
                name in SENSED and mode == "streamed" if kind == "tower" else mode == "whole"
            )
            assert of_one <= 0.8 * whole, (kind, of_one / whole)
        whole, of_one = held["table"]
        assert 0 < of_one <= (0.7 if mode == "streamed" else 1) * whole


def test_a_part_is_read_alone_unless_chunks_would_be_decoded_again(found):
    parts = found.held["stored"]
    assert parts["heads embed kv"] == [[[3, 16, 4]] * 8, [3, 16, 4]]
    assert parts["kv heads gate_up"] == [[[24, 16, 4]], [24, 2, 4]]
    assert parts["kv gate_up one"] == [[[24, 16, 4]], [24, 16, 4]]


def test_arrays_in_memory_are_split_alike(found):
    parts = found.held["in memory"]
    assert parts["asked"] == [[0, 48], [0, 5], [0, 5]]
    assert parts["shapes"] == [[6, 5], [48, 5], [6, 5]]


def test_the_best_axis_that_divides_is_split():
    def split(axes, *shape, devices=8):
        return sharding.split_axis(shape, axes.split(), devices)

    assert split("embed heads head_dim", 16, 8, 8) == 1
    assert split("embed heads head_dim", 16, 12, 8) == 0
    assert split("embed heads head_dim", 12, 12, 8) == 2
    assert split("embed heads head_dim", 12, 12, 12) is None
    assert split("embed heads head_dim", 12, 12, 12, devices=4) == 1
    assert split("experts embed expert_mlp", 8, 8, 8) == 2
    assert split("experts embed expert_mlp", 8, 8, 9) == 1
    assert split("layers kv kv_heads embed head_dim", 8, 8, 4, 8, 8) == 3
    assert split("vocab embed", 16, 8) == 0
    assert split("embed", 8) is None and split("", 8, 8) is None
    with pytest.raises(KeyError):
        split("embed width", 8, 8)


@pytest.mark.share(1)
@pytest.mark.parametrize("name", CASES)
def test_every_array_of_a_tree_has_named_axes_of_its_own_shape(jobs, name):
    """Those of norms and of clip bounds may be missing; each other name is in the one table."""
    layout, family, _ = CASES[name]
    architecture = read_architecture(Path(jobs[name]["hf"]))
    folder = Path(jobs[name]["native"])
    if layout == "maxtext":
        from gemma_convert.layouts.maxtext import vision as tower
        from gemma_convert.layouts.maxtext.shapes import text_axes

        facts = maxtext_orbax.tree_facts(folder / "0" / "items")
    else:
        from gemma_convert.layouts.gemma_jax import vision as tower
        from gemma_convert.layouts.gemma_jax.shapes import TREE

        text_axes = TREE.text_axes

        facts = gemma_jax_orbax.tree_facts(folder)
    axes = dict(text_axes(architecture.text))
    if layout == "gemma-jax" or family != "e2b":
        axes |= tower.axes(architecture)
    if layout == "gemma-jax" and architecture.audio is not None:
        from gemma_convert.layouts.gemma_jax import audio as gemma_jax_audio

        axes |= gemma_jax_audio.axes(architecture)
    lengths = {}
    for quoted, fact in facts.items():
        path = quoted.replace("'", "")
        if len(fact.shape) < 2 or path.endswith("/scale") or "/clip_" in path or "/depth" in path:
            continue
        assert len(axes[path]) == len(fact.shape), path
        assert set(axes[path]) <= sharding.MESH_AXES.keys()
        part = path.split("/")[0] if "encoder" in path else "text"
        for axis, length in zip(axes[path], fact.shape, strict=True):
            lengths.setdefault((part, axis), set()).add(length)
    text = architecture.text
    assert lengths["text", "embed"] == {text.embed} and lengths["text", "vocab"] == {text.vocab}
    assert lengths["text", "heads"] == {layer.heads for layer in text.layers}
    assert lengths["text", "mlp"] == {layer.mlp for layer in text.layers}
    towers = {"vision_encoder": architecture.vision, "audio_encoder": architecture.audio}
    for part, tower in towers.items():
        if (part, "heads") in lengths:
            assert lengths[part, "heads"] == {tower.heads}


def products_of(jaxpr):
    """Every product and convolution of a jaxpr, those of the jaxprs in it too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for value in equation.params.values():
            for one in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    yield from products_of(inner)


def forward_passes(job, layout):
    """Name → a function of nothing that runs a text model or a tower of the checkpoint."""
    hf, folder = Path(job["hf"]), Path(job["native"])
    architecture = read_architecture(hf)
    text = architecture.text
    (image,) = image_sequences(hf, architecture, [Path(job["image"])])
    tokens = np.arange(6, dtype=np.int32)[None]
    if layout == "maxtext":
        from gemma_convert.layouts.maxtext import forward as maxtext
        from gemma_convert.layouts.maxtext import tree as maxtext_orbax
        from gemma_convert.layouts.maxtext import vision as maxtext_vision

        tree = maxtext_orbax.restore_tree(folder / "0" / "items")
        forward, vision = maxtext.forward, maxtext_vision.image_encoder
    else:
        from gemma_convert.layouts.gemma_jax import audio as gemma_jax_audio
        from gemma_convert.layouts.gemma_jax import forward as gemma_jax
        from gemma_convert.layouts.gemma_jax import tree as gemma_jax_orbax
        from gemma_convert.layouts.gemma_jax import vision as gemma_jax_vision

        tree = gemma_jax_orbax.restore_tree(folder)
        forward, vision = gemma_jax.forward, gemma_jax_vision.image_encoder
    for dtype in ("float32", "bfloat16"):
        yield f"text {dtype}", lambda dtype=dtype: forward(tree, text, tokens, dtype)
    if "vision_encoder" in tree:
        yield "vision", lambda: encoded(vision(tree, architecture, image.pixels, image.positions))
    if architecture.audio is not None and layout == "gemma-jax":
        (sound,) = sound_sequences(hf, architecture, [Path(job["sound"])])
        yield (
            "audio",
            lambda: encoded(gemma_jax_audio.sound_encoder(tree, architecture, sound.features)),
        )


@pytest.mark.share(3)
@pytest.mark.parametrize(
    "name", ["maxtext e2b", "maxtext 26b-a4b", "gemma-jax e2b", "gemma-jax 26b-a4b"]
)
def test_every_product_is_of_float32_precision(jobs, name):
    """An accelerator would take bfloat16 or TF32 for float32 else."""
    import jax
    from jax.lax import Precision

    passes = dict(forward_passes(jobs[name], CASES[name][0]))
    towers = {"maxtext e2b": set(), "gemma-jax e2b": {"vision", "audio"}}.get(name, {"vision"})
    assert passes.keys() == {"text float32", "text bfloat16"} | towers
    for kind, run in passes.items():
        products = list(products_of(jax.make_jaxpr(run)().jaxpr))
        assert len(products) > (8 if kind == "vision" else 30), kind
        assert any("conv" in one.primitive.name for one in products) == (kind == "audio")
        for one in products:
            assert one.params["precision"] == (Precision.HIGHEST, Precision.HIGHEST), one
