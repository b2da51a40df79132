"""What zarr says of an array, in its versions 2 and 3, as Orbax writes it."""

from __future__ import annotations

from typing import Any, Literal

from gemma_convert.arrays.dtypes import TensorSpec, numpy_dtype

Compression = Literal["none", "zstd"]

ZSTD_LEVEL = {"zarr3": 3, "zarr2": 1}
"""The levels that Orbax itself uses."""


def zarr3(spec: TensorSpec, chunk: tuple[int, ...], compression: Compression) -> dict[str, Any]:
    """The content of `zarr.json` of an array that is stored in chunks [*chunk]."""
    codecs: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if compression == "zstd":
        codecs.append({"name": "zstd", "configuration": {"level": ZSTD_LEVEL["zarr3"]}})
    return {
        "shape": list(spec.shape),
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "codecs": codecs,
        "fill_value": 0,
    }


def zarr2(spec: TensorSpec, chunk: tuple[int, ...], compression: Compression) -> dict[str, Any]:
    """The content of `.zarray` of an array that is stored in chunks [*chunk]."""
    dtype = spec.dtype if spec.dtype == "bfloat16" else numpy_dtype(spec.dtype).str
    zstd = {"id": "zstd", "level": ZSTD_LEVEL["zarr2"]}
    return {
        "shape": list(spec.shape),
        "chunks": list(chunk),
        "dtype": dtype,
        "compressor": zstd if compression == "zstd" else None,
        "dimension_separator": ".",
        "fill_value": None,
        "filters": None,
        "order": "C",
    }
