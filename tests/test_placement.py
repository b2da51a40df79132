"""Placements: layers go into their stacks at their block and position, or not at all."""

import pytest
from models import A4B, DENSE, E2B, WHERE, load_architecture, load_config
from tables import maxtext_data, read_maxtext

from gemma_convert.errors import MappingError, UsageError
from gemma_convert.mapping.notation import parse_view
from gemma_convert.mapping.placement import Placed, place, scanned_placement
from gemma_convert.mapping.region import Extent
from gemma_convert.mapping.table import load_table
from gemma_convert.model.config import parse_architecture

LAYER = "params/params/decoder/layers_{layer}/"
STACKS = "params/params/decoder/scanned_blocks/"


def placed(name, view, index, *, scanned=True):
    model, table = load_architecture(name), load_table("maxtext")
    placement = scanned_placement(table, model) if scanned else None
    return place(parse_view(view), index, model, table, placement)


@pytest.mark.parametrize("layer", range(60))
def test_every_layer_of_a_scan_has_its_place(layer):
    found = placed(
        DENSE, LAYER + "mlp/wi_{gate_up}/kernel [embed mlp]", {"layers": layer, "gate_up": 1}
    )
    block = Extent("block", 10, layer // 6)
    if layer % 6 == 5:
        assert found == Placed(STACKS + "global_layer/mlp/wi_1/kernel", (block,), 1)
    else:
        stacking = (block, Extent("position", 5, layer % 6))
        assert found == Placed(STACKS + "local_layers/mlp/wi_1/kernel", stacking, 1)


def test_no_two_layers_have_the_same_place():
    places = [placed(A4B, LAYER + "layer_scalar [1]", {"layers": layer}) for layer in range(30)]
    assert len(set(places)) == 30
    assert {found.name for found in places} == {
        STACKS + "local_layers/layer_scalar",
        STACKS + "global_layer/layer_scalar",
    }


def test_without_a_placement_the_layer_stands_in_the_name():
    found = placed(DENSE, LAYER + "{kv}/kernel [embed]", {"layers": 7, "kv": 0}, scanned=False)
    assert found == Placed("params/params/decoder/layers_7/key/kernel")
    assert found.put_in(((Extent("embed", 3),),)) == ((Extent("embed", 3),),)


def test_what_is_no_layer_is_not_stacked():
    found = placed(DENSE, "params/params/decoder/decoder_norm/scale [embed]", {})
    assert found == Placed("params/params/decoder/decoder_norm/scale")
    tower = placed(DENSE, "params/params/v/layer_{vit_layer}/scale [vit_embed]", {"vit_layers": 3})
    assert tower == Placed("params/params/v/layer_3/scale")


def test_stacking_axes_stand_after_the_first_dimension():
    one, two, three = ((Extent(axis, 3),) for axis in ("embed", "heads", "mlp"))
    block, position = Extent("block", 5, 2), Extent("position", 5, 4)
    stacked = Placed("name", (block, position), 1)
    assert stacked.put_in((one, two, three)) == (one, (block,), (position,), two, three)
    assert stacked.put_in((one,)) == (one, (block,), (position,))
    assert Placed("name", (block,), 0).put_in((one,)) == ((block,), one)
    assert Placed("name", (block,), 2).put_in((one, two, three)) == (one, two, (block,), three)


def test_a_scalar_has_its_stacking_axes_alone():
    found = placed(DENSE, LAYER + "bound []", {"layers": 8})
    assert (found.after, len(found.stacking)) == (0, 2)
    assert found.put_in(()) == tuple((extent,) for extent in found.stacking)


def test_a_place_that_no_stack_takes():
    with pytest.raises(MappingError) as caught:
        placed(DENSE, "params/params/other/layers_{layer}/scale [embed]", {"layers": 8})
    assert caught.value.what == "No stack of the placement takes this layer."
    assert caught.value.where == "placement scanned"
    assert caught.value.found == "params/params/other/layers_{layer}/scale at {'layers': 8}"


def test_a_layer_whose_kind_has_no_stack():
    data = maxtext_data()
    del data["placement"]["scanned"]["stacks"][1]
    table, model = read_maxtext(data), load_architecture(DENSE)
    placement = scanned_placement(table, model)
    view = parse_view(LAYER + "layer_scalar [1]")
    assert place(view, {"layers": 4}, model, table, placement).stacking[1].at == 4
    with pytest.raises(MappingError, match="No stack"):
        place(view, {"layers": 5}, model, table, placement)


def test_a_layout_without_a_scanned_form():
    data = maxtext_data()
    del data["placement"]
    with pytest.raises(UsageError, match="The layout maxtext has no scanned form") as caught:
        scanned_placement(read_maxtext(data), load_architecture(DENSE))
    assert caught.value.exit_code == 2


def test_a_model_that_is_refused_hears_why():
    with pytest.raises(UsageError) as caught:
        scanned_placement(load_table("maxtext"), load_architecture(E2B))
    assert caught.value.what.startswith("MaxText scans no model with per-layer embeddings")
    assert (caught.value.found, caught.value.do) == ("e2b", "use --no-scan-layers")


def test_layers_without_a_repeating_block():
    config = load_config(DENSE)
    config["text_config"]["layer_types"][2] = "full_attention"
    with pytest.raises(UsageError, match="multiple of the scanned block") as caught:
        scanned_placement(load_table("maxtext"), parse_architecture(config, WHERE))
    assert (caught.value.expected, caught.value.found) == ("a repeating pattern", "60 layers")


def test_a_layer_without_a_block_has_no_place_in_a_stack():
    """Who asks for a place without `scanned_placement`, which refuses such models."""
    config = load_config(DENSE)
    config["text_config"]["layer_types"][2] = "full_attention"
    model, table = parse_architecture(config, WHERE), load_table("maxtext")
    view = parse_view(LAYER + "layer_scalar [1]")
    with pytest.raises(MappingError, match="without a repeating block") as caught:
        place(view, {"layers": 4}, model, table, table.placements["scanned"])
    assert caught.value.found == "4"
