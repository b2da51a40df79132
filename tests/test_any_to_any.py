"""Native → native: the bits of one layout in another, as if it were converted directly."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gemma_jax_by_hand import gemma_jax_tree, nested
from maxtext_by_hand import maxtext_tree
from native_checkpoints import (
    CARRIED,
    OURS,
    alter,
    arrays_of,
    differing,
    edited,
    manifest,
    passes,
    sums,
)
from test_verification import change
from trees import read_safetensors, restore

from gemma_convert import SourceError, UsageError, inspect, to_hf, to_native, verify
from gemma_convert.model.config import read_architecture

EMBEDDING = "params/params/token_embedder/embedding"
EMBED_TOKENS = "model.language_model.embed_tokens.weight"

MAXTEXT = {"layout": "maxtext"}
SCANNED = {"layout": "maxtext", "scan_layers": True}
GEMMA = {"layout": "gemma-jax"}
FAST_LLM = {"layout": "fast-llm"}

FORMS = {"maxtext": MAXTEXT, "scanned": SCANNED, "gemma-jax": GEMMA, "fast-llm": FAST_LLM}
OF_FAMILY = {
    "e2b": ("maxtext", "gemma-jax"),
    "e4b": ("maxtext", "gemma-jax"),
    "26b-a4b": tuple(FORMS),
    "31b": tuple(FORMS),
}
DEPTHS = {"e2b": {"layers": 10}, "e4b": {"layers": 12}, "31b": {"layers": 6}}
PAIRS = [
    *(
        (family, one, two)
        for family in ("e2b", "26b-a4b")
        for one, two in itertools.permutations(OF_FAMILY[family], 2)
    ),
    ("31b", "maxtext", "scanned"),
    ("31b", "scanned", "fast-llm"),
    ("31b", "fast-llm", "gemma-jax"),
    ("31b", "gemma-jax", "maxtext"),
]
"""Every pair for a model with experts; without them, every form once on either side."""


def arrays(folder: Path, form: str) -> dict[str, np.ndarray]:
    return arrays_of(folder, FORMS[form]["layout"])


read_once = cache(arrays)
"""Of a folder that is made once and never written to."""


def equal(left: Path, right: Path) -> bool:
    return not differing(restore(left / "0" / "items"), restore(right / "0" / "items"))


# As if converted directly.


@pytest.mark.each(1)
@pytest.mark.parametrize(("family", "one", "two"), PAIRS)
def test_one_layout_becomes_another(shallow, converted, tmp_path, family, one, two):
    source, out = shallow(family, scanned="scanned" in (one, two)), tmp_path / "out"
    report = to_native(converted(source, **FORMS[one]), out, **FORMS[two])
    direct = converted(source, **FORMS[two])
    assert not differing(arrays(out, two), read_once(direct, two))
    assert manifest(out) == manifest(direct)
    for file in sums(direct / "hf"):
        if file != f"{OURS.name}/manifest.json":
            assert (out / "hf" / file).read_bytes() == (direct / "hf" / file).read_bytes()
    assert (out / CARRIED).exists() == (direct / CARRIED).exists()
    assert (report.family, report.layout, report.scanned) == (
        family, FORMS[two]["layout"], two == "scanned"
    )  # fmt: skip
    passes(out)
    assert inspect(out).coverage.complete
    assert to_hf(out, tmp_path / "back").bit_for_bit
    assert sums(tmp_path / "back") == sums(source)


@pytest.mark.share(2)
@pytest.mark.parametrize("family", ["26b-a4b", "31b"])
def test_text_only_forms_become_each_other(tiny, converted, tmp_path, family):
    source = tiny(family, layers=6)
    flat = converted(source, "maxtext", text_only=True)
    to_native(flat, tmp_path / "stacked", scan_layers=True)
    direct = converted(source, "maxtext", text_only=True, scan_layers=True)
    assert equal(tmp_path / "stacked", direct)
    to_native(tmp_path / "stacked", tmp_path / "flat")
    assert equal(tmp_path / "flat", flat)
    for name in ("stacked", "flat"):
        passes(tmp_path / name)
        passes(tmp_path / name, source)
        to_hf(tmp_path / name, tmp_path / f"{name}-hf")
        assert sums(tmp_path / f"{name}-hf") == sums(source)


@pytest.mark.share(2)
@pytest.mark.parametrize("one", ["maxtext", "gemma-jax"])
def test_what_was_filled_in_is_left_out_and_filled_in_again(tiny, converted, tmp_path, one):
    two = {"maxtext": "gemma-jax", "gemma-jax": "maxtext"}[one]
    source = tiny("e2b", layers=10, kv_shared="omit")
    report = to_native(converted(source, one), tmp_path / "out", layout=two)
    direct = converted(source, two)
    assert not differing(arrays(tmp_path / "out", two), arrays(direct, two))
    assert manifest(tmp_path / "out") == manifest(direct)
    assert len(report.filled) == (10 if two == "gemma-jax" else 0)
    passes(tmp_path / "out", source)
    to_hf(tmp_path / "out", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


@pytest.mark.parametrize("one", ["maxtext", "fast-llm"])
def test_towers_come_from_the_sidecar_where_there_is_a_place_for_them(
    tiny, converted, tmp_path, one
):
    source = tiny("31b", layers=6)
    report = to_native(converted(source, one, text_only=True), tmp_path / "out", **GEMMA)
    assert report.tensors_carried == 0
    direct = converted(source, "gemma-jax")
    assert not differing(arrays(tmp_path / "out", "gemma-jax"), arrays(direct, "gemma-jax"))


@pytest.mark.share(4)
@pytest.mark.parametrize(
    ("family", "one", "two"),
    [
        ("e2b", "gemma-jax", "maxtext"),
        ("31b", "gemma-jax", "gemma-jax"),
        ("26b-a4b", "gemma-jax", "scanned"),
        ("31b", "fast-llm", "maxtext"),
    ],
)
def test_towers_are_carried_on_request(tiny, converted, tmp_path, family, one, two):
    source, out = tiny(family, **DEPTHS.get(family, {})), tmp_path / "out"
    to_native(converted(source, **FORMS[one]), out, text_only=True, **FORMS[two])
    hf = read_safetensors(source)
    towers = {name: array for name, array in hf.items() if ".language_model." not in name}
    carried = read_safetensors(out / OURS)
    assert not differing({name: carried[name] for name in towers}, towers)
    assert not [name for name in arrays(out, two) if "vision" in name or "audio" in name]
    passes(out)
    passes(out, source)
    to_hf(out, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


def test_a_text_only_checkpoint_stays_one_in_its_layout(tiny, converted, tmp_path):
    source = tiny("31b", layers=6)
    text = converted(source, "gemma-jax", text_only=True)
    to_native(text, tmp_path / "out", layout="gemma-jax", dtype="float32")
    found = arrays(tmp_path / "out", "gemma-jax")
    expected = {n: a.astype(np.float32) for n, a in arrays(text, "gemma-jax").items()}
    assert not differing(found, expected)
    to_hf(tmp_path / "out", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Real arrays are read in many blocks; here blocks are made small."""
    monkeypatch.setattr("gemma_convert.mapping.plan.BLOCK_BYTES", 20_000)
    monkeypatch.setattr("gemma_convert.mapping.plan.GATHER_BYTES", 2_000)


@pytest.mark.large
@pytest.mark.parametrize(("one", "two"), [("gemma-jax", "scanned")])
def test_small_blocks_give_the_same_checkpoint(tiny, converted, tmp_path, small_blocks, one, two):
    source = tiny("26b-a4b", layers=6)
    to_native(converted(source, **FORMS[one]), tmp_path / "cut", **FORMS[two])
    direct = converted(source, **FORMS[two])
    assert not differing(arrays(tmp_path / "cut", two), arrays(direct, two))
    assert manifest(tmp_path / "cut") == manifest(direct)
    to_native(tmp_path / "cut", tmp_path / "again", **FORMS[one])
    direct = converted(source, **FORMS[one])
    assert not differing(arrays(tmp_path / "again", one), arrays(direct, one))


# Values that a root, or a dtype, would change.

ODD_BITS = {5: 0x7F7F, 700: 0x7FC1, 701: 0x7F80, 702: 0x0001, 9000: 0xFF7F, 20001: 0x7F7E}
"""Place in the embedding → bfloat16 bits: huge, NaN with a payload, infinite, denormal, huge."""


def odd(values: np.ndarray) -> np.ndarray:
    flat = values.view(np.uint16).reshape(-1)
    flat[list(ODD_BITS)] = list(ODD_BITS.values())
    return values


@pytest.mark.share(2, 1)
@pytest.mark.parametrize("through", ["gemma-jax", "scanned"])
def test_single_values_that_scaling_loses_come_back(tiny, tmp_path, small_blocks, through):
    source = edited(tiny("31b", layers=6), tmp_path / "hf", {EMBED_TOKENS: odd})
    report = to_native(source, tmp_path / "maxtext")
    assert 0 < report.exceptions <= len(ODD_BITS)
    to_native(tmp_path / "maxtext", tmp_path / "out", **FORMS[through])
    to_native(source, tmp_path / "direct", **FORMS[through])
    found, direct = (arrays(tmp_path / name, through) for name in ("out", "direct"))
    assert not differing(found, direct)
    exceptions = tmp_path / "out" / OURS / "exceptions.safetensors"
    assert exceptions.exists() == (through == "scanned")
    to_hf(tmp_path / "out", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)
    to_native(tmp_path / "out", tmp_path / "again")
    assert equal(tmp_path / "again", tmp_path / "maxtext")
    to_hf(tmp_path / "again", tmp_path / "back again")
    assert sums(tmp_path / "back again") == sums(source)


@pytest.mark.share(2)
@pytest.mark.parametrize("through", ["gemma-jax", "fast-llm"])
def test_an_embedding_that_is_carried_whole_comes_back(tiny, tmp_path, small_blocks, through):
    """Most float32 values times a root are rounded."""
    source = tiny("31b", layers=6, dtype="float32")
    to_native(source, tmp_path / "maxtext")
    assert EMBED_TOKENS in read_safetensors(tmp_path / "maxtext" / OURS)
    report = to_native(tmp_path / "maxtext", tmp_path / "out", **FORMS[through])
    to_native(source, tmp_path / "direct", **FORMS[through])
    assert not differing(*(arrays(tmp_path / name, through) for name in ("out", "direct")))
    assert not report.lossy_rows
    assert manifest(tmp_path / "out") == manifest(tmp_path / "direct")
    to_hf(tmp_path / "out", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


def coarse(values: np.ndarray) -> np.ndarray:
    """Powers of two, which scaling in float32 keeps, and a few values that it does not."""
    flat = values.view(np.uint16).reshape(-1)
    flat[:] = (np.arange(flat.size) % 50 + 100) << 7
    flat[1::300] |= 127
    return values


@pytest.mark.share(2, 1)
@pytest.mark.parametrize("edits", [{}, {EMBED_TOKENS: coarse}])
def test_a_tree_made_wider_goes_through_a_scaled_one(tiny, converted, tmp_path, edits):
    """The sidecar holds float32 values of a tensor that was bfloat16 in the original."""
    source = edited(tiny("31b", layers=6), tmp_path / "hf", edits)
    to_native(source, tmp_path / "wide", dtype="float32", **GEMMA)
    report = to_native(tmp_path / "wide", tmp_path / "maxtext")
    assert report.carried_why == {"its values do not come back from the stored dtype": 1}
    assert report.exceptions == 0
    passes(tmp_path / "maxtext")
    to_native(tmp_path / "maxtext", tmp_path / "again", **GEMMA)
    wide, again = (arrays(tmp_path / name, "gemma-jax") for name in ("wide", "again"))
    assert not differing(again, wide)


@pytest.mark.share(2, 1)
@pytest.mark.parametrize("edits", [{}, {EMBED_TOKENS: coarse}])
def test_and_its_export_is_the_original(tiny, tmp_path, edits):
    source = edited(tiny("31b", layers=6), tmp_path / "hf", edits)
    to_native(source, tmp_path / "wide", dtype="float32", **GEMMA)
    to_native(tmp_path / "wide", tmp_path / "maxtext")
    to_hf(tmp_path / "maxtext", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


def test_a_wide_export_of_a_scaled_tree_is_the_wide_original(tiny, converted, tmp_path):
    source = tiny("31b", layers=6)
    to_hf(converted(source, "maxtext"), tmp_path / "scaled", dtype="float32")
    to_hf(converted(source, "gemma-jax"), tmp_path / "unscaled", dtype="float32")
    assert sums(tmp_path / "scaled") == sums(tmp_path / "unscaled")


@pytest.mark.each(1)
@pytest.mark.parametrize("like", [False, True])
@pytest.mark.parametrize("two", ["gemma-jax", "fast-llm"])
def test_a_wider_scaled_tree_gives_the_values_of_the_original(tiny, converted, tmp_path, two, like):
    """A product that a bfloat16 value gives is that value, though float32 has others near."""
    source = tiny("31b", layers=6)
    wide, original = converted(source, "maxtext", dtype="float32"), source if like else None
    report = to_native(wide, tmp_path / "out", like=original, **FORMS[two])
    direct = converted(source, two, dtype="float32")
    assert not differing(arrays(tmp_path / "out", two), arrays(direct, two))
    assert not report.lossy_rows


@pytest.mark.parametrize("like", [False, True])
def test_an_embedding_rounded_to_bfloat16_is_reported(tiny, tmp_path, like):
    source = tiny("31b", layers=6)
    to_native(source, tmp_path / "maxtext", scaled_dtype="bfloat16")
    (lossy,) = manifest(tmp_path / "maxtext")["lossy_rows"]
    report = to_native(
        tmp_path / "maxtext", tmp_path / "out", like=source if like else None, **GEMMA
    )
    original = read_safetensors(source)[EMBED_TOKENS]
    root = np.float32(math.sqrt(original.shape[1]))
    scaled = (original.astype(np.float32) * root).astype(ml_dtypes.bfloat16)
    divided = (scaled.astype(np.float32) / root).astype(ml_dtypes.bfloat16)
    found = arrays(tmp_path / "out", "gemma-jax")["embedder/input_embedding"]
    assert not differing({"": found}, {"": original if like else divided})
    assert (divided != original).any()
    if not like:
        assert lossy in manifest(tmp_path / "out")["lossy_rows"]
        again = (divided.astype(np.float32) * root).astype(ml_dtypes.bfloat16)
        rounded = {row.tensor: row.values for row in report.lossy_rows}
        lost = int((again != scaled).sum())
        assert rounded == ({EMBED_TOKENS: lost} if lost else {})
        passes(tmp_path / "out")
        assert list(verify(tmp_path / "out", against=source).different) == [
            "embedder/input_embedding"
        ]


def trained(values: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(values.size).uniform(0.9, 1.1, values.shape)
    return (values * noise).astype(np.float32)


@pytest.mark.share(3, 1)
@pytest.mark.parametrize("two", ["gemma-jax", "fast-llm", "scanned"])
def test_a_trained_float32_tree_stays_what_it_is(tiny, tmp_path, two):
    """A trained embedding is no multiple of a root any more: what division rounds is reported."""
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    source = tiny("31b", layers=6, text_only=True)
    architecture = read_architecture(source)
    values = {name: trained(array) for name, array in read_safetensors(source).items()}
    trees = {scanned: maxtext_tree(values, architecture, scanned) for scanned in (False, True)}
    scaled = trained(trees[False]["token_embedder/embedding"])
    for tree in trees.values():
        tree["token_embedder/embedding"] = scaled
    run = tmp_path / "run"
    with ocp.PyTreeCheckpointer() as checkpointer:
        leaves = jax.tree.map(jnp.asarray, {"params": {"params": nested(trees[False])}})
        checkpointer.save(run / "7" / "items", leaves)
    report = to_native(run, tmp_path / "out", like=source, **FORMS[two])
    found = arrays(tmp_path / "out", two)
    assert {array.dtype.name for array in found.values()} == {"float32"}
    if two == "scanned":
        assert not report.lossy_rows
        assert not differing(found, trees[True])
        return
    name = {"gemma-jax": "embedder/input_embedding"}.get(
        two, "embeddings.word_embeddings_weight/weights"
    )
    root = np.float32(math.sqrt(architecture.text.embed))
    divided = scaled / root
    values["model.embed_tokens.weight"] = divided
    if two == "gemma-jax":
        assert not differing(found, gemma_jax_tree(values, architecture))
    else:
        assert not differing({name: found[name]}, {name: divided})
    (row,) = report.lossy_rows
    assert (row.tensor, row.reason) == ("model.embed_tokens.weight", "divided by a root again")
    assert row.values == np.count_nonzero(divided * root != scaled) > 0
    to_hf(tmp_path / "out", tmp_path / "back", dtype="float32")
    assert not differing(read_safetensors(tmp_path / "back"), values)


def test_a_trained_embedding_alone_goes_through_maxtext(tiny, tmp_path):
    """Its values lie in the sidecar, in float32, while all other tensors are bfloat16."""
    import orbax.checkpoint as ocp

    source = tiny("31b", layers=6)
    values = read_safetensors(source)
    values[EMBED_TOKENS] = trained(values[EMBED_TOKENS])
    tree = gemma_jax_tree(values, read_architecture(source))
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", nested(tree))
    to_native(tmp_path / "run", tmp_path / "maxtext", like=source)
    report = to_native(tmp_path / "maxtext", tmp_path / "out", **GEMMA)
    assert not differing(arrays(tmp_path / "out", "gemma-jax"), tree)
    assert not report.lossy_rows


@pytest.mark.large
def test_trained_towers_are_carried_unrounded(tiny, tmp_path):
    """MaxText has no place for the towers of E2B: what the gemma library trained travels along."""
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    source = tiny("e2b", layers=10)
    architecture, hf = read_architecture(source), read_safetensors(source)
    values = {
        name: array if ".language_model." in name else trained(array) for name, array in hf.items()
    }
    values |= {  # one bound for two, as in the library
        name: values[name.replace("v_proj", "k_proj").replace("up_proj", "gate_proj")]
        for name, array in values.items()
        if name.startswith("model.vision_tower.") and array.ndim == 0
    }
    tree = jax.tree.map(jnp.asarray, nested(gemma_jax_tree(values, architecture)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", tree)
    to_native(tmp_path / "run", tmp_path / "out", like=source)
    carried = read_safetensors(tmp_path / "out" / OURS)
    towers = {name: array for name, array in values.items() if array.dtype == np.float32}
    assert not differing({name: carried[name] for name in towers}, towers)
    passes(tmp_path / "out")
    to_native(tmp_path / "out", tmp_path / "again", **GEMMA)
    assert not differing(
        arrays(tmp_path / "again", "gemma-jax"), gemma_jax_tree(values, architecture)
    )
    report = to_hf(tmp_path / "out", tmp_path / "back")
    expected = {name: array.astype(ml_dtypes.bfloat16) for name, array in values.items()}
    assert not differing(read_safetensors(tmp_path / "back"), expected)
    assert report.rounded.keys() == {
        n for n, a in towers.items() if (expected[n].astype(np.float32) != a).any()
    }
    to_hf(tmp_path / "out", tmp_path / "wide", dtype="float32")
    found = read_safetensors(tmp_path / "wide")
    assert not differing({name: found[name] for name in towers}, towers)
    passes(tmp_path / "back", tmp_path / "out")


@pytest.mark.share(2)
@pytest.mark.parametrize(("one", "two"), [("maxtext", "gemma-jax"), ("gemma-jax", "fast-llm")])
def test_casts_are_those_that_were_asked_for_in_another_layout(tiny, converted, tmp_path, one, two):
    source = tiny("31b", layers=6)
    to_native(converted(source, one), tmp_path / "wide", layout=two, dtype="float32")
    direct = converted(source, two, dtype="float32")
    assert not differing(arrays(tmp_path / "wide", two), arrays(direct, two))
    to_native(tmp_path / "wide", tmp_path / "back", layout=one, dtype="bfloat16")
    assert not differing(arrays(tmp_path / "back", one), arrays(converted(source, one), one))


def test_a_value_changed_on_the_way_is_noticed(tiny, converted, tmp_path):
    """The checksums of the original travel along with every conversion."""
    source = tiny("31b", layers=6)
    shutil.copytree(converted(source, "gemma-jax"), tmp_path / "gemma")

    def one_bit(values):
        values.view(np.uint16).reshape(-1)[9] ^= 1
        return values

    alter(tmp_path / "gemma", "layer_2/mlp/linear/w", one_bit)
    to_native(tmp_path / "gemma", tmp_path / "fast", **FAST_LLM)
    passes(tmp_path / "fast")
    report = to_hf(tmp_path / "fast", tmp_path / "back")
    assert report.different == ("model.language_model.layers.2.mlp.down_proj.weight",)


# Sources without a sidecar.


def test_what_has_no_sidecar_needs_its_original(tiny, converted, tmp_path):
    source = tiny("31b", layers=6)
    bare = tmp_path / "bare"
    shutil.copytree(converted(source, "fast-llm"), bare, ignore=shutil.ignore_patterns("hf"))
    with pytest.raises(SourceError, match="no sidecar"):
        to_native(bare, tmp_path / "out", **GEMMA)
    assert not (tmp_path / "out").exists()
    to_native(bare, tmp_path / "out", like=source, **GEMMA)
    direct = arrays(converted(source, "gemma-jax"), "gemma-jax")
    assert not differing(arrays(tmp_path / "out", "gemma-jax"), direct)
    to_native(bare, tmp_path / "other", like=converted(source, "maxtext", text_only=True), **GEMMA)
    assert not differing(arrays(tmp_path / "other", "gemma-jax"), direct)
    whole = converted(source, "maxtext")
    with pytest.raises(SourceError, match="neither in the native checkpoint nor in the sidecar"):
        to_native(bare, tmp_path / "none", like=whole, **GEMMA)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("family", "one", "two"),
    [("26b-a4b", "fast-llm", "gemma-jax"), ("31b", "gemma-jax", "fast-llm")],
)
def test_checkpoints_of_the_real_frameworks_become_each_other(oracle, tmp_path, family, one, two):
    original = oracle / "hf" / family
    source, target = (oracle / form.replace("-", "_") / family for form in (one, two))
    to_native(source, tmp_path / "out", layout=two, like=original, dtype="float32")
    expected = arrays(target, two)
    found = arrays(tmp_path / "out", two)
    assert not differing(found, {name: a.astype(np.float32) for name, a in expected.items()})


@pytest.mark.parametrize("family", ["26b-a4b", "31b"])
@pytest.mark.parametrize("scanned", [True, False])
def test_maxtexts_own_checkpoints_become_each_other(oracle, tmp_path, family, scanned):
    forms = ("unscanned", "scanned") if scanned else ("scanned", "unscanned")
    source, target = (oracle / "maxtext" / f"{family}_{form}" for form in forms)
    to_native(source, tmp_path / "out", scan_layers=scanned, like=oracle / "hf" / family)
    assert equal(tmp_path / "out", target)


# MaxText to MaxText.


def test_trained_values_are_copied_bit_for_bit(tiny, tmp_path):
    """A trained float32 embedding is no bfloat16 times a root any more, and stays untouched."""
    source = tiny("31b", layers=6)
    to_native(source, tmp_path / "trained", dtype="float32")
    items = tmp_path / "trained" / "0" / "items"
    change(items, EMBEDDING, trained)
    change(items, "params/params/decoder/layers_3/mlp/wi_0/kernel", trained)
    shutil.rmtree(tmp_path / "trained" / "hf")
    with pytest.raises(SourceError, match="no sidecar"):
        to_native(tmp_path / "trained", tmp_path / "out", scan_layers=True)
    report = to_native(tmp_path / "trained", tmp_path / "out", scan_layers=True, like=source)
    assert not report.lossy_rows
    to_native(tmp_path / "out", tmp_path / "again")
    assert equal(tmp_path / "again", tmp_path / "trained")


def test_casts_are_those_that_were_asked_for(tiny, converted, tmp_path):
    source = tiny("31b", layers=6)
    to_native(converted(source, "maxtext"), tmp_path / "wide", dtype="float32", scan_layers=True)
    assert equal(tmp_path / "wide", converted(source, "maxtext", dtype="float32", scan_layers=True))
    report = to_native(converted(source, "maxtext"), tmp_path / "rounded", scaled_dtype="bfloat16")
    assert [row.tensor for row in report.lossy_rows] == [EMBED_TOKENS]
    assert equal(tmp_path / "rounded", converted(source, "maxtext", scaled_dtype="bfloat16"))


def test_what_is_refused(tiny, converted, tmp_path):
    with pytest.raises(UsageError, match="MaxText scans no model"):
        to_native(converted(tiny("e2b"), "maxtext"), tmp_path / "out", scan_layers=True)
    with pytest.raises(UsageError, match="`like` is for a native source"):
        to_native(tiny("31b"), tmp_path / "out", like=tiny("31b"))
    with pytest.raises(SourceError, match="do not match the original"):
        to_native(converted(tiny("31b"), "gemma-jax"), tmp_path / "out", like=tiny("31b", layers=6))
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_nothing(tiny, converted, tmp_path):
    source = converted(tiny("31b"), "fast-llm")
    report = to_native(source, tmp_path / "out", dry_run=True, **SCANNED)
    direct = to_native(tiny("31b"), tmp_path / "out", dry_run=True, **SCANNED)
    assert list(tmp_path.iterdir()) == []
    one, two = (json.loads(json.dumps(r.as_json()))["arrays"] for r in (report, direct))
    assert one == two
