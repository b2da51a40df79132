"""Two Hugging Face checkpoints, tensor by tensor: what another converter made of an original."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gemma_convert.arrays.dtypes import exact, numpy_dtype
from gemma_convert.arrays.values import Array, bits
from gemma_convert.engine.comparing import Comparison
from gemma_convert.output import counted, shown
from gemma_convert.progress import Listener, working
from gemma_convert.stores.tensor_folder import TensorFolder
from gemma_convert.stores.weights import open_weights

PIECE_VALUES = 4 << 20


def verify_tensors(
    path: Path, original: Path, found: Comparison, progress: Listener | None
) -> None:
    """Compares every tensor at `path` with that of `original`: name, dtype, shape and values.

    Names are compared as the tables have them, so that a prefix makes no difference.
    """
    with open_weights(path) as ours, open_weights(original) as theirs:
        for name in ours.tensors:
            if name not in theirs.tensors:
                found.differ(name, f"is not in {shown(original)}")
        total = sum(spec.nbytes for spec in theirs.specs.values())
        with working(progress, "verify", total) as shown_bar:
            for name, spec in theirs.specs.items():
                if name not in ours.tensors:
                    found.differ(name, "is missing")
                    continue
                found.note(name, ours.specs[name].nbytes)
                how = _difference(name, ours, theirs)
                if how is not None:
                    found.differ(name, how)
                shown_bar.advance(spec.nbytes, name)
    found.notes.append(
        "Only the tensors were compared; config.json, tokenizer and other files were not."
    )


def _difference(name: str, ours: TensorFolder, theirs: TensorFolder) -> str | None:
    """How a tensor differs from the original's; None where it does not."""
    spec, wanted = ours.specs[name], theirs.specs[name]
    if spec.shape != wanted.shape:
        return f"has the shape {list(spec.shape)} instead of {list(wanted.shape)}"
    count = sum(
        _differing(_values(ours, name, start), _values(theirs, name, start))
        for start in range(0, spec.size, PIECE_VALUES)
    )
    differ = f"{count} of {counted(spec.size, 'value')} {'differs' if count == 1 else 'differ'}"
    if spec.dtype == wanted.dtype:
        return differ if count else None
    values = differ if count else "every value is the same"
    return f"is {spec.dtype} instead of {wanted.dtype}; {values}"


def _values(folder: TensorFolder, name: str, start: int) -> Array:
    """Values of a tensor from `start` on, a piece of them."""
    tensor, spec = folder.tensors[name], folder.specs[name]
    values = np.empty(min(PIECE_VALUES, spec.size - start), numpy_dtype(spec.dtype))
    folder.read_into(tensor, start * spec.itemsize, values.view(np.uint8).data)
    return values


def _differing(ours: Array, theirs: Array) -> int:
    """How many values differ: in their bits, or, of two dtypes, as numbers that both are."""
    if ours.dtype == theirs.dtype:
        return int(np.count_nonzero(bits(ours) != bits(theirs)))
    names = (ours.dtype.name, theirs.dtype.name)
    wide = numpy_dtype("float32" if exact(*names) or exact(*names[::-1]) else "float64")
    left, right = ours.astype(wide), theirs.astype(wide)
    return int(np.count_nonzero((left != right) & ~(np.isnan(left) & np.isnan(right))))
