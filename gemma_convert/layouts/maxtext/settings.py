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
from gemma_convert.files.given_settings import GivenSettings, read_settings_file
from gemma_convert.layouts.maxtext.adapter import adapter_settings
from gemma_convert.mapping.facts import FactTable, load_facts
from gemma_convert.mapping.native_facts import Settings
from gemma_convert.mapping.plan import Plan
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.facts import Fact

FILE = "maxtext.yml"
"""Its name in the folder of a checkpoint; `train.py` takes it as its config."""


def maxtext_facts(version: str | None = None) -> FactTable:
    """The facts in the table of the layout, for a version of MaxText."""
    table = load_facts("maxtext", version)
    assert table is not None
    return table


def maxtext_settings(plan: Plan, items: Path, *, multimodal: bool) -> dict[str, str]:
    """Setting → value: model name, form and path, then every fact that the named model has not.

    Raises SourceError for a fact that MaxText cannot be told.
    """
    table = maxtext_facts(plan.version)
    told = table.told(plan.architecture, vision=multimodal, ignore=plan.ignored_facts)
    settings = {
        "model_name": table.model(plan.architecture),
        "scan_layers": str(plan.scanned).lower(),
        "use_multimodal": str(multimodal).lower(),
        "load_parameters_path": str(items),
    }
    adapter = plan.architecture.adapter
    if adapter is not None:
        del settings["load_parameters_path"]  # the base model's, which is elsewhere
        settings |= adapter_settings(adapter, plan.targets, items)
    if told:
        settings["override_model_config"] = "true"
    return settings | {key: _spelled(value) for key, value in told.items()}


def settings_files(plan: Plan, items: Path, *, multimodal: bool) -> dict[str, str]:
    """Name → text of a config of MaxText, and of the model that it names, with all of its facts.

    MaxText reads `models/MODEL.yml` beside a config before its own, so that these facts hold
    without `override_model_config` on the command line.
    """
    table = maxtext_facts(plan.version)
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


def read_settings(items: Path, given: GivenSettings, architecture: Architecture | None) -> Settings:
    """What MaxText is told of the checkpoint: by `given`, or by the settings file of its folder.

    As in MaxText, the file of the model that is named counts more than a config, and single
    settings count most. Where there are none, the model that `architecture` has there says all.
    Raises SourceError for a broken file and for a model that MaxText has not.
    """
    table, root = maxtext_facts(), items.parent.parent
    files, own = given.files, dict[str, Any]()
    for file in files:
        own |= _with_base(file)
    if not files and os.path.lexists(root / FILE):
        check_confined(root, FILE)
        files, own = (root / FILE,), read_settings_file(root / FILE, FILE)
    own |= given.pairs
    if not own and architecture is None:
        return Settings({}, "no settings file")
    where = str(files[-1]) if files else "--settings" if given else "no settings file"
    usual = "default" if files or architecture is None else table.model(architecture)
    named = own.get("model_name", usual)
    model = str(named).replace("-Instruct", "")
    rest = table.model_facts(model, f"{where}, key model_name")
    own = {key: value for key, value in own.items() if key not in rest}
    if beside := _beside(files[-1], model) if files else None:
        own |= read_settings_file(beside, beside.name)
    return Settings(own | given.pairs, where, model, rest)


def _with_base(file: Path) -> dict[str, Any]:
    """The settings in a config, over those of its `base_config`, where that lies beside it.

    One of MaxText's own, such as `base.yml`, says no fact that a named model does not. Raises
    SourceError for one that lies elsewhere.
    """
    values: dict[str, Any] = {}
    seen: list[Path] = []
    while file not in seen and file.is_file():
        seen.append(file)
        found = read_settings_file(file, file.name)
        values = found | values
        base = str(found.get("base_config", ""))
        if PurePath(base).name != base:
            raise SourceError(
                "The config names a base_config outside of its own folder, which is not read.",
                where=f"{file}, key base_config",
                found=short(base),
                do="name the parent with --settings as well, before this one, and copy this one "
                "without the key",
            )
        file = file.parent / base
    return values


def _beside(config: Path, model: str) -> Path | None:
    """The file of a model in the folder `models` beside a config; None where there is none."""
    name = _model_file(model)
    if not os.path.lexists(config.parent / name):
        return None
    check_confined(config.parent, PurePath(name).parts[0])
    return config.parent / name


def _spelled(value: Fact) -> str:
    """A value as MaxText takes it: no soft-cap is 0, and a float has a point for YAML's sake."""
    if value is None:
        return "0.0"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text
