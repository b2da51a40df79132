"""Whether config.json has the sizes of the checkpoint's own tensors, asked before any is used.

A size that no tensor bears out could ask for any amount of memory.
"""

from __future__ import annotations

from pathlib import Path

from gemma_convert.errors import SourceError
from gemma_convert.logits.reference import check_loaded
from gemma_convert.mapping.inventory import hf_tensors
from gemma_convert.model.architecture import Architecture
from gemma_convert.stores.safetensors.reader import SafetensorsFolder
from gemma_convert.stores.weights import is_distcp, is_huggingface


def check_sizes(hf: Path, architecture: Architecture) -> None:
    """Nothing where the tensors in `hf` are those of the model, or where there are no weights yet.

    Raises SourceError that names those that are missing or of another shape, and for weights that
    transformers does not load.
    """
    if is_distcp(hf):
        raise SourceError(
            "transformers does not load torch's distributed checkpoints.",
            where=hf,
            do="make safetensors of it: gemma-convert to-native, then to-hf",
        )
    if not is_huggingface(hf):
        return
    with SafetensorsFolder(hf) as reader:
        found = {name: spec.shape for name, spec in reader.specs.items()}
    wanted = {tensor.name: tensor for tensor in hf_tensors(architecture)}
    report = {
        "missing_keys": [n for n, tensor in wanted.items() if tensor.required and n not in found],
        "unexpected_keys": [],
        "mismatched_keys": [
            (name, shape, wanted[name].shape)
            for name, shape in found.items()
            if name in wanted and shape != wanted[name].shape
        ],
    }
    check_loaded(report, architecture, hf)
