"""How Tunix is told to load a converted checkpoint, printed and as a file.

Which fields there are, and what Tunix' own configs say already, stands in mappings/tunix.toml.
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
from gemma_convert.model.facts import Fact

FILE = "tunix.json"
"""Its name in the folder of a checkpoint: the config that is named, and all that it has."""

IMPORTS = {
    "dataclasses": "import dataclasses",
    "qwix": "import qwix",
    "nnx": "from flax import nnx",
    "ModelConfig": "from tunix.models.gemma4.model import AttentionType, Gemma4, ModelConfig",
    "CheckpointManager": "from tunix.sft.checkpoint_manager import CheckpointManager",
}
"""Name that the settings use → the line that imports it, with google-tunix 0.1.7."""

_DERIVED = ("num_layers", "layer_types", "num_kv_shared_layers", "use_double_wide_mlp")
"""Facts that Tunix has other fields for."""


def tunix_facts() -> FactTable:
    """The facts in the table of the layout."""
    table = load_facts("tunix")
    assert table is not None
    return table


def tunix_settings(plan: Plan, target: Path) -> dict[str, str]:
    """Setting → value: the config, the model made of it, and what fills it with the parameters.

    Raises SourceError for a fact that Tunix cannot be told.
    """
    table, text = tunix_facts(), plan.architecture.text
    _check_one_vocabulary(text)
    told = table.told(plan.architecture, vision=False, ignore=plan.ignored_facts)
    config = f"ModelConfig.{table.model(plan.architecture)}()"
    fields = ", ".join(f"{key}={value}" for key, value in _fields(text, told).items())
    return {
        "config": f"dataclasses.replace({config}, {fields})" if fields else config,
        "model": "Gemma4(config, rngs=nnx.Rngs(0))",
        "params": f'CheckpointManager("{target.absolute()}").maybe_restore(model)',
    }


def settings_files(plan: Plan) -> dict[str, str]:
    """Name → text of the file that has the config and every field that a table row names."""
    table = tunix_facts()
    model = table.model(plan.architecture)
    told = table.told(plan.architecture, vision=False, ignore=plan.ignored_facts)
    content = {"model": model, "config": dict(table.named[model]) | told}
    return {FILE: json.dumps(content, indent=1) + "\n"}


def read_settings(items: Path, given: GivenSettings, architecture: Architecture | None) -> Settings:
    """What Tunix is told of the checkpoint: by `given`, or by the file beside its step folders.

    Where there are none, the config that `architecture` has there says all. Raises SourceError for
    a broken file and for a config that Tunix has not.
    """
    table, root = tunix_facts(), items.parent.parent
    files = given.files
    if not files and os.path.lexists(root / FILE):
        check_confined(root, FILE)
        files = (root / FILE,)
    model, own = "" if architecture is None else table.model(architecture), dict[str, Any]()
    for file in files:
        model, config = _read(file)
        own |= config
    if not files and not given and architecture is None:
        return Settings({}, "no settings file")
    where = str(files[-1]) if files else "--settings" if given else "no settings file"
    name = str(given.pairs.get("model", model))
    rest = table.model_facts(name, f"{where}, key model")
    return Settings(own | given.pairs, where, name, rest)


def _read(file: Path) -> tuple[str, dict[str, Any]]:
    """The config that a settings file names, and its fields."""
    settings = read_settings_file(file, file.name)
    config = settings.get("config")
    if not isinstance(config, dict):
        raise SourceError("The settings file has no `config`.", where=file, found=short(config))
    return str(settings.get("model")), config


def _check_one_vocabulary(text: TextArchitecture) -> None:
    """Raises SourceError where the per-layer embeddings are of other tokens than the embedding."""
    if text.ple and text.ple_vocab != text.vocab:
        raise SourceError(
            "The framework cannot run a value of config.json: Tunix has one size for both "
            "vocabularies.",
            where="config.json, key text_config.vocab_size_per_layer_input",
            expected=text.vocab,
            found=text.ple_vocab,
            do="choose another layout with --format",
        )


def _fields(text: TextArchitecture, told: dict[str, Fact]) -> dict[str, Any]:
    """Field of ModelConfig → the Python that it is set to."""
    fields: dict[str, Any] = {key: value for key, value in told.items() if key not in _DERIVED}
    shared, wide = text.kv_shared_layers, text.double_wide_mlp
    if "num_layers" in told:
        fields["num_layers"] = told["num_layers"]
    if {"num_layers", "layer_types"} & set(told):
        fields["attention_pattern"] = _pattern(text)
    if "num_kv_shared_layers" in told or (shared and "num_layers" in told):
        fields["frac_shared_layers"] = _share(shared, len(text.layers))
    if "use_double_wide_mlp" in told or (wide and "hidden_dim" in told):
        fields["override_kv_shared_ffw_hidden"] = 2 * text.layers[0].mlp if wide else None
    if text.moe and "hidden_dim" in told:
        fields["moe_dense_hidden_dim"] = told["hidden_dim"]
    return fields


def _pattern(text: TextArchitecture) -> str:
    """The kinds of the layers of a block, or of all where they do not repeat, in Python."""
    kinds = ("AttentionType.LOCAL_SLIDING", "AttentionType.GLOBAL")
    names = [kinds[not layer.sliding] for layer in text.layers[: text.period]]
    return f"({', '.join(names)},)"


def _share(shared: int, layers: int) -> str:
    """The share of layers that take another's keys and values, as Tunix counts the layers by it.

    It rounds `layers - share * layers` down, which for some pairs is one layer off by the last bit
    of the quotient; half a layer less comes out right.
    """
    exact = int(layers - shared / layers * layers) == layers - shared
    return f"{shared if exact else shared - 0.5} / {layers}"
