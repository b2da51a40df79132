"""The notation: views, conditions and paths, read and written; every error names text and part."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import A4B, E2B, load_architecture

from gemma_convert.errors import MappingError
from gemma_convert.mapping.notation import (
    Condition,
    Pattern,
    View,
    axis_of,
    join_path,
    parse_condition,
    parse_view,
    split_path,
)
from gemma_convert.model.architecture import AXES, FACTS

SPELLINGS = {"gate_up": ("gate", "up"), "kv": ("k", "v")}


def test_the_parts_of_a_view():
    view = parse_view("layers.{layer}.self_attn.q_proj.weight [(heads head_dim) embed]")
    assert view.pattern == Pattern("layers.{layer}.self_attn.q_proj.weight")
    assert view.dims == (("heads", "head_dim"), ("embed",))
    assert view.axes == ("layers", "heads", "head_dim", "embed")


def test_units_and_scalars():
    assert parse_view("a.depthwise [audio_conv 1 audio_kernel]").dims == (
        ("audio_conv",),
        (),
        ("audio_kernel",),
    )
    assert parse_view("a.bound []").dims == ()
    assert parse_view("layer_scalar [1]").axes == ()


@pytest.mark.parametrize(
    ("word", "axis"),
    [("layer", "layers"), ("layers", "layers"), ("kv", "kv"), ("head", "heads"),
     ("conv_stage", "conv_stages"), ("vit_layer", "vit_layers"), ("position", "positions")],
)  # fmt: skip
def test_a_placeholder_may_be_singular(word, axis):
    assert axis_of(word, "anywhere") == axis
    assert Pattern(f"a.{{{word}}}.b").axes == (axis,)


def words_of(axis):
    """The spellings of a placeholder: the axis word and, where it ends in s, its singular."""
    singular = axis.removesuffix("s")
    return [axis, singular] if axis.endswith("s") and axis_or_none(singular) == axis else [axis]


def axis_or_none(word):
    try:
        return axis_of(word, "")
    except MappingError:
        return None


@st.composite
def views(draw):
    """A view and, apart from it, its text: built by hand, not by the code under test."""
    axes = draw(st.lists(st.sampled_from(sorted(AXES)), unique=True, max_size=7))
    named = axes[: draw(st.integers(0, len(axes)))]
    literal = st.text(
        alphabet=string.ascii_letters + string.digits + "._/-", min_size=1, max_size=5
    )
    name = draw(literal)
    for axis in named:
        name += "{" + draw(st.sampled_from(words_of(axis))) + "}" + draw(literal)
    dims, shape, rest = [], [], axes[len(named) :]
    while rest:
        size = draw(st.integers(0, len(rest)))
        group, rest = rest[:size], rest[size:]
        dims.append(tuple(group))
        shape.append("1" if not group else group[0] if size == 1 else f"({' '.join(group)})")
    return (
        View(Pattern(name), tuple(dims)),
        f"{name} [{' '.join(shape)}]",
        (*named, *axes[len(named) :]),
    )


@given(views())
def test_views_are_read_and_written(case):
    view, text, axes = case
    assert parse_view(text) == view
    assert str(view) == text
    assert view.axes == axes


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a.weight", "A view is a name and its axes in brackets."),
        ("a.weight[embed]", "A view is a name and its axes in brackets."),
        ("a.weight [embed", "A view is a name and its axes in brackets."),
        ("a.weight [embed] ", "A view is a name and its axes in brackets."),
        ("a weight [embed]", "A view is a name and its axes in brackets."),
        (" [embed]", "A view is a name and its axes in brackets."),
        ("", "A view is a name and its axes in brackets."),
        ("a [embed, mlp]", "The axes hold a character that is not allowed."),
        ("a [Embed]", "The axes hold a character that is not allowed."),
        ("a [2]", "The axes hold a character that is not allowed."),
        ("a [embed] [mlp]", "The axes hold a character that is not allowed."),
        ("a [{layer} embed]", "The axes hold a character that is not allowed."),
        ("a [embd]", "`embd` is not an axis."),
        ("a [layer embed]", "`layer` is not an axis."),
        ("a [(heads head_size) embed]", "`head_size` is not an axis."),
        ("a [(heads head_dim embed]", "A parenthesis is not closed."),
        ("a [heads head_dim) embed]", "The parentheses do not match, or are empty or nested."),
        ("a [((heads head_dim)) embed]", "The parentheses do not match, or are empty or nested."),
        ("a [() embed]", "The parentheses do not match, or are empty or nested."),
        ("a [(heads 1) embed]", "`1` cannot stand in a group."),
        ("a [embed embed]", "The axis `embed` is used twice."),
        ("a [(heads embed) heads]", "The axis `heads` is used twice."),
        ("a.{layer} [layers embed]", "The axis `layers` is used twice."),
        ("a.{layer}.{layers} [embed]", "The axis `layers` is used twice."),
        ("a.{slayer} [embed]", "`slayer` is not an axis."),
        ("a.{layer [embed]", "A placeholder is not closed or not a word."),
        ("a.layer} [embed]", "A placeholder is not closed or not a word."),
        ("a.{} [embed]", "A placeholder is not closed or not a word."),
        ("a.{Layer} [embed]", "A placeholder is not closed or not a word."),
        ("a.{{layer}} [embed]", "A placeholder is not closed or not a word."),
    ],
)  # fmt: skip
def test_an_error_of_a_view_names_the_text_and_the_part(text, what):
    with pytest.raises(MappingError) as caught:
        parse_view(text)
    assert caught.value.what == what
    assert (caught.value.where or "") in (text, text.split(" [")[0])


@pytest.mark.parametrize(
    "text", ["a [11]", "a [embed1]", "a [1embed]", "a [embed(heads head_dim)]"]
)
def test_axes_are_separated_by_spaces(text):
    with pytest.raises(MappingError):
        parse_view(text)


@given(st.text(alphabet="ab_ []{}()1.layersembd", max_size=30))
def test_any_text_is_a_view_or_an_error(text):
    try:
        view = parse_view(text)
    except MappingError as error:
        assert error.what
    else:
        assert parse_view(str(view)) == view


@given(st.lists(st.sampled_from(["(heads", "head_dim)", "embed", "1", "(", ")"]), max_size=6))
def test_any_shape_is_a_view_or_an_error(tokens):
    try:
        view = parse_view(f"a [{' '.join(tokens)}]")
    except MappingError:
        return
    assert len(view.dims) == len([dim for dim in view.dims if dim]) + tokens.count("1")
    assert tuple(axis for dim in view.dims for axis in dim) == tuple(
        token.strip("()") for token in tokens if token not in ("1", "(", ")")
    )


def test_render():
    pattern = Pattern("layers.{layer}.mlp.{gate_up}_proj.weight")
    assert (
        pattern.render({"layers": 17, "gate_up": 0}, SPELLINGS) == "layers.17.mlp.gate_proj.weight"
    )
    assert pattern.render({"layers": 0, "gate_up": 1}, SPELLINGS) == "layers.0.mlp.up_proj.weight"
    assert pattern.render({"layers": 3, "gate_up": 1}, {}) == "layers.3.mlp.1_proj.weight"
    assert Pattern("norm.weight").render({"layers": 3}, SPELLINGS) == "norm.weight"
    assert Pattern("{kv}{layer}").render({"layers": 10, "kv": 1}, SPELLINGS) == "v10"


def test_conditions():
    condition = parse_condition("owns_kv & !moe")
    assert condition.terms == (("owns_kv", True), ("moe", False))
    assert condition.facts == ("owns_kv", "moe")
    assert parse_condition("!ple&  vision").terms == (("ple", False), ("vision", True))
    both = condition & parse_condition("audio")
    assert both.facts == ("owns_kv", "moe", "audio")
    assert Condition() & condition == condition


@pytest.mark.parametrize(
    ("text", "name", "layer", "holds"),
    [
        ("owns_kv", E2B, 14, True),
        ("owns_kv", E2B, 15, False),
        ("!owns_kv", E2B, 15, True),
        ("owns_kv & sliding", E2B, 14, False),
        ("owns_kv & !sliding", E2B, 14, True),
        ("ple & !moe", E2B, None, True),
        ("ple & !moe", A4B, None, False),
        ("moe & key_as_value", A4B, 5, True),
        ("moe & key_as_value", A4B, 4, False),
        ("sliding", A4B, None, False),
        ("!sliding", A4B, None, True),
    ],
)
def test_where_conditions_hold(text, name, layer, holds):
    index = {} if layer is None else {"layers": layer}
    assert parse_condition(text).holds(load_architecture(name), index) is holds


def test_no_condition_always_holds():
    assert Condition().holds(load_architecture(E2B), {})


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("own_kv", "`own_kv` is not a fact."),
        ("moe & dense", "`dense` is not a fact."),
        ("!sparse", "`sparse` is not a fact."),
        ("", "A condition is facts joined by `&`, with `!` for not."),
        ("moe &", "A condition is facts joined by `&`, with `!` for not."),
        ("moe & & ple", "A condition is facts joined by `&`, with `!` for not."),
        ("!!moe", "A condition is facts joined by `&`, with `!` for not."),
        ("moe | ple", "A condition is facts joined by `&`, with `!` for not."),
        ("! moe", "A condition is facts joined by `&`, with `!` for not."),
        ("MoE", "A condition is facts joined by `&`, with `!` for not."),
    ],
)
def test_an_error_of_a_condition(text, what):
    with pytest.raises(MappingError) as caught:
        parse_condition(text)
    assert (caught.value.what, caught.value.where) == (what, text or "")


@given(st.lists(st.tuples(st.sampled_from(sorted(FACTS)), st.booleans()), min_size=1, max_size=5))
def test_conditions_are_read(terms):
    text = " & ".join(fact if wanted else f"!{fact}" for fact, wanted in terms)
    assert parse_condition(text).terms == tuple(terms)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("params", ("params",)),
        ("params/params/decoder", ("params", "params", "decoder")),
        ("audio_encoder/'conformer/stacked_layers_0'/final_ln",
         ("audio_encoder", "conformer/stacked_layers_0", "final_ln")),
        ("'a/b'", ("a/b",)),
        ("'a/b'/'c/d/e'", ("a/b", "c/d/e")),
        ("x'a/b'y/z", ("xa/by", "z")),
    ],
)  # fmt: skip
def test_paths_are_split(text, keys):
    assert split_path(text) == keys


def test_paths_are_joined():
    assert join_path(("params", "a/b", "c")) == "params/'a/b'/c"
    assert join_path(("one",)) == "one"


KEY = st.text(alphabet=string.ascii_letters + string.digits + "/._{} é", min_size=1, max_size=8)


@given(st.lists(KEY, min_size=1, max_size=5))
def test_paths_keep_their_keys(keys):
    assert split_path(join_path(keys)) == tuple(keys)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a/'b/c", "A quote in a path is not closed."),
        ("a'", "A quote in a path is not closed."),
        ("a//b", "A path has an empty key."),
        ("/a", "A path has an empty key."),
        ("a/", "A path has an empty key."),
        ("", "A path has an empty key."),
        ("a/''/b", "A path has an empty key."),
    ],
)
def test_an_error_of_a_path(text, what):
    with pytest.raises(MappingError) as caught:
        split_path(text)
    assert (caught.value.what, caught.value.where) == (what, text or "")
