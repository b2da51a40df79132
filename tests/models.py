"""The published Gemma 4 models as data: configs and tensor lists, no weights."""

import gzip
import json
from functools import cache
from pathlib import Path

from gemma_convert.arrays.dtypes import SAFETENSORS_NAMES, TensorSpec
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import parse_architecture

E2B = "gemma-4-E2B-it"
E4B = "gemma-4-E4B-it"
A4B = "gemma-4-26B-A4B-it"
DENSE = "gemma-4-31B-it"
UNIFIED = "gemma-4-12B"

PUBLISHED = (E2B, E4B, A4B, DENSE, UNIFIED)
"""The models that are converted."""

WHERE = Path("somewhere/config.json")
"""What error messages call a config that was never a file."""

FOLDER = Path(__file__).parent / "data" / "models"


def load_config(name: str) -> dict:
    """The published config.json, a fresh copy that may be changed."""
    return json.loads((FOLDER / name / "config.json").read_text(encoding="utf-8"))


def load_tensors(name: str) -> dict[str, TensorSpec]:
    """Name → spec of every tensor of the published checkpoint, a fresh copy."""
    return dict(_load_tensors(name))


@cache
def _load_tensors(name: str) -> dict[str, TensorSpec]:
    listed = json.loads(gzip.decompress((FOLDER / name / "tensors.json.gz").read_bytes()))
    return {
        tensor: TensorSpec(SAFETENSORS_NAMES[entry["dtype"]], tuple(entry["shape"]))
        for tensor, entry in listed.items()
    }


@cache
def load_architecture(name: str) -> Architecture:
    """Facts of the published config."""
    return parse_architecture(load_config(name), WHERE)


def text_only(config: dict) -> dict:
    """The config of the language model alone, as Gemma4ForCausalLM or 12B's class has it."""
    (whole,) = config["architectures"]
    alone = whole.replace("ForConditionalGeneration", "ForCausalLM")
    return {**config["text_config"], "architectures": [alone], "dtype": config["dtype"]}


def without_layers(config: dict, layers: int) -> dict:
    """The config cut to its first `layers` layers."""
    text = config["text_config"]
    text["num_hidden_layers"] = layers
    text["layer_types"] = text["layer_types"][:layers]
    return config
