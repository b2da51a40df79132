"""Orbax checkpoints as people have them: items of other names, bare trees, NNX, what RL saves."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from native_checkpoints import nested_tree, passes, sums
from test_cli import fails
from test_verification import change

from gemma_convert import SourceError, inspect, logit_check, to_hf, to_native
from gemma_convert.layouts.registry import open_native
from gemma_convert.stores.orbax.wrapped import unwrapped

TOLD = {"maxtext": "maxtext.yml", "gemma-jax": "gemma.json"}
ITEMS = {"maxtext": Path("0/items"), "gemma-jax": Path()}


def model_tree(native: Path, layout: str) -> dict:
    """The model's own tree of a conversion, nothing above it."""
    tree = nested_tree(native / ITEMS[layout])
    return tree["params"]["params"] if layout == "maxtext" else tree


def of_nnx(tree):
    """The tree as flax saves an NNX state: a `value` below each array, and random state beside."""
    if not isinstance(tree, dict):
        return {"value": tree}
    return {name: of_nnx(below) for name, below in tree.items()}


def with_random(tree: dict) -> dict:
    module = {"count": {"value": np.uint32(3)}, "key": {"value": np.arange(2, dtype=np.uint32)}}
    name = "decoder" if "decoder" in tree else "layer_0"
    return tree | {name: tree[name] | {"dropout": {"rngs": module}}}


def save(folder: Path, tree: dict) -> None:
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree)


def item_of_another_name(run, tree):
    save(run / "5" / "params", tree)
    return run, run / "5", run / "5" / "params"


def bare_tree(run, tree):
    save(run / "5", tree)
    return run, run / "5"


def tuned(run, tree):
    """As Tunix and MaxText save: parameters, optimizer state and gradients, an item each."""
    step = run / "checkpoints" / "5"
    save(run / "checkpoints" / "3" / "model_params", {"decoder": {"old": np.zeros(2)}})
    save(step / "model_params", with_random(of_nnx(tree)))
    save(step / "optimizer_state", {"opt_state": {"0": {"mu": of_nnx(tree)}}})
    save(step / "accumulated_grads", of_nnx(tree))
    return run, run / "checkpoints", step, step / "model_params"


def reinforced(run, tree):
    save(run / "checkpoints" / "actor" / "5" / "model_params", {"base": of_nnx(tree)})
    return run, run / "checkpoints" / "actor"


def training_state(run, tree):
    state = {"model": of_nnx(tree), "optimizer": {"mu": of_nnx(tree)}, "step": np.int32(5)}
    save(run / "5" / "state", state)
    return run, run / "5" / "state"


FORMS = (item_of_another_name, bare_tree, tuned, reinforced, training_state)


@pytest.mark.share(5)
@pytest.mark.parametrize("layout", ITEMS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_goes_back(form, layout, shallow, converted, tmp_path):
    source = shallow("31b")
    tree = model_tree(converted(source, layout), layout)
    for number, path in enumerate(form(tmp_path / "run", tree)):
        back = tmp_path / f"back{number}"
        if number:
            with open_native(path) as native:
                assert native.layout == layout
            continue
        report = to_hf(path, back, like=source)
        assert report.layout == layout
        assert sums(back) == sums(source)


@pytest.mark.share(2)
@pytest.mark.parametrize("layout", ITEMS)
def test_every_command_takes_them(layout, shallow, converted, tmp_path):
    source = shallow("31b")
    native = converted(source, layout)
    run, *_ = tuned(tmp_path / "run", model_tree(native, layout))
    found = inspect(run)
    assert (found.layout, found.tensors) == (layout, inspect(native).tensors)
    assert found.extras == ("rngs",)
    passes(run, source)
    passes(source, run)
    to_native(run, tmp_path / "out", layout=layout, like=source)
    passes(tmp_path / "out", source)
    for whole in (False, True):
        told = {"settings": [str(native / TOLD[layout])], "whole_model": whole}
        assert logit_check(source, run, tokens=5, **told).passed


@pytest.mark.share(2, 1)
@pytest.mark.parametrize("layout", ITEMS)
def test_a_mistake_in_them_is_found(layout, shallow, converted, tmp_path):
    source = shallow("31b")
    native = converted(source, layout)
    tree = model_tree(native, layout)
    place = tree["decoder"]["decoder_norm"] if layout == "maxtext" else tree["final_norm"]
    place["scale"] = place["scale"] * 2
    run, *_ = reinforced(tmp_path / "run", tree)
    report = to_hf(run, tmp_path / "back", like=source)
    assert not report.bit_for_bit
    assert sums(tmp_path / "back") != sums(source)
    report = logit_check(source, run, tokens=5, settings=[str(native / TOLD[layout])])
    assert len(report.local.failed) == 1


def test_of_two_models_one_must_be_named(shallow, converted, tmp_path):
    source = shallow("31b")
    native = converted(source, "maxtext")
    for item in ("params", "ema_params"):
        shutil.copytree(native / "0" / "items", tmp_path / "run" / "7" / item)
    for path in (tmp_path / "run", tmp_path / "run" / "7"):
        message = fails(3, "inspect", path)
        assert "The checkpoint has several Orbax items that could be the model." in message
        assert "run/7/ema_params, " in message and "run/7/params" in message
        assert f"give the path of one of them, such as {tmp_path}/run/7/ema" in message
    assert fails(3, "to-hf", path, tmp_path / "back", "--like", source) == message
    assert inspect(path / "params").layout == "maxtext"


def test_an_item_that_is_no_model_is_passed_over(shallow, converted, tmp_path):
    native = converted(shallow("31b"), "maxtext")
    shutil.copytree(native / "0" / "items", tmp_path / "7" / "state")
    save(tmp_path / "7" / "metrics", {"loss": np.zeros(3)})
    assert inspect(tmp_path).layout == "maxtext"


def test_two_models_in_one_tree_are_refused():
    paths = [(model, "decoder", "a") for model in ("policy", "reference")]
    with pytest.raises(SourceError, match="several trees") as caught:
        unwrapped(paths, [("decoder",)])
    assert caught.value.found == "policy, reference"


def test_what_stands_below_optimizer_state_is_no_model():
    paths = [("state", "opt_state", "0", "mu", "decoder", "a"), ("optimizer", "decoder", "a")]
    assert unwrapped(paths, [("decoder",)]) == {}


def test_an_array_that_stands_twice_is_refused():
    with pytest.raises(SourceError, match="an array twice"):
        unwrapped([("decoder", "a"), ("decoder", "a", "value")], [("decoder",)])


def test_a_step_that_is_passed_over_is_told(shallow, converted, tmp_path, capsys):
    """What is read is named, and a higher step that is not complete."""
    source = shallow("31b")
    steps = tmp_path / "run" / "checkpoints"
    for step in ("9", "10", "11"):
        shutil.copytree(converted(source, "maxtext") / "0", steps / step)
    assert to_hf(tmp_path / "run", tmp_path / "back", like=source).step == 11
    assert "passed over" not in capsys.readouterr().err
    for step in ("10", "11"):
        (steps / step / "items" / "_METADATA").unlink()
    report = to_hf(tmp_path / "run", tmp_path / "older", like=source)
    assert report.step == report.as_json()["step"] == 9
    told = capsys.readouterr().err
    assert told.count("step 10, 11 in") == 1 and "step 9 is read" in told
    assert inspect(tmp_path / "run").step == 9
    assert to_hf(steps / "9", tmp_path / "named", like=source).step == 9
    assert "passed over" not in capsys.readouterr().err


def test_rounding_of_a_trained_checkpoint_is_named_where_it_fails(shallow, converted, tmp_path):
    """Trained in float32 and exported to bfloat16, it is not what was exported."""
    source = shallow("31b")
    native = converted(source, "maxtext", dtype="float32")
    shutil.copytree(native / "0", tmp_path / "run" / "1")
    settings = [str(native / "maxtext.yml")]
    right = logit_check(source, tmp_path / "run", tokens=5, settings=settings)
    assert right.passed and not any("after training" in text for text in right.warnings)
    norm = "params/params/decoder/decoder_norm/scale"
    change(tmp_path / "run" / "1" / "items", norm, lambda values: values * 1.5)
    wrong = logit_check(source, tmp_path / "run", tokens=5, settings=settings)
    assert not wrong.passed
    assert "--dtype bfloat16" in wrong.warnings[-1]
