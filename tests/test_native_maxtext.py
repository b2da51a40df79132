"""The JAX forward pass over MaxText's tree equals transformers, and every planted mistake shows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from maxtext_trees import CONFIGS, change, logits_of, make_model, maxtext_tree, write_maxtext

from gemma_convert.errors import SourceError
from gemma_convert.forward import decoder, decoder_layer
from gemma_convert.forward.prompt import Prompt
from gemma_convert.layouts.maxtext import forward as maxtext
from gemma_convert.layouts.maxtext import tree as maxtext_orbax
from gemma_convert.layouts.maxtext.forward import MaxTextLayer, MaxTextWeights
from gemma_convert.layouts.maxtext.shapes import check_shapes
from gemma_convert.logits.divergence import compare
from gemma_convert.model.config import parse_architecture, read_architecture
from gemma_convert.stores.orbax.finding import find_trees

LENGTH = 23
LIMIT = 1e-5


class Case:
    """One tiny model with its ids, its reference logits and its facts."""

    def __init__(self, kind):
        model = make_model(kind)
        self.kind = kind
        self.text = parse_architecture(model.config.to_dict(), Path("config.json")).text
        self.ids = np.random.default_rng(5).integers(3, 94, (2, LENGTH)).astype(np.int32)
        self.logits = logits_of(model, self.ids)
        self.tree = maxtext_tree(model)
        self.scanned = None if kind == "ple" else maxtext_tree(model, scanned=True)

    def kl(self, tree=None, text=None, dtype="float32"):
        """Largest KL over all tokens of a run with another tree or other facts."""
        found = np.asarray(maxtext.forward(tree or self.tree, text or self.text, self.ids, dtype))
        vocab = found.shape[-1]
        return compare(self.logits.reshape(-1, vocab), found.reshape(-1, vocab)).kl.max()


@pytest.fixture(scope="module")
def cases():
    return {kind: Case(kind) for kind in CONFIGS}


@pytest.mark.share(2, 1)
@pytest.mark.parametrize("kind", CONFIGS)
def test_forward_is_that_of_transformers(cases, kind):
    case = cases[kind]
    found = np.asarray(maxtext.forward(case.tree, case.text, case.ids))
    assert found.dtype == np.float32 and found.shape == (2, LENGTH, 94)
    np.testing.assert_allclose(found, case.logits, atol=2e-3)
    assert case.kl() < 1e-7
    assert case.logits.std() > 0.5  # logits that are all alike would prove nothing


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_scanned_tree_gives_the_same_logits_bit_for_bit(cases, kind):
    case = cases[kind]
    one = maxtext.forward(case.tree, case.text, case.ids)
    other = maxtext.forward(case.scanned, case.text, case.ids)
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_scanned_layers_are_taken_from_their_place():
    blocks = {
        "local_layers": {"a": np.arange(4 * 2 * 2).reshape(4, 2, 2)},
        "global_layer": {"a": 100 + np.arange(4 * 2).reshape(4, 2)},
    }
    model = make_model("dense")
    text = parse_architecture(model.config.to_dict(), Path("config.json")).text
    tree = {"decoder": {"scanned_blocks": blocks}}
    found = [maxtext.layer_params(tree, text, index)["a"][1].item() for index in range(6)]
    assert found == [4, 5, 102, 6, 7, 103]


def test_layers_of_one_kind_are_compiled_once(cases):
    case = cases["dense"]
    decoder_layer.layer.clear_cache()
    maxtext.forward(case.scanned, case.text, case.ids)
    assert decoder_layer.layer._cache_size() == 2


def test_head_over_slices_of_positions_is_the_whole(cases):
    case = cases["moe"]
    (hidden,) = maxtext.final_hidden(case.tree, case.text, [Prompt(case.ids)])
    table = maxtext.output_table(case.tree, case.text)
    parts = [
        maxtext.head(table, hidden[:, start : start + 9], case.text)
        for start in range(0, LENGTH, 9)
    ]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), case.logits, atol=2e-3)


def test_batches_of_other_lengths_run_together(cases):
    case = cases["ple"]
    prompts = [Prompt(case.ids[:1, :11]), Prompt(case.ids)]
    short, whole = maxtext.final_hidden(case.tree, case.text, prompts)
    np.testing.assert_allclose(short[0], whole[0, :11], atol=1e-4)


@pytest.mark.share(2, 1)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_bfloat16_is_as_near_as_that_of_transformers(cases, kind):
    import torch

    case = cases[kind]

    def mean_kl(logits):
        return compare(case.logits.reshape(-1, 94), logits.reshape(-1, 94)).kl.mean()

    found = np.asarray(maxtext.forward(case.tree, case.text, case.ids, "bfloat16"))
    theirs = logits_of(make_model(kind).to(torch.bfloat16), case.ids)
    assert found.dtype == np.float32
    assert 1e-5 < mean_kl(found) < 2 * mean_kl(theirs)


def test_router_weights_are_those_of_transformers():
    # By themselves: a norm behind the experts hides their common factor in the logits.
    import torch

    model = make_model("moe")
    hidden = np.random.default_rng(1).normal(size=(9, 44)).astype(np.float32)
    with torch.no_grad():
        _, weights, chosen = model.model.layers[1].router(torch.tensor(hidden))
    expected = np.zeros((9, 5), np.float32)
    np.put_along_axis(expected, chosen.numpy(), weights.numpy(), axis=1)
    text = parse_architecture(model.config.to_dict(), Path("config.json")).text
    weights = MaxTextLayer(maxtext_tree(model)["decoder"]["layers_1"])
    found = decoder_layer.router(
        weights, hidden[None], decoder_layer.kind_of(text, text.layers[1], type(weights))
    )
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_per_layer_inputs_are_those_of_transformers(cases):
    # By themselves as well: each layer's last norm hides their common factor.
    import torch

    case, model = cases["ple"], make_model("ple").model
    with torch.no_grad():
        ids = torch.tensor(case.ids, dtype=torch.long)
        embedded = model.embed_tokens(ids)
        expected = model.project_per_layer_inputs(embedded, model.get_per_layer_inputs(ids))
    weights, prompt = MaxTextWeights(case.tree, case.text), Prompt(case.ids)
    found = decoder.embed(weights, case.text, prompt, "float32")
    np.testing.assert_allclose(found, embedded.numpy(), rtol=1e-6)
    found = decoder.per_layer_inputs(weights, case.text, prompt, found)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


# Facts of the architecture, each wrong once.
WRONG_FACTS = {
    "window one too long": ("dense", lambda text: replace(text, window=text.window + 1)),
    "window one too short": ("dense", lambda text: replace(text, window=text.window - 1)),
    "full layers rotate all pairs": (
        "dense",
        lambda text: replace(text, rope_full=replace(text.rope_full, fraction=1.0)),
    ),
    "sliding layers rotate a quarter": (
        "dense",
        lambda text: replace(text, rope_sliding=replace(text.rope_sliding, fraction=0.25)),
    ),
    "bases of rotation swapped": (
        "dense",
        lambda text: replace(
            text,
            rope_sliding=replace(text.rope_sliding, theta=text.rope_full.theta),
            rope_full=replace(text.rope_full, theta=text.rope_sliding.theta),
        ),
    ),
    "no soft cap": ("dense", lambda text: replace(text, logit_softcap=None)),
    "other epsilon": ("dense", lambda text: replace(text, norm_epsilon=1e-2)),
    "one expert too many": ("moe", lambda text: replace(text, experts_per_token=3)),
    "one expert too few": ("moe", lambda text: replace(text, experts_per_token=1)),
    "keys and values of another layer": (
        "ple",
        lambda text: replace(
            text,
            layers=tuple(
                layer if layer.owns_kv else replace(layer, kv_source=layer.kv_source - 2)
                for layer in text.layers
            ),
        ),
    ),
}


@pytest.mark.share(3)
@pytest.mark.parametrize("name", WRONG_FACTS)
def test_wrong_fact_shows(cases, name):
    kind, wrong = WRONG_FACTS[name]
    case = cases[kind]
    assert case.kl(text=wrong(case.text)) > 10 * LIMIT


L1, L2 = "decoder/layers_1", "decoder/layers_2"
QUERY = f"{L1}/self_attention/query/kernel"
ROUTED = f"{L1}/mlp/moe_block/MoeBlock_0"


def swap(first, second):
    """Swaps two arrays or subtrees of a tree."""

    def swapped(tree):
        def at(path):
            below = tree
            for name in path.split("/"):
                below = below[name]
            return below

        one, other = at(first), at(second)
        return change(change(tree, first, lambda _: other), second, lambda _: one)

    return swapped


def alter(path, function):
    return lambda tree: change(tree, path, function)


def heads_as_head_dim(kernel):
    embed, heads, head_dim = kernel.shape
    return kernel.reshape(embed, head_dim, heads).transpose(0, 2, 1)


MISTAKES = {
    "heads and head_dim swapped": ("dense", alter(QUERY, heads_as_head_dim)),
    "two heads swapped": ("dense", alter(QUERY, lambda kernel: kernel[:, [1, 0, 2, 3]])),
    "gate and up swapped": ("dense", swap(f"{L1}/mlp/wi_0", f"{L1}/mlp/wi_1")),
    "keys and values swapped": (
        "dense",
        swap(f"{L1}/self_attention/key", f"{L1}/self_attention/value"),
    ),
    "two layers swapped": ("dense", swap("decoder/layers_0", "decoder/layers_1")),
    "a layer's scalar lost": ("dense", alter(f"{L2}/layer_scalar", np.ones_like)),
    "a norm's weight lost": ("dense", alter(f"{L2}/post_ffw_norm/scale", np.ones_like)),
    "a norm's weight with one added": (
        "dense",
        alter(f"{L2}/pre_ffw_norm/scale", lambda scale: scale + 1),
    ),
    "two norms swapped": ("dense", swap(f"{L2}/pre_ffw_norm", f"{L2}/post_ffw_norm")),
    "head order of the output": (
        "dense",
        alter(f"{L1}/self_attention/out/kernel", lambda kernel: kernel[::-1]),
    ),
    "embedding not scaled": (
        "dense",
        alter("token_embedder/embedding", lambda table: table / np.float32(40**0.5)),
    ),
    "embedding scaled twice": (
        "dense",
        alter("token_embedder/embedding", lambda table: table * np.float32(40**0.5)),
    ),
    "rows of the embedding shifted": (
        "dense",
        alter("token_embedder/embedding", lambda table: np.roll(table, 1, axis=0)),
    ),
    "router's scale lost": ("moe", alter(f"{L1}/mlp/pre_forward_scale_2", np.ones_like)),
    "experts' scale lost": ("moe", alter(f"{ROUTED}/per_expert_scale", np.ones_like)),
    "experts' gate and up swapped": ("moe", swap(f"{ROUTED}/wi_0", f"{ROUTED}/wi_1")),
    "experts shifted by one": ("moe", alter(f"{ROUTED}/wo", lambda wo: np.roll(wo, 1, axis=0))),
    "norms of dense and experts swapped": (
        "moe",
        swap(f"{L1}/mlp/post_feedforward_layernorm_1", f"{L1}/mlp/post_feedforward_layernorm_2"),
    ),
    "per-layer embeddings shifted by a layer": (
        "ple",
        alter(
            "decoder/per_layer_embedder/embed_tokens_per_layer",
            lambda table: np.roll(table, 6, axis=1),
        ),
    ),
    "per-layer projection's norm lost": (
        "ple",
        alter("decoder/per_layer_embedder/per_layer_projection_norm/scale", np.ones_like),
    ),
    "a layer's per-layer norm lost": (
        "ple",
        alter(f"{L1}/post_per_layer_input_norm/scale", np.ones_like),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_conversion_mistake_shows(cases, name):
    kind, mistake = MISTAKES[name]
    case = cases[kind]
    assert case.kl(tree=mistake(case.tree)) > 10 * LIMIT


@pytest.mark.parametrize("axis", [1, 2])
def test_scan_out_of_order_shows(cases, axis):
    case = cases["dense"]
    path = "decoder/scanned_blocks/local_layers/mlp/wo/kernel"
    wrong = change(case.scanned, path, lambda kernel: np.flip(kernel, axis))
    assert case.kl(tree=wrong) > 10 * LIMIT


def contents(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_restore_reads_the_highest_step_without_the_optimizer(tmp_path):
    def tree(value):
        table = np.full((3, 2), value, np.float32)
        return {"token_embedder": {"embedding": table}, "decoder": {"a": {"b": table.T.copy()}}}

    for step in (9, 10):
        rest = {"step": np.int32(step), "opt_state": [{"mu": np.ones((5, 2))}, None]}
        write_maxtext(tree(step), tmp_path, step, rest)
    (tmp_path / "11.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "12").mkdir()
    before = contents(tmp_path)
    (items,) = find_trees(tmp_path)
    assert items == tmp_path / "10" / "items"
    assert find_trees(tmp_path / "9") == [tmp_path / "9" / "items"]
    assert find_trees(items) == [items]
    found = maxtext_orbax.restore_tree(items)
    assert set(found) == {"token_embedder", "decoder"}
    np.testing.assert_array_equal(found["decoder"]["a"]["b"], np.full((2, 3), 10, np.float32))
    assert type(found["decoder"]["a"]["b"]) is np.ndarray
    assert set(maxtext_orbax.restore_tree(items, ["decoder"])) == {"decoder"}
    facts = maxtext_orbax.tree_facts(items)
    assert facts["decoder/a/b"].shape == (2, 3) and facts["decoder/a/b"].dtype == "float32"
    assert contents(tmp_path) == before


def test_restore_does_not_read_optimizer_state(tmp_path):
    write_maxtext({"decoder": {"a": np.ones(2)}}, tmp_path, 0, {"opt_state": {"mu": np.ones(7)}})
    (items,) = find_trees(tmp_path)
    seen = []
    import orbax.checkpoint as ocp

    original = ocp.type_handlers.NumpyHandler.deserialize

    async def spy(self, infos, args=None):
        seen.extend(info.name for info in infos)
        return await original(self, infos, args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ocp.type_handlers.NumpyHandler, "deserialize", spy)
        maxtext_orbax.restore_tree(items)
    assert seen == ["params.params.decoder.a"]


def test_bfloat16_stays_bfloat16(tmp_path):
    import ml_dtypes

    table = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    write_maxtext({"decoder": {"a": table}}, tmp_path)
    found = maxtext_orbax.restore_tree(find_trees(tmp_path)[0])["decoder"]["a"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, table)


def test_folders_that_hold_no_maxtext_tree_are_refused(tmp_path):
    with pytest.raises(SourceError, match="no Orbax checkpoint"):
        find_trees(tmp_path)
    with pytest.raises(SourceError, match="no Orbax checkpoint"):
        find_trees(tmp_path / "nowhere")
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "other", {"params": {"layer_0": {"a": np.ones(2)}}})
    with pytest.raises(SourceError, match="expected: token_embedder or decoder or vision_encoder"):
        maxtext_orbax.restore_tree(tmp_path / "other")
    write_maxtext({"decoder": {"a": np.ones(2)}}, tmp_path)
    with pytest.raises(SourceError, match="token_embedder"):
        maxtext_orbax.restore_tree(find_trees(tmp_path)[0], ("token_embedder", "decoder"))


@pytest.mark.parametrize("scanned", [False, True])
def test_shapes_that_do_not_fit_are_named(cases, tmp_path, scanned):
    case = cases["moe"]
    write_maxtext(case.scanned if scanned else case.tree, tmp_path)
    facts = maxtext_orbax.tree_facts(find_trees(tmp_path)[0])
    check_shapes(facts, case.text, tmp_path)
    for text, found in (
        (replace(case.text, vocab=95), r"embedding is \[94, 44\] instead of \[95, 44\]"),
        (replace(case.text, experts=6), "MoeBlock_0/wi_0"),
        (replace(case.text, layers=case.text.layers[:3]), "scanned_blocks|layers_3"),
    ):
        with pytest.raises(SourceError, match=found):
            check_shapes(facts, text, tmp_path)
    lost = {path: one for path, one in facts.items() if not path.endswith("per_expert_scale")}
    with pytest.raises(SourceError, match="per_expert_scale is missing"):
        check_shapes(lost, case.text, tmp_path)


ORACLE_TREES = (
    "e2b_unscanned",
    "e4b_unscanned",
    "26b-a4b_scanned",
    "26b-a4b_unscanned",
    "31b_scanned",
    "31b_scanned_training",
    "31b_unscanned",
)


@pytest.mark.share(2)
@pytest.mark.parametrize("name", ORACLE_TREES)
def test_maxtexts_own_trees_give_maxtexts_own_logits(oracle, name):
    from safetensors.numpy import load_file

    model = name.split("_")[0]
    text = read_architecture(oracle / "hf" / model).text
    (items,) = find_trees(oracle / "maxtext" / name)
    check_shapes(maxtext_orbax.tree_facts(items), text, items)
    tree = maxtext_orbax.restore_tree(items, maxtext.text_modules(text))
    noise = 5e-3 if text.ple else 1e-4
    theirs = load_file(oracle / "logits" / f"transformers_{model}.safetensors")
    found = np.asarray(maxtext.forward(tree, text, theirs["input_ids"].astype(np.int32)))
    np.testing.assert_allclose(found, theirs["logits"], atol=noise, rtol=0)
    saved = oracle / "logits" / f"maxtext_{name.removesuffix('_training')}.safetensors"
    np.testing.assert_allclose(found, load_file(saved)["logits"], atol=noise, rtol=0)
    vocab = found.shape[-1]
    divergence = compare(theirs["logits"].reshape(-1, vocab), found.reshape(-1, vocab))
    assert divergence.kl.max() < 1e-6
