"""The MaxText settings under which a converted checkpoint loads, printed and as a file.

Which keys there are, and what the named models say already, stands in mappings/maxtext.toml.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from gemma_convert.errors import SourceError, short
from gemma_convert.files.confined import check_confined
from gemma_convert.files.yaml_file import read_yaml
from gemma_convert.mapping.facts import FactTable, load_facts
from gemma_convert.mapping.plan import Plan
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.facts import Fact

FILE = "maxtext.yml"
"""Its name in the folder of a checkpoint; `train.py` takes it as its config."""

MAX_BYTES = 1 << 20


def maxtext_facts() -> FactTable:
    """The facts in the table of the layout."""
    table = load_facts("maxtext")
    assert table is not None
    return table


def maxtext_settings(plan: Plan, items: Path, *, multimodal: bool) -> dict[str, str]:
    """Setting → value: model name, form and path, then every fact that the named model has not.

    Raises SourceError for a fact that MaxText cannot be told.
    """
    table = maxtext_facts()
    told = table.told(plan.architecture, vision=multimodal, ignore=plan.ignored_facts)
    settings = {
        "model_name": table.model(plan.architecture),
        "scan_layers": str(plan.scanned).lower(),
        "use_multimodal": str(multimodal).lower(),
        "load_parameters_path": str(items),
    }
    if told:
        settings["override_model_config"] = "true"
    return settings | {key: _spelled(value) for key, value in told.items()}


def settings_files(plan: Plan, items: Path, *, multimodal: bool) -> dict[str, str]:
    """Name → text of a config of MaxText, and of the model that it names, with all of its facts.

    MaxText reads `models/MODEL.yml` beside a config before its own, so that these facts hold
    without `override_model_config` on the command line.
    """
    table = maxtext_facts()
    model = table.model(plan.architecture)
    settings = {
        "base_config": "base.yml",
        "model_name": model,
        "scan_layers": plan.scanned,
        "use_multimodal": multimodal,
        "load_parameters_path": str(items),
    }
    told = table.told(plan.architecture, vision=multimodal, ignore=plan.ignored_facts)
    said = {key: value for key, value in table.named[model].items() if "." not in key}
    facts = {key: 0.0 if value is None else value for key, value in told.items()}
    return {FILE: _yaml(settings), _model_file(model): _yaml(said | facts)}


def _model_file(model: str) -> str:
    return f"models/{model}.yml"


def _yaml(values: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1000)
    return text


def run_by(items: Path, architecture: Architecture) -> tuple[Architecture, dict[str, str]]:
    """The model as MaxText runs it: by the settings file of the checkpoint, where it has one.

    And the facts in which that differs from config.json. Raises SourceError for a broken file.
    """
    root = items.parent.parent
    if not os.path.lexists(root / FILE):
        return architecture, {}
    settings = _read(root, FILE)
    model = str(settings.get("model_name"))
    if model in maxtext_facts().named and os.path.lexists(root / _model_file(model)):
        settings = _read(root, _model_file(model)) | settings
    return maxtext_facts().run_by(architecture, model, settings, root / FILE)


def _read(root: Path, name: str) -> dict[str, Any]:
    """The settings in a file of a checkpoint; SourceError where it is none, or leads elsewhere."""
    check_confined(root, PurePath(name).parts[0])
    values = read_yaml(root / name, name, MAX_BYTES)
    if not isinstance(values, dict):
        raise SourceError("The settings are no mapping.", where=root / name, found=short(values))
    return {str(key): value for key, value in values.items()}


def _spelled(value: Fact) -> str:
    """A value as MaxText takes it: no soft-cap is 0, and a float has a point for YAML's sake."""
    if value is None:
        return "0.0"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text
