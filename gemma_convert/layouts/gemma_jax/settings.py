"""How the gemma library is told to load a converted checkpoint, printed and as a file.

Which fields there are, and what the library's classes say already, stands in
mappings/gemma_jax.toml.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError, short
from gemma_convert.files.confined import check_confined
from gemma_convert.files.given_settings import GivenSettings, read_settings_file
from gemma_convert.mapping.facts import FactTable, load_facts
from gemma_convert.mapping.native_facts import Settings
from gemma_convert.mapping.plan import Plan
from gemma_convert.model.architecture import Architecture, TextArchitecture
from gemma_convert.model.facts import Fact, layer_pattern

FILE = "gemma.json"
"""Its name in the folder of a checkpoint: the class, and all that its config has."""

IMPORTS = {"dataclasses": "import dataclasses", "gm": "from gemma import gm"}
"""Name that the settings use → the line that imports it."""


def gemma_facts() -> FactTable:
    """The facts in the table of the layout."""
    table = load_facts("gemma-jax")
    assert table is not None
    return table


def gemma_jax_settings(plan: Plan, target: Path, *, vision: bool) -> dict[str, str]:
    """Setting → value: the model, its config where the class says another, and its parameters.

    Raises SourceError for a fact that the library cannot be told.
    """
    table, architecture = gemma_facts(), plan.architecture
    told = table.told(architecture, vision=vision, ignore=plan.ignored_facts)
    name = f"gm.nn.{table.model(architecture)}"
    params = {"params": f'gm.ckpts.load_params("{target.absolute()}")'}
    if not told and not architecture.unified:
        return {"model": f"{name}()", **params}
    fields = ", ".join(f"{key}={value}" for key, value in _fields(name, architecture, told).items())
    return {
        "config": f"dataclasses.replace({name}.config, {fields})",
        "model": f"{name}(config=config)",
        **params,
    }


def settings_files(plan: Plan, *, vision: bool) -> dict[str, str]:
    """Name → text of the file that has the class and every field that a table row names."""
    table = gemma_facts()
    model = table.model(plan.architecture)
    said = {key: value for key, value in table.named[model].items() if "." not in key}
    told = table.told(plan.architecture, vision=vision, ignore=plan.ignored_facts)
    return {FILE: json.dumps({"model": f"gm.nn.{model}", "config": said | told}, indent=1) + "\n"}


def read_settings(
    folder: Path, given: GivenSettings, architecture: Architecture | None
) -> Settings:
    """What the library is told of the checkpoint: by `given`, or by the file of its folder.

    Where there are none, the class that `architecture` has there says all. Raises SourceError for
    a broken file and for a class that the library has not.
    """
    table = gemma_facts()
    files = given.files
    if not files and os.path.lexists(folder / FILE):
        check_confined(folder, FILE)
        files = (folder / FILE,)
    model, own = "" if architecture is None else table.model(architecture), dict[str, Any]()
    for file in files:
        model, config = _read(file)
        own |= config
    if not files and not given and architecture is None:
        return Settings({}, "no settings file")
    where = str(files[-1]) if files else "--settings" if given else "no settings file"
    name = str(given.pairs.get("model", model)).removeprefix("gm.nn.")
    rest = table.model_facts(name, f"{where}, key model")
    return Settings(own | given.pairs, where, name, rest)


def _read(file: Path) -> tuple[str, dict[str, Any]]:
    """The class that a settings file names, and the fields of its config."""
    settings = read_settings_file(file, file.name)
    config = settings.get("config")
    if not isinstance(config, dict):
        raise SourceError("The settings file has no `config`.", where=file, found=short(config))
    return str(settings.get("model")), config


def _fields(name: str, architecture: Architecture, told: dict[str, Fact]) -> dict[str, Any]:
    """Field of TransformerConfig → the Python that it is set to."""
    layers, shared = len(architecture.text.layers), architecture.text.kv_shared_layers
    derived = ("num_layers", "layer_types", "num_kv_shared_layers", "use_double_wide_mlp")
    fields: dict[str, Any] = {key: value for key, value in told.items() if key not in derived}
    if {"num_layers", "layer_types"} & set(told):
        fields["attention_types"] = _attention_types(name, architecture.text)
    if shared and {"num_layers", "num_kv_shared_layers"} & set(told):
        sharing = f"{name}.config.kv_cache_sharing_config"
        fraction = f"frac_shared_layers={shared} / {layers}"
        fields["kv_cache_sharing_config"] = f"dataclasses.replace({sharing}, {fraction})"
    if architecture.text.double_wide_mlp and {"hidden_dim", "use_double_wide_mlp"} & set(told):
        fields["override_kv_shared_ffw_hidden"] = 2 * architecture.text.layers[0].mlp
    if architecture.text.moe and "hidden_dim" in told:
        fields["moe_dense_hidden_dim"] = told["hidden_dim"]
    if architecture.unified:
        fields["vision_encoder"] = None
    return fields


def _attention_types(name: str, text: TextArchitecture) -> str:
    """The kinds of layers, in Python, out of those that the class has: its first is sliding."""
    said = gemma_facts().named[name.removeprefix("gm.nn.")]["layer_types"]
    types, full = f"{name}.config.attention_types", int(said.partition(" ")[0])
    if layer_pattern(text) == said:
        return f"{types}[:{full + 1}] * {len(text.layers) // (full + 1)}"
    places = ", ".join("0" if layer.sliding else str(full) for layer in text.layers)
    return f"tuple({types}[place] for place in ({places},))"
