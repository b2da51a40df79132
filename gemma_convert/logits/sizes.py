"""Whether config.json has the sizes of the checkpoint's own tensors, asked before any is used.

A size that no tensor bears out could ask for any amount of memory.
"""

from __future__ import annotations

from pathlib import Path

from gemma_convert.architecture import Architecture
from gemma_convert.errors import SourceError
from gemma_convert.mapping.inventory import hf_tensors
from gemma_convert.stores.safetensors import SafetensorsFolder


def check_sizes(hf: Path, architecture: Architecture) -> None:
    """Nothing where the tensors in `hf` are those of the model. Raises SourceError else."""
    with SafetensorsFolder(hf) as reader:
        specs = reader.specs
    for tensor in hf_tensors(architecture):
        spec = specs.get(tensor.name)
        if spec is None and tensor.required:
            raise SourceError(
                "The checkpoint lacks a tensor that config.json asks for.",
                where=hf,
                expected=f"{tensor.name} {list(tensor.shape)}",
                do="download the whole checkpoint, config.json included",
            )
        if spec is not None and spec.shape != tensor.shape:
            raise SourceError(
                "config.json does not have the sizes of the checkpoint's tensors.",
                where=f"{hf}, tensor {tensor.name}",
                expected=f"{list(tensor.shape)}, as config.json has it",
                found=list(spec.shape),
                do="use the config.json that belongs to these weights",
            )
