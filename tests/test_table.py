"""The shipped tables load; every way to get a table wrong is an error that names its place."""

import re

import pytest
from native_tables import native_data, native_row, read_native
from tables import (
    huggingface_data,
    huggingface_row,
    maxtext_data,
    maxtext_row,
    read_huggingface,
    read_maxtext,
)

from gemma_convert.errors import MappingError, UsageError
from gemma_convert.mapping import table as table_module
from gemma_convert.mapping.notation import Condition, parse_condition
from gemma_convert.mapping.table import load_inventory, load_table, mappings_folder


def test_the_inventory_loads():
    inventory = load_inventory()
    assert inventory.spellings["gate_up"] == ("gate", "up")
    assert inventory.spellings["kv"] == ("k", "v")
    assert inventory.spellings["bound"] == ("input_min", "input_max", "output_min", "output_max")
    row = inventory.row("model.language_model.layers.{layer}.self_attn.{kv}_proj.weight")
    assert str(row.view).endswith("{kv}_proj.weight [(kv_heads head_dim) embed]")
    assert row.when == parse_condition("!key_as_value")
    assert row.optional == parse_condition("!owns_kv")
    assert row.where == "huggingface.toml, section 2, row 2"
    assert row.name(text_only=True).text == "model.layers.{layer}.self_attn.{kv}_proj.weight"
    assert row.name(text_only=False) is row.view.pattern
    assert inventory.row("model.language_model.layers.{layer}.nothing") is None


def test_conditions_of_section_and_row_are_joined():
    row = load_inventory().row("model.vision_tower.std_scale")
    assert row.when == parse_condition("vision & vision_standardized")
    norm = load_inventory().row("model.language_model.norm.weight")
    assert norm.when == Condition()
    assert norm.optional is None


def test_the_head_is_tied_to_the_embedding():
    tied = [row for row in load_inventory().rows if row.tied is not None]
    assert [row.view.pattern.text for row in tied] == ["lm_head.weight"]
    assert tied[0].tied == "model.language_model.embed_tokens.weight"
    assert load_inventory().row(tied[0].tied) is not None
    assert tied[0].name(text_only=True).text == "lm_head.weight"


def test_the_maxtext_table_loads():
    table = load_table("maxtext")
    assert table.layout == "maxtext"
    assert table.spellings == {"gate_up": ("0", "1"), "kv": ("key", "value")}
    scaled = [row for row in table.rows if row.scale is not None]
    assert [(row.hf.view.pattern.text, row.scale) for row in scaled] == [
        ("model.language_model.embed_tokens.weight", "embed")
    ]
    assert {row.tower for row in table.rows} == {None, "vision"}
    assert all(set(row.hf.view.axes) == set(row.native.axes) for row in table.rows)


def test_rows_of_a_hugging_face_row():
    table = load_table("maxtext")
    hf = table.inventory.row("model.language_model.layers.{layer}.mlp.down_proj.weight")
    dense, moe = table.rows_of(hf)
    assert (dense.when, moe.when) == (parse_condition("!moe"), parse_condition("moe"))
    assert str(dense) == (
        "model.language_model.layers.{layer}.mlp.down_proj.weight [embed mlp] | "
        "params/params/decoder/layers_{layer}/mlp/wo/kernel [mlp embed]"
    )
    assert table.rows_of(table.inventory.row("model.audio_tower.output_proj.bias")) == ()


def test_the_placement_of_scanned_layers():
    placement = load_table("maxtext").placements["scanned"]
    assert (placement.name, placement.axis, placement.after) == ("scanned", "layers", 1)
    assert [condition for condition, _ in placement.refused] == [parse_condition("ple")]
    sliding, full = placement.stacks
    assert (sliding.when, sliding.index) == (parse_condition("sliding"), ("block", "position"))
    assert (full.when, full.index) == (parse_condition("!sliding"), ("block",))
    assert sliding.start == full.start == "params/params/decoder/layers_{layer}/"
    assert sliding.end == "params/params/decoder/scanned_blocks/local_layers/"
    assert full.end == "params/params/decoder/scanned_blocks/global_layer/"


def test_the_conditions_of_carried_rows_match_names_and_prefixes():
    table = load_table("maxtext")
    tower = table.inventory.row("model.audio_tower.output_proj.bias")
    norm = table.inventory.row("model.language_model.layers.{layer}.self_attn.k_norm.weight")
    assert [entry.why for entry in table.carried if entry.matches(tower)] == [
        "MaxText has no audio tower"
    ]
    assert [entry.when for entry in table.carried if entry.matches(norm)] == [
        parse_condition("!owns_kv")
    ]


def test_the_tables_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (mappings_folder() / "huggingface.toml").is_file()
    assert (mappings_folder() / "maxtext.toml").is_file()


def test_an_unknown_layout():
    with pytest.raises(UsageError, match="There is no layout `megatron`") as caught:
        load_table("megatron")
    assert "maxtext" in caught.value.expected


@pytest.mark.parametrize("content", [None, b"a = ", b"\xff"])
def test_a_table_that_cannot_be_read(tmp_path, monkeypatch, content):
    if content is not None:
        (tmp_path / "maxtext.toml").write_bytes(content)
    monkeypatch.setattr(table_module, "mappings_folder", lambda: tmp_path)
    with pytest.raises(MappingError, match="cannot be read") as caught:
        load_table.__wrapped__("maxtext")
    assert caught.value.where == "maxtext.toml"


def put(values, key, value):
    values[key] = value


def huggingface(change):
    data = huggingface_data()
    change(data)
    return read_huggingface(data)


def maxtext(change):
    data = maxtext_data()
    change(data)
    return read_maxtext(data)


UNKNOWN_IN_MAXTEXT = {
    "maxtext.toml": lambda d: d,
    "maxtext.toml, section 2": lambda d: d["section"][1],
    "maxtext.toml, section 2, row 5": lambda d: d["section"][1]["rows"][4],
    "maxtext.toml, carried 3": lambda d: d["carried"][2],
    "maxtext.toml, adapter": lambda d: d["adapter"],
    "maxtext.toml, placement, scanned": lambda d: d["placement"]["scanned"],
    "maxtext.toml, placement, scanned, refused 1": lambda d: d["placement"]["scanned"]["refused"][
        0
    ],
    "maxtext.toml, placement, scanned, stack 2": lambda d: d["placement"]["scanned"]["stacks"][1],
}

UNKNOWN_IN_HUGGINGFACE = {
    "huggingface.toml": lambda d: d,
    "huggingface.toml, section 4": lambda d: d["section"][3],
    "huggingface.toml, section 4, row 2": lambda d: d["section"][3]["rows"][1],
}


@pytest.mark.parametrize("where", UNKNOWN_IN_MAXTEXT)
def test_an_unknown_key_of_a_native_table(where):
    with pytest.raises(MappingError) as caught:
        maxtext(lambda data: put(UNKNOWN_IN_MAXTEXT[where](data), "sclae", "embed"))
    assert (caught.value.what, caught.value.where) == ("Unknown key `sclae`.", where)
    assert "sclae" not in caught.value.expected


@pytest.mark.parametrize("where", UNKNOWN_IN_HUGGINGFACE)
def test_an_unknown_key_of_the_inventory(where):
    with pytest.raises(MappingError) as caught:
        huggingface(lambda data: put(UNKNOWN_IN_HUGGINGFACE[where](data), "optinal", "!owns_kv"))
    assert (caught.value.what, caught.value.where) == ("Unknown key `optinal`.", where)


ROW = "model.language_model.layers.{layer}."
NATIVE = "params/params/decoder/layers_{layer}/"

NATIVE_ROWS = [
    ({"native": "pre_ffw_norm/scale [emb]"}, "`emb` is not an axis.",
     f"{{}}: {NATIVE}pre_ffw_norm/scale [emb]"),
    ({"native": "pre_ffw_norm/scale [embed embed]"}, "The axis `embed` is used twice.",
     f"{{}}: {NATIVE}pre_ffw_norm/scale [embed embed]"),
    ({"native": "pre_ffw_norm/scale [embed layers]"}, "The axis `layers` is used twice.",
     f"{{}}: {NATIVE}pre_ffw_norm/scale [embed layers]"),
    ({"native": "pre_ffw_norm/scale"}, "A view is a name and its axes in brackets.",
     f"{{}}: {NATIVE}pre_ffw_norm/scale"),
    ({"native": "pre_ffw_norm/{kv}/scale [embed]"},
     "The two sides of the row do not use the same axes.", "{}"),
    ({"native": "pre_ffw_norm/scale [mlp]"},
     "The two sides of the row do not use the same axes.", "{}"),
    ({"native": "pre_ffw_norm/scale [1]"},
     "The two sides of the row do not use the same axes.", "{}"),
    ({"native": "pre_ffw_norm/scale [embed heads]"},
     "The two sides of the row do not use the same axes.", "{}"),
    ({"hf": "pre_feedforward_norm.weight"},
     "The row names a tensor that huggingface.toml does not list.", "{}"),
    ({"hf": "pre_feedforward_layernorm.weight [embed]"},
     "The row names a tensor that huggingface.toml does not list.", "{}"),
    ({"when": "owns_kvs"}, "`owns_kvs` is not a fact.", "{}: owns_kvs"),
    ({"when": "owns_kv | moe"}, "A condition is facts joined by `&`, with `!` for not.",
     "{}: owns_kv | moe"),
    ({"when": True}, "`when` is a string.", "{}"),
    ({"scale": "width"}, "`width` is not an axis.", f"{{}}: {ROW}pre_feedforward_layernorm.weight"),
    ({"scale": 2}, "`scale` is a string.", "{}"),
    ({"native": 7}, "`native` is a string.", "{}"),
    ({"hf": None}, "`hf` is a string.", "{}"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "what", "where"), NATIVE_ROWS, ids=[str(change) for change, _, _ in NATIVE_ROWS]
)
def test_a_native_row_that_is_wrong(change, what, where):
    place = "maxtext.toml, section 2, row 9"
    data = maxtext_data()
    assert data["section"][1]["rows"][8]["hf"] == "pre_feedforward_layernorm.weight"
    data["section"][1]["rows"][8] |= change
    with pytest.raises(MappingError) as caught:
        read_maxtext(data)
    assert (caught.value.what, caught.value.where) == (what, where.replace("{}", place, 1))


def test_sides_with_different_axes_are_both_shown():
    with pytest.raises(MappingError) as caught:
        maxtext(
            lambda data: put(
                maxtext_row(data, "per_layer_projection.weight"), "native", "p/kernel [ple vocab]"
            )
        )
    assert (caught.value.expected, caught.value.found) == ("embed layers ple", "layers ple vocab")


def test_a_fact_of_a_layer_needs_a_layer_in_the_name():
    with pytest.raises(MappingError, match=r"no \{layer\}") as caught:
        maxtext(lambda data: put(maxtext_row(data, "norm.weight"), "when", "ple & sliding"))
    assert caught.value.where == "maxtext.toml, section 1, row 2"
    with pytest.raises(MappingError, match=r"`optional` asks about a layer") as caught:
        huggingface(lambda data: put(huggingface_row(data, "norm."), "optional", "!owns_kv"))
    assert caught.value.where == "huggingface.toml, section 1, row 2"


def test_a_hugging_face_row_is_mapped_or_carried():
    def drop(data):
        data["section"][1]["rows"].remove(maxtext_row(data, "layer_scalar"))

    with pytest.raises(MappingError) as caught:
        maxtext(drop)
    assert caught.value.what == "A Hugging Face row is neither mapped nor carried nor refused."
    assert caught.value.where == "maxtext.toml, for huggingface.toml, section 2, row 11"
    assert caught.value.found == f"{ROW}layer_scalar [1]"
    with pytest.raises(MappingError, match="neither mapped nor carried") as caught:
        maxtext(lambda data: put(data, "carried", data["carried"][:-2]))
    assert "model.audio_tower.output_proj.weight" in caught.value.found


def test_a_carried_entry_names_a_row_and_a_reason():
    with pytest.raises(MappingError) as caught:
        maxtext(lambda data: put(data["carried"][6], "hf", "model.audio_towers.*"))
    assert caught.value.what == "The entry names no tensor of huggingface.toml."
    assert caught.value.where == "maxtext.toml, carried 7"
    with pytest.raises(MappingError, match="`why` is a string"):
        maxtext(lambda data: data["carried"][6].pop("why"))
    with pytest.raises(MappingError, match="names no tensor"):
        maxtext(lambda data: put(data["carried"][6], "hf", "model.audio_tower."))


def test_an_unknown_tower():
    with pytest.raises(MappingError, match=r"An unknown tower\.") as caught:
        maxtext(lambda data: put(data["section"][2], "tower", "visual"))
    assert caught.value.where == "maxtext.toml, section 3"
    assert caught.value.found == "visual"


PLACEMENTS = [
    (lambda p: put(p, "after", -1), "`after` is a number of dimensions.", ""),
    (lambda p: put(p, "after", "1"), "`after` is a number of dimensions.", ""),
    (lambda p: p.pop("after"), "`after` is a number of dimensions.", ""),
    (lambda p: put(p, "axis", "depth"), "`depth` is not an axis.", ": scanned"),
    (lambda p: p.pop("axis"), "`axis` is a string.", ""),
    (lambda p: put(p["stacks"][0], "index", "block layer"),
     "A stack is indexed by `block` or `block position`.", ", stack 1"),
    (lambda p: put(p["stacks"][1], "index", ""),
     "A stack is indexed by `block` or `block position`.", ", stack 2"),
    (lambda p: put(p["stacks"][0], "when", "local"), "`local` is not a fact.", ", stack 1: local"),
    (lambda p: put(p["stacks"][0], "from", "params/params/decoder/layers/"),
     "`when` asks about a layer, but the name has no {layer}.", ", stack 1"),
    (lambda p: p["stacks"][1].pop("to"), "`to` is a string.", ", stack 2"),
    (lambda p: put(p, "stacks", {}), "`stacks` is a list.", ""),
    (lambda p: put(p["refused"][0], "when", "small"), "`small` is not a fact.",
     ", refused 1: small"),
    (lambda p: p["refused"][0].pop("why"), "`why` is a string.", ", refused 1"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "what", "where"), PLACEMENTS)
def test_a_placement_that_is_wrong(change, what, where):
    with pytest.raises(MappingError) as caught:
        maxtext(lambda data: change(data["placement"]["scanned"]))
    assert caught.value.what == what
    assert caught.value.where == "maxtext.toml, placement, scanned" + where


FORMS = [
    ({"array": "params/params/"}, "`array` is a path with {array}."),
    ({"array": "{array}/{array}"}, "`array` is a path with {array}."),
    ({"a": "{array}_lora_a/value [(out) rank]"}, "A matrix of an adapter is a path with {array}"),
    ({"b": "kernel_lora_b/value [rank (out)]"}, "A matrix of an adapter is a path with {array}"),
    ({"targets": ["q_proj"]}, "`targets` names no weight that a row converts."),
    ({"targets": [f"{ROW}layer_scalar"]}, "An adapted weight is a matrix"),
    ({"targets": [f"{ROW}experts.gate_up_proj"]}, "An adapted weight is a matrix"),
]


@pytest.mark.parametrize(("change", "what"), FORMS)
def test_an_adapter_that_is_wrong(change, what):
    with pytest.raises(MappingError, match=re.escape(what)) as caught:
        maxtext(lambda data: data["adapter"].update(change))
    assert caught.value.where == "maxtext.toml, adapter"


def test_an_adapter_of_arrays_that_are_filled_in_says_why_they_are_carried():
    data = native_data("tunix")
    del data["adapter"]["unread"]
    with pytest.raises(MappingError, match="`unread` says why"):
        read_native(data, "tunix")


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ("gate up", "The spellings of `gate_up` are a list of distinct names."),
        (["0", "0"], "The spellings of `gate_up` are a list of distinct names."),
        (["0", 0], "The spellings of `gate_up` are a list of distinct names."),
    ],
)
def test_spellings_that_are_wrong(names, what):
    with pytest.raises(MappingError) as caught:
        maxtext(lambda data: put(data["spellings"], "gate_up", names))
    assert (caught.value.what, caught.value.where) == (what, "maxtext.toml")
    with pytest.raises(MappingError) as caught:
        huggingface(lambda data: put(data["spellings"], "gate_up", names))
    assert (caught.value.what, caught.value.where) == (what, "huggingface.toml")


def test_spellings_of_an_unknown_axis():
    with pytest.raises(MappingError, match="`gates` is not an axis") as caught:
        maxtext(lambda data: put(data["spellings"], "gates", ["0", "1"]))
    assert caught.value.where == "maxtext.toml: spellings.gates"


@pytest.mark.parametrize("names", [[], ["0"], ["0", "1", "2"]])
def test_an_axis_has_one_spelling_for_each_value(names):
    with pytest.raises(MappingError, match="gate_up"):
        maxtext(lambda data: put(data["spellings"], "gate_up", names))


HUGGINGFACE_ROWS = [
    ({"name": "norm.weight [embd]"}, "`embd` is not an axis.",
     "{}: model.language_model.norm.weight [embd]"),
    ({"name": "norm.weight"}, "A view is a name and its axes in brackets.",
     "{}: model.language_model.norm.weight"),
    ({"name": "norm.{vocab}.weight [vocab]"}, "The axis `vocab` is used twice.",
     "{}: model.language_model.norm.{vocab}.weight [vocab]"),
    ({"name": "norm.{lyer}.weight [embed]"}, "`lyer` is not an axis.",
     "{}: model.language_model.norm.{lyer}.weight"),
    ({"name": 1}, "`name` is a string.", "{}"),
    ({"when": "has_norm"}, "`has_norm` is not a fact.", "{}: has_norm"),
    ({"optional": ""}, "A condition is facts joined by `&`, with `!` for not.", "{}: "),
    ({"tied": 3}, "`tied` is a string.", "{}"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "what", "where"), HUGGINGFACE_ROWS)
def test_a_row_of_the_inventory_that_is_wrong(change, what, where):
    place = "huggingface.toml, section 1, row 2"
    with pytest.raises(MappingError) as caught:
        huggingface(lambda data: data["section"][0]["rows"][1].update(change))
    assert (caught.value.what, caught.value.where) == (what, where.replace("{}", place, 1))


def test_a_name_that_stands_twice():
    with pytest.raises(MappingError) as caught:
        huggingface(lambda data: data["section"][0]["rows"].append({"name": "norm.weight [vocab]"}))
    assert caught.value.what == "A name stands twice."
    assert caught.value.where == (
        "huggingface.toml, section 1, row 6 and huggingface.toml, section 1, row 2"
    )
    assert caught.value.found == "model.language_model.norm.weight"


@pytest.mark.parametrize("value", ["rows", {}, 3])
def test_sections_and_rows_are_lists_of_tables(value):
    with pytest.raises(MappingError, match="`section` is a list"):
        huggingface(lambda data: put(data, "section", value))
    with pytest.raises(MappingError, match="`rows` is a list") as caught:
        maxtext(lambda data: put(data["section"][0], "rows", value))
    assert caught.value.where == "maxtext.toml, section 1"
    with pytest.raises(MappingError, match="A table is expected") as caught:
        maxtext(lambda data: put(data["section"][0]["rows"], 1, "norm.weight"))
    assert caught.value.where == "maxtext.toml, section 1, row 2"


def test_a_table_says_its_layout():
    with pytest.raises(MappingError, match="`layout` is a string"):
        maxtext(lambda data: data.pop("layout"))


@pytest.mark.parametrize(
    ("key", "value"), [("spellings", []), ("placement", "scanned"), ("placement", ["scanned"])]
)
def test_spellings_and_placements_are_tables(key, value):
    with pytest.raises(MappingError) as caught:
        maxtext(lambda data: put(data, key, value))
    assert "maxtext.toml" in caught.value.where


@pytest.mark.parametrize("prefix", ["model.{lyer}.", "model.layers."])
def test_a_text_only_prefix_that_is_wrong(prefix):
    with pytest.raises(MappingError) as caught:
        huggingface(lambda data: put(data["section"][1], "text_only_prefix", prefix))
    assert caught.value.where.startswith("huggingface.toml, section 2")


def test_after_is_no_boolean():
    with pytest.raises(MappingError, match="`after`"):
        maxtext(lambda data: put(data["placement"]["scanned"], "after", True))


# Tables with shared, filled and refused rows.


def test_the_gemma_table_loads():
    table = load_table("gemma-jax")
    assert (table.layout, table.placements) == ("gemma-jax", {})
    assert [entry.name for entry in table.carried] == [
        "lm_head.weight",
        "model.vision_embedder.*",
        "model.embed_vision.*",
        "model.embed_audio.*",
    ]
    assert [row for row in table.rows if row.scale is not None] == []
    shared = {row.hf.view.pattern.text: row.share for row in table.rows if row.share}
    layer = "model.vision_tower.encoder.layers.{vit_layer}."
    assert shared == {
        layer + "self_attn.{kv}_proj.{bound}": "kv",
        layer + "mlp.{gate_up}_proj.{bound}": "gate_up",
    }
    filled = {row.native.pattern.text: row.fill for row in table.rows if row.fill is not None}
    assert filled == {
        "layer_{layer}/attn/kv_einsum/w": 0,
        "layer_{layer}/attn/k_einsum/w": 0,
        "layer_{layer}/attn/key_norm/scale": 1,
    }
    assert {row.tower for row in table.rows} == {None, "vision", "audio"}
    (refusal,) = table.refused
    assert (refusal.when, refusal.names) == (parse_condition("kv_sources_apart"), ())


def test_the_fast_llm_table_loads():
    table = load_table("fast-llm")
    assert (table.layout, table.placements) == ("fast-llm", {})
    assert {(row.scale, row.share, row.fill, row.tower) for row in table.rows} == {(None,) * 4}
    assert [refusal.when for refusal in table.refused] == [
        parse_condition(fact) for fact in ("ple", "kv_shared", "double_wide")
    ]
    assert [len(refusal.names) for refusal in table.refused] == [6, 0, 0]
    vision = table.inventory.row("model.vision_tower.std_scale")
    assert [entry.why for entry in table.carried if entry.matches(vision)] == [
        "Fast-LLM has no place for Gemma 4's vision tower"
    ]


@pytest.mark.parametrize("layout", ["gemma-jax", "fast-llm"])
def test_towers_are_known_by_their_names(layout):
    table = load_table(layout)
    towers = ("vision_encoder/entry/pos_emb", "audio_encoder/feature/norm_0/scale")
    assert [table.in_tower(name) for name in towers] == [layout == "gemma-jax"] * 2
    text = ("embedder/input_embedding", "layer_0/skip_scale", "decoder.0.norm_1.weight/weights")
    assert not any(table.in_tower(name) for name in text)


V_BOUND = "self_attn.{kv}_proj.{bound}"

SHARE_AND_FILL = [
    (V_BOUND, {"share": "heads_and_tails"}, "`heads_and_tails` is not an axis."),
    (V_BOUND, {"share": 2}, "`share` is a string."),
    (V_BOUND, {"share": "gate_up"}, "`share` is an axis that stands in the Hugging Face name."),
    (V_BOUND, {"share": "vit_heads"}, "`share` is an axis that stands in the Hugging Face name."),
    (V_BOUND, {"share": "bound"}, "The two sides of the row do not use the same axes."),
    (V_BOUND, {"share": None}, "`share` is a string."),
    ("self_attn.k_norm.weight", {"fill": 2}, "`fill` is 0 or 1."),
    ("self_attn.k_norm.weight", {"fill": -1}, "`fill` is 0 or 1."),
    ("self_attn.k_norm.weight", {"fill": True}, "`fill` is 0 or 1."),
    ("self_attn.k_norm.weight", {"fill": 1.0}, "`fill` is 0 or 1."),
    ("self_attn.k_norm.weight", {"fill": "1"}, "`fill` is 0 or 1."),
    ("self_attn.q_norm.weight", {"fill": 1}, "Only an optional tensor can be filled in."),
    ("self_attn.k_norm.weight", {"filled": 1}, "Unknown key `filled`."),
]


@pytest.mark.parametrize(("hf", "change", "what"), SHARE_AND_FILL)
def test_a_shared_or_filled_row_that_is_wrong(hf, change, what):
    data = native_data("gemma-jax")
    place, row = native_row(data, hf)
    row |= change
    with pytest.raises(MappingError) as caught:
        read_native(data, "gemma-jax")
    assert caught.value.what == what
    assert caught.value.where.startswith(f"gemma_jax.toml, {place}")


def test_a_row_that_loses_its_share_has_other_axes():
    data = native_data("gemma-jax")
    place, row = native_row(data, V_BOUND)
    del row["share"]
    with pytest.raises(MappingError, match="do not use the same axes") as caught:
        read_native(data, "gemma-jax")
    assert caught.value.where == f"gemma_jax.toml, {place}"
    assert "kv" in caught.value.expected.split()


REFUSALS = [
    ({"hf": ["model.language_model.nothing"]}, "names no tensor of huggingface.toml"),
    ({"hf": "model.language_model.norm.weight"}, "`hf` is a list of names."),
    ({"hf": [1]}, "`hf` is a list of names."),
    ({"when": "plee"}, "`plee` is not a fact."),
    ({"when": 1}, "`when` is a string."),
    ({"why": None}, "`why` is a string."),
    ({"because": "x"}, "Unknown key `because`."),
]


@pytest.mark.parametrize(("change", "what"), REFUSALS)
def test_a_refusal_that_is_wrong(change, what):
    data = native_data("fast-llm")
    data["refused"][0] |= change
    with pytest.raises(MappingError) as caught:
        read_native(data, "fast-llm")
    assert what in caught.value.what
    assert caught.value.where.startswith("fast_llm.toml, refused 1")


def test_a_tensor_that_is_no_longer_refused_needs_a_place():
    data = native_data("fast-llm")
    lost = data["refused"][0]["hf"].pop()
    with pytest.raises(MappingError, match="neither mapped nor carried nor refused") as caught:
        read_native(data, "fast-llm")
    assert lost in caught.value.found


@pytest.mark.parametrize("value", [{}, "ple", 3])
def test_refusals_are_a_list(value):
    data = native_data("fast-llm")
    data["refused"] = value
    with pytest.raises(MappingError, match="`refused` is a list"):
        read_native(data, "fast-llm")


@pytest.mark.parametrize("names", [["input_min"], ["a", "b", "c", "c"], list("abcde")])
def test_bounds_are_spelt_once_each(names):
    data = native_data("gemma-jax")
    data["spellings"]["bound"] = names
    with pytest.raises(MappingError, match="`bound`"):
        read_native(data, "gemma-jax")
