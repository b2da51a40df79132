"""Numbers as they are: no bit of any value changes on any path, there and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from native_checkpoints import edited, manifest, sums
from trees import read_safetensors

from gemma_convert import to_hf, to_native, verify
from gemma_convert.arrays.dtypes import TensorSpec, numpy_dtype
from gemma_convert.arrays.values import bits
from gemma_convert.layouts.registry import open_native
from gemma_convert.stores.orbax.reader import open_array, read_orbax_tree
from gemma_convert.stores.orbax.writer import OrbaxFormat, OrbaxWriter
from gemma_convert.stores.safetensors.reader import SafetensorsFolder
from gemma_convert.stores.safetensors.writer import SafetensorsWriter, output_shard

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
EXPONENT, WIDTH = {"bfloat16": 7, "float16": 10, "float32": 23}, {"float32": 32}

FORMS = {
    "maxtext": {"layout": "maxtext"},
    "maxtext files": {"layout": "maxtext", "ocdbt": False},
    "maxtext scanned": {"layout": "maxtext", "scan_layers": True, "compression": "zstd"},
    "gemma-jax": {"layout": "gemma-jax"},
    "gemma-jax files": {"layout": "gemma-jax", "ocdbt": False, "compression": "zstd"},
    "fast-llm": {"layout": "fast-llm"},
    "maxtext wide": {"layout": "maxtext", "dtype": "float32"},
}
MODELS = {
    "bfloat16": {"family": "26b-a4b", "layers": 6},
    "float16": {"family": "31b", "layers": 6},
    "float32": {"family": "e2b", "layers": 10},
}
CHAINS = {
    "bfloat16": ("maxtext scanned", "gemma-jax files", "fast-llm", "maxtext"),
    "float16": ("fast-llm", "maxtext scanned", "gemma-jax"),
    "float32": ("gemma-jax", "maxtext files", "gemma-jax files"),
}
EMBEDDINGS = (
    "params/params/token_embedder/embedding",
    "embedder/input_embedding",
    "embeddings.word_embeddings_weight/weights",
)
BOUNDS = ("input_min", "input_max", "output_min", "output_max")
"""The native side has some of them once, so that they are not edited apart."""


def odd_bits(dtype: str) -> np.ndarray:
    """Zeros, denormals, the smallest and largest, infinities, NaNs with payloads; of both signs."""
    mantissa, width = EXPONENT[dtype], WIDTH.get(dtype, 16)
    one, infinity = 1 << mantissa, (1 << (width - 1)) - (1 << mantissa)
    positive = [
        0, 1, one - 1, one, one + 1, infinity - 1, infinity, infinity + 1, infinity + (one >> 1),
        infinity + (one >> 1) + 5, infinity + one - 1,
    ]  # fmt: skip
    both = [*positive, *(value | 1 << (width - 1) for value in positive)]
    return np.array(both, f"u{width // 8}")


def odd(dtype: str, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """An edit that spreads odd numbers over an array."""

    def edit(values: np.ndarray) -> np.ndarray:
        flat, numbers = bits(values).reshape(-1).copy(), odd_bits(dtype)
        places = np.random.default_rng(seed).permutation(flat.size)[: len(numbers)]
        flat[places] = np.roll(numbers, seed)[: len(places)]
        return flat.view(values.dtype).reshape(values.shape)

    return edit


@pytest.fixture(scope="module")
def sources(tiny, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each dtype with odd numbers in every tensor; never written to."""
    folders = {}
    for dtype, options in MODELS.items():
        whole = tiny(**options, dtype=dtype)
        names = [name for name in read_safetensors(whole) if not name.endswith(BOUNDS)]
        edits = {name: odd(dtype, seed) for seed, name in enumerate(names)}
        folders[dtype] = edited(whole, tmp_path_factory.mktemp("odd") / dtype, edits)
    return folders


def forms_of(dtype: str) -> list[str]:
    """The forms that a model can have, each of them once, and most where it has experts."""
    if dtype == "float32":
        return ["maxtext files", "gemma-jax"]
    return [form for form in FORMS if dtype == "bfloat16" or "files" not in form]


def test_the_numbers_are_odd():
    for dtype, kind in DTYPES.items():
        with np.errstate(invalid="ignore"):
            values = odd_bits(dtype).view(kind).astype(np.float64)
        assert np.isnan(values).sum() == 8
        assert np.isinf(values).sum() == 2
        assert (values == 0).sum() == 2
        tiny_value = float(ml_dtypes.finfo(kind).smallest_normal)
        assert ((values != 0) & (np.abs(values) < tiny_value)).sum() == 4
        assert values[np.isfinite(values)].max() == float(ml_dtypes.finfo(kind).max)


@pytest.mark.share(5, 1)
@pytest.mark.parametrize(
    ("dtype", "form"), [(dtype, form) for dtype in DTYPES for form in forms_of(dtype)]
)
def test_there_and_back(sources, tmp_path, dtype, form):
    to_native(sources[dtype], tmp_path / "native", **FORMS[form])
    if dtype != "float32" and "wide" not in form:
        assert np.array_equal(*all_bits(tmp_path / "native", sources[dtype]))
    assert to_hf(tmp_path / "native", tmp_path / "back").bit_for_bit
    assert sums(tmp_path / "back") == sums(sources[dtype])


def all_bits(native: Path, source: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every number of the native arrays, and of the tensors that were converted, in order.

    But for the embedding, which is scaled; these models have nothing that is shared or filled in.
    """
    with open_native(native) as opened:
        ours = [
            opened.opener(name, 0).read(tuple((0, size) for size in spec.shape))
            for name, spec in opened.specs.items()
            if name not in EMBEDDINGS
        ]
    kept = {name: entry["kept"] for name, entry in manifest(native)["tensors"].items()}
    theirs = [
        values
        for name, values in read_safetensors(source).items()
        if kept[name] == "converted" and not name.endswith("language_model.embed_tokens.weight")
    ]
    return sorted_bits(ours), sorted_bits(theirs)


def sorted_bits(arrays: list[np.ndarray]) -> np.ndarray:
    return np.sort(np.concatenate([bits(np.ascontiguousarray(a)).reshape(-1) for a in arrays]))


@pytest.mark.share(3)
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_layout_to_layout(sources, tmp_path, dtype):
    last = sources[dtype]
    for number, form in enumerate(CHAINS[dtype]):
        to_native(last, tmp_path / str(number), **FORMS[form])
        last = tmp_path / str(number)
    assert verify(last).passed
    assert verify(last, against=sources[dtype]).passed
    assert to_hf(last, tmp_path / "back").bit_for_bit
    assert sums(tmp_path / "back") == sums(sources[dtype])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0, 2), (22,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scalars_and_arrays_of_nothing(tmp_path, dtype, shape):
    """What no weight of a Gemma 4 is, and the formats can hold all the same."""
    count = int(np.prod(shape))
    values = odd_bits(dtype)[-count:][:count].reshape(shape).view(numpy_dtype(dtype))
    spec = TensorSpec(dtype, shape)
    with SafetensorsWriter(tmp_path, [output_shard("model.safetensors", {"a": spec})]) as writer:
        writer.write("a", tuple((0, size) for size in shape), values)
    assert read_safetensors(tmp_path)["a"].tobytes() == values.tobytes()
    with SafetensorsFolder(tmp_path) as reader:
        assert reader.specs == {"a": spec}
        assert b"".join(map(bytes, reader.pieces("a"))) == values.tobytes()
        again = np.empty_like(values)
        reader.read_box(reader.tensors["a"], tuple((0, size) for size in shape), again)
        assert again.tobytes() == values.tobytes()
    for number, form in enumerate(
        [OrbaxFormat(), OrbaxFormat(ocdbt=False), OrbaxFormat(zarr3=False)]
    ):
        folder = tmp_path / str(number)
        orbax = OrbaxWriter(folder, form)
        orbax.declare({"a": (spec, tuple(size or 1 for size in shape))})
        box = tuple((0, size) for size in shape)
        orbax.write("a", box, values).result()
        orbax.write_tree({})
        array = open_array(read_orbax_tree(folder), "a")
        assert array.spec == spec
        assert array.read(box).tobytes() == values.tobytes()
        assert array.read(box, np.empty_like(values)).tobytes() == values.tobytes()
