"""The model of a path: a config.json, a Hugging Face folder, or a converted checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from gemma_convert.flops.config_file import ConfigFile, load_config
from gemma_convert.flops.families import families, read_family, unknown_family
from gemma_convert.flops.gemma4 import IMAGE_TOKENS, gemma4
from gemma_convert.flops.model import Model
from gemma_convert.model.config import MODEL_TYPES, UNIFIED, parse_architecture
from gemma_convert.stores.remote.locations import local

_QUANTIZATION = ("quantization", "quantization_config")


def read_model(path: str | Path) -> Model:
    """The model that the config.json at `path` describes, of any family that is known.

    It is here, on the hub or in an object store, of which nothing else is fetched. Quantization
    changes how weights are stored and not what is multiplied, so it is passed over. Raises
    SourceError where there is no config.json, it contradicts itself, or no family is for it.
    """
    with ExitStack() as stack:
        config = load_config(local(path, stack, config_only=True))
        return _model(config)


def _model(config: ConfigFile) -> Model:
    model_type = config.values.get("model_type")
    if model_type in MODEL_TYPES:
        values = {key: one for key, one in config.values.items() if key not in _QUANTIZATION}
        return gemma4(parse_architecture(values, config.where), _image_tokens(config))
    family = families().get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise unknown_family(config, model_type)
    return read_family(config, family)


def _image_tokens(config: ConfigFile) -> int:
    """Soft tokens of an image, as config.json says or by default; 12B has them in a section."""
    if config.values.get("model_type") not in UNIFIED:
        return config.size("vision_soft_tokens_per_image", IMAGE_TOKENS)
    if config.values.get("vision_config") is None:
        return IMAGE_TOKENS
    return config.section("vision_config").size("num_soft_tokens", IMAGE_TOKENS)
