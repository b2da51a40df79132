"""`gemma-convert mappings`: every published tensor once, values by hand, text and errors."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from contextlib import redirect_stdout
from functools import cache
from io import StringIO

import pytest
from cases import LAYOUTS
from models import A4B, DENSE, E2B, E4B, UNIFIED, load_architecture, load_tensors
from test_cli import TERMINAL, fails, run

from gemma_convert.arrays.dtypes import DTypePolicy
from gemma_convert.errors import SourceError, UsageError
from gemma_convert.mapping.planning import plan_to_native
from gemma_convert.mapping.table import load_inventory, load_table
from gemma_convert.published import published_names
from gemma_convert.published.models import named_model, published_architecture, usual_tensors
from gemma_convert.tasks.mappings import list_mappings

NAMES = {"e2b": E2B, "e4b": E4B, "12b": UNIFIED, "26b-a4b": A4B, "31b": DENSE}
FORMS = [
    (name, layout, scanned)
    for name in NAMES
    for layout in LAYOUTS
    for scanned in (False, True)
    if (layout == "maxtext" or not scanned) and (name[0] != "e" or layout != "fast-llm")
    if not (scanned and name[0] == "e")
    if (name, layout) not in {("e4b", "maxtext"), ("26b-a4b", "gemma-jax"), ("12b", "maxtext")}
]
"""Every way in which a tensor can go: three less, which have no way of their own."""
LAYER = "model.language_model.layers."
STYLE = re.compile(r"\x1b\[[0-9;]*m")
HEADER = "kind\thuggingface\taxes\tshape\tdtype\tnative\taxes\tshape\tdtype\tnote"


@cache
def listed(layout, model, scanned=False):
    return list_mappings(layout, model, scan_layers=scanned).tensors


def entries(layout, model, name, scanned=False):
    """(kind, HF axes, native name, axes, shape) of the entries of one converted tensor."""
    found = [one for one in listed(layout, model, scanned) if one.hf and one.hf.name == name]
    return [
        (one.kind, one.hf.axes, one.native.name, one.native.axes, one.native.shape) for one in found
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_published_model_needs_no_file(name):
    assert published_architecture(name) == load_architecture(NAMES[name])
    assert usual_tensors(published_architecture(name)) == load_tensors(NAMES[name])


def test_published_models_are_named_by_their_size():
    assert published_names() == ("e2b", "e4b", "12b", "26b-a4b", "31b")
    assert named_model("E4B") == named_model("e4b")


@pytest.mark.share(4)
@pytest.mark.parametrize(("name", "layout", "scanned"), FORMS)
def test_every_published_tensor_is_listed_whole_and_none_is_left_over(name, layout, scanned):
    source = load_tensors(NAMES[name])
    plan = plan_to_native(
        load_architecture(NAMES[name]), load_table(layout), source, DTypePolicy(), scanned=scanned
    )
    found = listed(layout, name, scanned)
    assert {one.hf.name for one in found} == set(source)
    assert all(
        (one.hf.dtype, one.hf.shape) == ("bfloat16", source[one.hf.name].shape) for one in found
    )
    natives = {one.native.name: one.native for one in found if one.native}
    assert natives.keys() == plan.targets.keys()
    for array, target in plan.targets.items():
        assert (natives[array].shape, natives[array].dtype) == (
            target.spec.shape,
            target.spec.dtype,
        )
    parts = Counter((one.hf.name, one.hf.axes) for one in found)
    assert set(parts.values()) == {1}
    places = Counter((one.native.name, one.native.axes) for one in found if one.kind == "converted")
    assert set(places.values()) == {1}
    kinds = Counter(one.kind for one in found)
    assert kinds["carried"] == len(plan.carried) and kinds["shared"] == len(plan.shared)
    assert kinds["filled"] == kinds["tied"] == 0
    assert all(one.why == plan.carried[one.hf.name] for one in found if one.kind == "carried")
    assert all(one.equals == plan.shared[one.hf.name] for one in found if one.kind == "shared")


def test_rows_known_by_hand():
    embedding = next(
        one for one in listed("maxtext", "e2b") if one.hf.name.endswith("embed_tokens.weight")
    )
    assert embedding.native.name == "params/params/token_embedder/embedding"
    assert (embedding.hf.dtype, embedding.native.dtype) == ("bfloat16", "float32")
    assert (embedding.scale_axis, embedding.scale) == ("embed", 1536**0.5)
    assert embedding.row == "maxtext.toml, section 1, row 1"
    assert entries("maxtext", "e2b", LAYER + "4.self_attn.q_proj.weight") == [
        (
            "converted",
            "(heads head_dim) embed",
            "params/params/decoder/layers_4/self_attention/query/kernel",
            "embed heads head_dim",
            (1536, 8, 512),
        )
    ]
    assert entries("gemma-jax", "e2b", LAYER + "3.self_attn.v_proj.weight") == [
        (
            "converted",
            "(kv_heads head_dim) embed",
            "layer_3/attn/kv_einsum/w",
            "kv=1 kv_heads embed head_dim",
            (2, 1, 1536, 256),
        )
    ]
    assert entries("fast-llm", "31b", LAYER + "0.mlp.up_proj.weight") == [
        (
            "converted",
            "mlp embed",
            "decoder.0.mlp.layer_1.weight/weights",
            "(gate_up=1 mlp) embed",
            (2 * 21504, 5376),
        )
    ]


def test_a_tensor_of_two_arrays_has_two_entries():
    block = "params/params/decoder/layers_2/mlp/moe_block/MoeBlock_0/"
    assert entries("maxtext", "26b-a4b", LAYER + "2.experts.gate_up_proj") == [
        (
            "converted",
            f"experts (gate_up={half} expert_mlp) embed",
            f"{block}wi_{number}",
            "experts embed expert_mlp",
            (128, 2816, 704),
        )
        for number, half in enumerate(("gate", "up"))
    ]


def test_scanned_layers_have_their_place_in_the_stack():
    path = "params/params/decoder/scanned_blocks/"
    assert entries("maxtext", "31b", LAYER + "11.self_attn.o_proj.weight", True) == [
        (
            "converted",
            "embed (heads head_dim)",
            f"{path}global_layer/self_attention/out/kernel",
            "heads block=1 head_dim embed",
            (32, 10, 512, 5376),
        )
    ]
    assert entries("maxtext", "31b", LAYER + "16.layer_scalar", True) == [
        (
            "converted",
            "1",
            f"{path}local_layers/layer_scalar",
            "1 block=2 position=4",
            (1, 10, 5),
        )
    ]


def test_what_is_carried_shared_tied_and_filled_says_so(tiny):
    tower = "model.vision_tower.encoder.layers.5."
    (carried,) = [
        one for one in listed("maxtext", "e2b") if one.hf.name == tower + "mlp.up_proj.input_max"
    ]
    assert (carried.kind, carried.native) == ("carried", None)
    assert carried.why == "MaxText has no vision tower for E2B and E4B"
    (shared,) = [
        one for one in listed("gemma-jax", "e2b") if one.hf.name == tower + "mlp.up_proj.input_max"
    ]
    assert shared.kind == "shared"
    assert shared.equals == tower + "mlp.gate_proj.input_max"
    assert shared.native.name.endswith("block/mlp/gating_einsum/clip_input_max")
    assert (shared.native.axes, shared.native.shape) == ("vit_layers=5", (16,))
    leftover = next(
        one
        for one in listed("gemma-jax", "e2b")
        if one.hf.name == LAYER + "15.self_attn.k_norm.weight"
    )
    assert (leftover.kind, leftover.fill) == ("converted", 1)
    own = next(
        one
        for one in listed("gemma-jax", "e2b")
        if one.hf.name == LAYER + "14.self_attn.k_norm.weight"
    )
    assert own.fill is None
    folder = tiny("e2b", layers=10, kv_shared="omit")
    filled = [one for one in listed("gemma-jax", str(folder)) if one.kind == "filled"]
    assert len(filled) == 2 * 5
    assert all(one.hf is None for one in filled)
    keys = next(one for one in filled if one.native.name == "layer_5/attn/kv_einsum/w")
    assert (keys.fill, keys.native.axes) == (0, "kv kv_heads embed head_dim")
    assert keys.why == (
        f"the source lacks {LAYER}5.self_attn.k_proj.weight and {LAYER}5.self_attn.v_proj.weight"
    )
    assert keys.native.shape == (2, 6, 44, 16)
    norm = next(one for one in filled if one.native.name == "layer_9/attn/key_norm/scale")
    assert (norm.fill, norm.native.shape) == (1, (24,))


def test_an_output_head_is_tied(tiny, tmp_path):
    """Of a head that a file holds too: its array is the embedding's."""
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "hf"
    shutil.copytree(tiny("31b", layers=6, dtype="float32"), folder)
    tensors = load_file(folder / "model.safetensors")
    embedding = "model.language_model.embed_tokens.weight"
    save_file(tensors | {"lm_head.weight": tensors[embedding]}, folder / "model.safetensors")
    head = next(one for one in listed("maxtext", str(folder)) if one.hf.name == "lm_head.weight")
    assert (head.kind, head.equals, head.hf.dtype) == ("tied", embedding, "float32")
    assert head.native.name == "params/params/token_embedder/embedding"


def test_entries_are_in_the_order_of_people():
    names = [one.hf.name for one in listed("maxtext", "31b")]
    layers = [name.split(".")[3] for name in names if name.startswith(LAYER)]
    assert layers == sorted(layers, key=int)
    assert names.index("model.language_model.norm.weight") > names.index(LAYER + "59.layer_scalar")
    halves = [one[1] for one in entries("maxtext", "26b-a4b", LAYER + "2.experts.gate_up_proj")]
    assert halves == sorted(halves)


def test_the_three_kinds_of_source_agree(tiny, converted):
    """A folder with weights, its config.json alone, and what was converted from it."""
    folder = tiny("31b", layers=6)
    out = converted(folder, "maxtext")
    found = [listed("gemma-jax", str(one)) for one in (folder, folder / "config.json", out)]
    assert found[0] == found[1] == found[2]
    assert found[0] != listed("gemma-jax", "31b")


def test_the_dtype_is_that_of_the_weights(tiny):
    folder = tiny("31b", layers=6, dtype="float32")
    for one in listed("fast-llm", str(folder)):
        assert one.hf.dtype == "float32"
        assert one.native is None or one.native.dtype == "float32"


def test_a_folder_reached_through_its_parent_says_itself_which_tensors_it_has(tiny):
    folder = tiny("e2b", layers=10, kv_shared="omit")
    below = folder / ".." / folder.name
    assert listed("maxtext", str(below)) == listed("maxtext", str(folder))
    assert listed("maxtext", str(below)) != listed("maxtext", str(folder / "config.json"))


def test_a_table_as_it_stands():
    for layout in LAYOUTS:
        table = load_table(layout)
        rows = list_mappings(layout).rows
        kinds = Counter(row.kind for row in rows)
        assert kinds["converted"] == len(table.rows)
        assert kinds["carried"] == len(table.carried)
        assert kinds["tied"] == 1
        mapped = {row.hf for row in rows if row.kind == "converted"}
        assert mapped <= {str(row.view) for row in load_inventory().rows}
    fused = [
        (row.hf, row.native, row.when, row.optional)
        for row in list_mappings("maxtext").rows
        if row.native
        and row.native.endswith("self_attention/{kv}/kernel [embed kv_heads head_dim]")
    ]
    assert fused == [
        (
            LAYER + "{layer}.self_attn.{kv}_proj.weight [(kv_heads head_dim) embed]",
            "params/params/decoder/layers_{layer}/self_attention/{kv}/kernel "
            "[embed kv_heads head_dim]",
            "!key_as_value & owns_kv",
            "!owns_kv",
        )
    ]


TABLE_LINES = {
    "maxtext": (
        "converted\tmodel.language_model.embed_tokens.weight [vocab embed]\t"
        "params/params/token_embedder/embedding [vocab embed]\t\t× √embed",
        "tied\tlm_head.weight [vocab embed]\t\ttied\t"
        "equal to model.language_model.embed_tokens.weight, or absent",
        "carried\tmodel.vision_tower.*\t\tvision_clipped & !ple\t"
        "MaxText has no place for clip bounds",
        "stacked\t\tparams/params/decoder/layers_{layer}/* → "
        "params/params/decoder/scanned_blocks/local_layers/*\tsliding\t"
        "scanned: axes block position after 1 dimension(s)",
        "refused\t\t\tple\tscanned: MaxText scans no model with per-layer embeddings (E2B, E4B): "
        "its decoder block for them is unscanned only",
    ),
    "gemma-jax": (
        f"converted\t{LAYER}{{layer}}.self_attn.k_norm.weight [head_dim]\t"
        "layer_{layer}/attn/key_norm/scale [head_dim]\t\t"
        "may be absent where !owns_kv; filled with 1 where it is absent",
        "converted\tmodel.vision_tower.encoder.layers.{vit_layer}.self_attn.{kv}_proj.{bound} []\t"
        "vision_encoder/transformer/stacked_layers/block/attn/kv_einsum/clip_{bound} [vit_layers]\t"
        "vision_clipped\tone for all of kv, which are equal",
    ),
    "tunix": (
        "converted\tmodel.language_model.embed_tokens.weight [vocab embed]\t"
        "embedder/input_embedding/value [vocab embed]\t\t",
        "carried\tmodel.audio_tower.*\t\t\tTunix has no audio tower",
    ),
    "fast-llm": (
        "refused\tmodel.language_model.per_layer_projection_norm.weight\t\tple\t"
        "Fast-LLM has no per-layer embeddings",
        "refused\t\t\tdouble_wide\tFast-LLM has one width of the feed-forward for all layers",
    ),
}


@pytest.mark.parametrize("layout", TABLE_LINES)
def test_lines_of_a_table(layout):
    done = run("mappings", "--format", layout)
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines = done.stdout.splitlines()
    assert first == "kind\thuggingface\tnative\twhen\tnote"
    assert {line.count("\t") for line in lines} == {4}
    for line in TABLE_LINES[layout]:
        assert line in lines


def test_lines_of_a_tiny_model(tiny):
    done = run("mappings", "--format", "fast-llm", "--model", tiny("31b", layers=6))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == HEADER
    assert lines[1] == (
        "carried\tmodel.embed_vision.embedding_projection.weight\t[embed vit_embed]\t[68 52]\t"
        "bfloat16\t\t\t\t\tFast-LLM has no place for Gemma 4's vision tower"
    )
    text = [line for line in lines if "layers.5.self_attn" in line and "language" in line]
    assert text == [
        line.replace(" | ", "\t").replace("HF", LAYER + "5.self_attn").replace("FL", "decoder.5")
        for line in (
            "converted | HF.k_norm.weight | [head_dim] | [24] | bfloat16 | "
            "FL.mixer.key_norm.weight/weights | [head_dim] | [24] | bfloat16 | ",
            "converted | HF.k_proj.weight | [(kv_heads head_dim) embed] | [144 68] | bfloat16 | "
            "FL.mixer.key_value.weight/weights | [(kv_heads head_dim) embed] | [144 68] | "
            "bfloat16 | ",
            "converted | HF.o_proj.weight | [embed (heads head_dim)] | [68 432] | bfloat16 | "
            "FL.mixer.dense.weight/weights | [embed (heads head_dim)] | [68 432] | bfloat16 | ",
            "converted | HF.q_norm.weight | [head_dim] | [24] | bfloat16 | "
            "FL.mixer.query_norm.weight/weights | [head_dim] | [24] | bfloat16 | ",
            "converted | HF.q_proj.weight | [(heads head_dim) embed] | [432 68] | bfloat16 | "
            "FL.mixer.query.weight/weights | [(heads head_dim) embed] | [432 68] | bfloat16 | ",
        )
    ]


def test_notes_of_a_line(tiny):
    folder = tiny("e2b", layers=10, kv_shared="omit")
    lines = run("mappings", "--format", "maxtext", "--model", folder).stdout.splitlines()
    assert any(line.endswith("\tfloat32\t× √embed = 6.63324958") for line in lines)
    lines = run("mappings", "--format", "gemma-jax", "--model", folder).stdout.splitlines()
    assert lines[-1].startswith("filled\t\t\t\t\tlayer_9/attn/kv_einsum/w\t[kv kv_heads embed")
    assert "\tbfloat16\tfilled with 0; the source lacks model.language_model.layers.9." in lines[-1]


def test_the_formats_in_a_line_each():
    lines = run("mappings").stdout.splitlines()
    assert lines[0] == "format\tframework\trows\tscans\trefuses"
    assert [line.split("\t")[0] for line in lines[1:]] == list(LAYOUTS)
    assert f"maxtext\tMaxText\t{len(load_table('maxtext').rows)}\tyes\t" in lines
    assert lines[1].startswith(f"fast-llm\tFast-LLM\t{len(load_table('fast-llm').rows)}\tno\tFast-")


def test_a_model_in_every_format():
    """540 = 1471 tensors fewer than 2011: both towers and the leftovers of 20 layers."""
    lines = run("mappings", "--model", "e2b").stdout.splitlines()
    assert lines[0] == "format\ttensors\tequal\tcarried\tarrays\tfilled\tsize\trefused"
    assert lines[3] == "maxtext\t540\t0\t1471\t540\t0\t9.4 GiB\t"
    assert lines[2] == "gemma-jax\t1883\t128\t0\t1316\t0\t9.5 GiB\t"
    assert lines[1].startswith("fast-llm\t\t\t\t\t\t\tFast-LLM has no per-layer embeddings; Fast-")


def test_json_has_the_same_figures(tiny):
    folder = tiny("31b", layers=6)
    call = ("mappings", "--format", "maxtext", "--model", folder, "--scan-layers", "--json")
    report = json.loads(run(*call).stdout)
    assert report["schema"] == "gemma-convert/mappings/2"
    assert (report["format"], report["model"], report["family"]) == ("maxtext", str(folder), "31b")
    assert (report["scanned"], report["rows"], report["formats"]) == (True, [], [])
    assert len(report["tensors"]) == len(listed("maxtext", str(folder), True))
    last = report["tensors"][-1]
    assert last["hf"]["name"] == "model.vision_tower.std_scale"
    assert last["native"] == {
        "name": "params/params/vision_encoder/Gemma4VisionEncoderLayer_0/std_scale",
        "axes": "vit_embed",
        "shape": [52],
        "dtype": "bfloat16",
    }


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_are_tables(tiny, monkeypatch):
    from gemma_convert.cli.app import main

    def shown(*arguments):
        out = Terminal()
        monkeypatch.setattr(sys, "argv", ["gemma-convert", "mappings", *map(str, arguments)])
        for name, value in (TERMINAL | {"COLUMNS": "150"}).items():
            monkeypatch.setenv(name, value)
        with redirect_stdout(out), pytest.raises(SystemExit) as done:
            main()
        assert not done.value.code
        return [STYLE.sub("", line).rstrip() for line in out.getvalue().splitlines()]

    lines = shown("--format", "maxtext", "--model", tiny("e2b", layers=10, kv_shared="omit"))
    assert lines[0].split() == ["Hugging", "Face", "maxtext"]
    place = next(n for n, line in enumerate(lines) if "embed_tokens.weight" in line)
    assert lines[place].split() == [
        "model.language_model.embed_tokens.weight",
        "params/params/token_embedder/embedding",
    ]
    below = [part.strip() for part in lines[place + 1].split("  ") if part.strip()]
    assert below == [
        "[vocab embed] [307 44] bfloat16",
        "[vocab embed] [307 44] float32",
        "× √embed = 6.63324958",
    ]
    assert any(line.endswith("carried: MaxText has no audio tower") for line in lines)
    assert "\t" not in "".join(lines)
    assert shown()[0].split() == ["format", "framework", "rows", "scans", "refuses"]
    rows = shown("--format", "fast-llm")
    assert rows[0].split() == ["kind", "huggingface", "native", "when", "note"]


def test_errors(tmp_path):
    message = fails(3, "mappings", "--model", "70b")
    assert "There is no published model `70b`" in message
    assert "e2b, e4b, 12b, 26b-a4b, 31b, or a checkpoint" in message
    assert "no place for 108 tensors" in fails(
        2, "mappings", "--format", "fast-llm", "--model", "e2b"
    )
    assert "--no-scan-layers" in fails(
        2, "mappings", "--format", "maxtext", "--model", "e4b", "--scan-layers"
    )
    assert "no scanned form" in fails(
        2, "mappings", "--format", "gemma-jax", "--model", "31b", "--scan-layers"
    )
    for options in ((), ("--format", "maxtext"), ("--model", "31b")):
        assert "--format and --model" in fails(2, "mappings", "--scan-layers", *options)
    assert "no config.json" in fails(3, "mappings", "--model", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "model_type" in fails(3, "mappings", "--model", tmp_path)
    with pytest.raises(UsageError, match="There is no layout `gguf`"):
        list_mappings("gguf")
    with pytest.raises(SourceError):
        named_model("12b-unheard-of")
