"""A safetensors file as the tree of a forward pass: nested, left in its file, checked by name."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gemma_convert.errors import SourceError
from gemma_convert.forward.safetensors_tree import open_tree, tree_facts
from gemma_convert.forward.tree import ArrayFacts


@pytest.fixture
def file(tmp_path):
    tensors = {
        "embedding": torch.arange(6, dtype=torch.bfloat16).reshape(3, 2),
        "block_0/query": torch.arange(4, dtype=torch.float32),
        "block_0/norm/scale": torch.ones(2, dtype=torch.float16),
        "block_1/query": torch.zeros(4),
    }
    save_file(tensors, tmp_path / "flat.safetensors", metadata={"format": "pt"})
    return tmp_path / "flat.safetensors"


def test_names_are_paths_and_values_stay_in_the_file(file):
    tree = open_tree(file)
    assert set(tree) == {"embedding", "block_0", "block_1"}
    assert tree["embedding"].dtype == ml_dtypes.bfloat16
    assert np.array_equal(tree["embedding"], np.arange(6).reshape(3, 2))
    assert np.array_equal(tree["block_0"]["query"], np.arange(4))
    assert isinstance(tree["block_0"]["norm"]["scale"].base, np.memmap)
    assert tree_facts(file)["block_0/norm/scale"] == ArrayFacts((2,), "float16")
    assert set(open_tree(file, ["block_1"])) == {"block_1"}


def test_what_is_not_there_or_cannot_be_read_is_told(file):
    with pytest.raises(SourceError, match="part of the model is missing") as caught:
        open_tree(file, ["embedding", "block_2"])
    assert "expected: block_2" in str(caught.value) and "block_0" in str(caught.value)
    save_file({"counts": torch.zeros(2, dtype=torch.int64)}, file)
    with pytest.raises(SourceError, match="not of floating-point numbers"):
        open_tree(file)
    for broken in (b"", file.read_bytes()[:-1]):
        file.write_bytes(broken)
        with pytest.raises(SourceError, match="cannot read this file"):
            open_tree(file)
