"""What is known of a model from its name alone: facts and tensors, without a file of the user's."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from pathlib import Path

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.errors import SourceError
from gemma_convert.files.json_file import read_object
from gemma_convert.files.library_path import without_parents
from gemma_convert.flops.config_file import load_config
from gemma_convert.mapping.inventory import huggingface_tensors
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import MAX_CONFIG_BYTES, parse_architecture
from gemma_convert.model.huggingface_files import INDEX, SINGLE
from gemma_convert.published import FOLDER, published_names
from gemma_convert.stores.remote.locations import local
from gemma_convert.stores.safetensors.reader import SafetensorsFolder

USUAL_DTYPE = "bfloat16"


@cache
def published_architecture(name: str) -> Architecture:
    """Facts of a published model, of google/gemma-4-*; `name` is one of `published_names`."""
    file = FOLDER / f"{name}.json"
    return parse_architecture(read_object(file, file.name, MAX_CONFIG_BYTES), file)


def named_model(name: str) -> tuple[Architecture, dict[str, TensorSpec]]:
    """Facts and tensors of a published model, or of a path, a repository on the hub or a URL.

    A folder with weights says itself which tensors it has. Of a config.json, a converted
    checkpoint, or one that is not here, all that a model of that kind may have are listed, the keys
    and values of KV-shared layers with them, as in the published files. Raises SourceError where
    there is no such model.
    """
    if name.lower() in published_names():
        architecture = published_architecture(name.lower())
        return architecture, usual_tensors(architecture)
    with ExitStack() as stack:
        path = local(name, stack, config_only=True)
        if not path.exists():
            raise SourceError(
                f"There is no published model `{name}`.",
                expected=f"{', '.join(published_names())}, or a checkpoint or config.json",
                do="name a published model, or give a path",
            )
        config = load_config(path)
        architecture = parse_architecture(config.values, config.where)
        if path == without_parents(Path(name)) and any(
            (path / file).is_file() for file in (SINGLE, INDEX)
        ):
            with SafetensorsFolder(path) as reader:
                return architecture, dict(reader.specs)
    return architecture, usual_tensors(architecture)


def usual_tensors(architecture: Architecture) -> dict[str, TensorSpec]:
    """Name → spec of the tensors that a published checkpoint of this architecture has."""
    dtype = architecture.dtype or USUAL_DTYPE
    shapes = huggingface_tensors(architecture, kv_leftovers=True)
    return {name: TensorSpec(dtype, shape) for name, shape in shapes.items()}
