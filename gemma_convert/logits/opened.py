"""What is compared with the original: a native checkpoint, or another Hugging Face one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gemma_convert.errors import UsageError
from gemma_convert.files.given_settings import GivenSettings
from gemma_convert.forward.native_model import ComparedModel, NativeModel
from gemma_convert.layouts.registry import open_adapted_model, open_model, read_facts
from gemma_convert.logits.sides import Sides
from gemma_convert.logits.transformers_model import NO_PARTS, TransformersModel
from gemma_convert.mapping.native_facts import NativeFacts
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import load_config
from gemma_convert.model.huggingface_files import CONFIG
from gemma_convert.stores.weights import is_huggingface


@dataclass(frozen=True)
class Opened:
    """An open checkpoint; `warnings` say where it runs by other facts than the original.

    `native` is the model too, where its layout's forward pass runs it; None where transformers
    does.
    """

    model: ComparedModel
    native: NativeModel | None
    warnings: tuple[str, ...]


def opened(sides: Sides, architecture: Architecture, settings: GivenSettings) -> Opened:
    """What is compared with the original, whose config.json has `architecture`.

    Raises SourceError where it cannot be read or is another model, UsageError for
    settings where nothing has any.
    """
    folder, hf, adapter = sides.native, sides.hf, sides.native_adapter
    if is_huggingface(folder):
        if settings:
            raise UsageError("--settings are for a native checkpoint; this has a config.json.")
        model = TransformersModel(folder, architecture)
        return Opened(model, None, (*sides.warnings, NO_PARTS, *model.differences))
    facts = read_facts(folder, load_config(hf), hf / CONFIG, settings)
    architecture = architecture if facts is None else facts.architecture
    if adapter is None:
        native = open_model(folder, architecture)
    else:
        native = open_adapted_model(folder, architecture, adapter, sides.alpha)
    return Opened(native, native, (*sides.warnings, *_other_facts(facts)))


def _other_facts(facts: NativeFacts | None) -> Iterator[str]:
    if facts is None:
        return
    if not facts.settings.written:
        yield (
            "No framework config was found for the native checkpoint, so it ran with that of "
            f"{facts.settings.model}. Name another one with --settings."
        )
    for key, how in facts.differences.items():
        yield f"The two models run with different settings: {key} is {how}."
