"""The model of a path: a config.json, a Hugging Face folder, or a converted checkpoint."""

from __future__ import annotations

from pathlib import Path

from gemma_convert.config import parse_architecture
from gemma_convert.flops.config_file import load_config
from gemma_convert.flops.families import families, read_family, unknown_family
from gemma_convert.flops.gemma4 import IMAGE_TOKENS, gemma4
from gemma_convert.flops.model import Model

_GEMMA4 = ("gemma4", "gemma4_text")


def read_model(path: Path) -> Model:
    """The model that the config.json at `path` describes, of any family that is known.

    Quantization changes how weights are stored and not what is multiplied, so it is passed over.
    Raises SourceError where there is no config.json, it contradicts itself, or no family is for it.
    """
    config = load_config(path)
    model_type = config.values.get("model_type")
    if model_type in _GEMMA4:
        image_tokens = config.size("vision_soft_tokens_per_image", IMAGE_TOKENS)
        values = {key: one for key, one in config.values.items() if key != "quantization_config"}
        return gemma4(parse_architecture(values, config.where), image_tokens)
    family = families().get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise unknown_family(config, model_type)
    return read_family(config, family)
