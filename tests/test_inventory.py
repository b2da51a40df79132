"""The inventory agrees with every published checkpoint, tensor by tensor and shape by shape."""

import pytest
from models import (
    A4B,
    DENSE,
    E2B,
    E4B,
    PUBLISHED,
    UNIFIED,
    WHERE,
    load_architecture,
    load_config,
    load_tensors,
    text_only,
)
from tables import huggingface_data, huggingface_row, read_huggingface

from gemma_convert.errors import MappingError
from gemma_convert.mapping.inventory import (
    axis_size,
    hf_tensors,
    huggingface_tensors,
    indices,
    shape_of,
)
from gemma_convert.mapping.notation import parse_view
from gemma_convert.model.config import parse_architecture

COUNTS = [(E2B, 2011, 60), (E4B, 2130, 54), (A4B, 1013, 0), (DENSE, 1188, 0), (UNIFIED, 677, 0)]
LAYER = "model.language_model.layers."


@pytest.mark.parametrize(("name", "count", "leftovers"), COUNTS)
def test_the_published_checkpoints_are_listed_exactly(name, count, leftovers):
    published = {tensor: spec.shape for tensor, spec in load_tensors(name).items()}
    assert len(published) == count
    listed = huggingface_tensors(load_architecture(name), kv_leftovers=True)
    assert sorted(listed.keys() - published.keys()) == []
    assert sorted(published.keys() - listed.keys()) == []
    assert listed == published


@pytest.mark.parametrize(("name", "count", "leftovers"), COUNTS)
def test_the_form_without_leftovers(name, count, leftovers):
    model = load_architecture(name)
    full = huggingface_tensors(model, kv_leftovers=True)
    lean = huggingface_tensors(model, kv_leftovers=False)
    assert len(lean) == count - leftovers
    shared = [layer.index for layer in model.text.layers if not layer.owns_kv]
    words = ("k_proj", "v_proj", "k_norm") if shared else ()
    assert full.keys() - lean.keys() == {
        f"{LAYER}{index}.self_attn.{word}.weight" for index in shared for word in words
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_are_listed_once_and_the_head_is_never_required(name):
    tensors = hf_tensors(load_architecture(name))
    names = [tensor.name for tensor in tensors]
    assert len(set(names)) == len(names)
    (head,) = [tensor for tensor in tensors if tensor.name == "lm_head.weight"]
    assert not head.required
    assert head.shape == (262144, load_architecture(name).text.embed)
    for leftovers in (True, False):
        assert "lm_head.weight" not in huggingface_tensors(load_architecture(name), leftovers)


def test_an_untied_head_is_required():
    config = load_config(DENSE)
    config["tie_word_embeddings"] = False
    tensors = hf_tensors(parse_architecture(config, WHERE))
    (head,) = [tensor for tensor in tensors if tensor.name == "lm_head.weight"]
    assert head.required


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_text_only_model_has_shorter_names_and_no_towers(name):
    model = parse_architecture(text_only(load_config(name)), WHERE)
    whole = huggingface_tensors(load_architecture(name), kv_leftovers=True)
    prefix = "model.language_model."
    assert huggingface_tensors(model, kv_leftovers=True) == {
        "model." + tensor.removeprefix(prefix): shape
        for tensor, shape in whole.items()
        if tensor.startswith(prefix)
    }


def test_what_a_tensor_knows_of_itself():
    tensors = {tensor.name: tensor for tensor in hf_tensors(load_architecture(E2B))}
    value = tensors[f"{LAYER}14.self_attn.v_proj.weight"]
    assert (value.index, value.shape, value.required) == (
        {"layers": 14, "kv": 1},
        (512, 1536),
        True,
    )
    leftover = tensors[f"{LAYER}15.self_attn.k_proj.weight"]
    assert (leftover.index, leftover.shape) == ({"layers": 15, "kv": 0}, (256, 1536))
    assert not leftover.required
    bound = tensors["model.vision_tower.encoder.layers.3.mlp.up_proj.output_min"]
    assert (bound.index, bound.shape) == ({"vit_layers": 3, "gate_up": 1, "bound": 2}, ())


def test_indices_run_with_the_first_axis_slowest():
    model = load_architecture(E2B)
    found = list(indices(("conv_stages", "gate_up"), model, "here"))
    assert found == [{"conv_stages": i, "gate_up": j} for i in (0, 1) for j in (0, 1)]
    assert list(indices((), model, "here")) == [{}]


def test_shapes_multiply_the_axes_of_a_group():
    model = load_architecture(A4B)
    view = parse_view("layers.{layer}.k [(kv_heads head_dim) 1 embed]")
    assert shape_of(view, model, {"layers": 4}) == (2048, 1, 2816)
    assert shape_of(view, model, {"layers": 5}) == (1024, 1, 2816)
    assert shape_of(parse_view("a []"), model, {}) == ()


def test_an_axis_without_a_size_names_its_view():
    with pytest.raises(MappingError) as caught:
        axis_size("head_dim", load_architecture(E2B), {"kv": 1}, "row 3")
    assert caught.value.what == "The axis `head_dim` has no size here."
    assert (caught.value.where, caught.value.found) == ("row 3", "index {'kv': 1}")
    with pytest.raises(MappingError, match="`experts` has no size") as caught:
        shape_of(parse_view("router [experts]"), load_architecture(E2B), {})
    assert caught.value.where == "router [experts]"


def test_a_row_for_what_the_model_lacks_is_an_error():
    data = huggingface_data()
    del huggingface_row(data, "router.scale")["when"]
    del huggingface_row(data, "router.proj")["when"]
    inventory = read_huggingface(data)
    assert len(hf_tensors(load_architecture(A4B), inventory)) == 1013 + 1
    with pytest.raises(MappingError, match="`experts` has no size"):
        hf_tensors(load_architecture(E2B), inventory)
