"""Files that claim to be enormous: refused in little memory, by a process that has no more."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from outcome import Count
from test_orbax_fuzz import FORMS, VALUES, alter_array

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.stores.orbax.writer import OrbaxWriter
from gemma_convert.stores.safetensors.header import safetensors_header

PROGRAM = """
import resource, sys, time
from pathlib import Path
from gemma_convert import GemmaConvertError, inspect, to_hf, to_native
from gemma_convert.checkpoint.original import read_exceptions
from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.layouts.registry import open_native
import safetensors, tensorstore

def read(folder):
    with open_native(folder) as native:
        for name, spec in native.specs.items():
            if spec.shape in {(6, 7), (5, 4, 3), ()}:
                native.opener(name, 0).read(tuple((0, size) for size in spec.shape))
    raise GemmaConvertError("everything is read")

CALLS = {
    "inspect": inspect,
    "orbax": read,
    "convert": lambda folder: to_native(folder, folder.parent / "out"),
    "exceptions": lambda folder: read_exceptions(
        folder, {"a": TensorSpec("float32", (1 << 50,))}
    ),
}
open_native(Path(sys.argv[1]) / "whole").release()
start = sum(int(line.split()[1]) for line in open("/proc/self/status") if "VmSize" in line) << 10
limit = start + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    call = CALLS[folder.name.partition(" ")[0]] if " " in folder.name else read
    started = time.process_time()
    try:
        call(folder)
    except GemmaConvertError as error:
        print(folder.name, "|", error.what)
    assert time.process_time() - started < 20, folder
"""


def sparse(path: Path, header: bytes, size: int) -> None:
    """A file of `size` bytes that takes hardly any."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header)
    os.truncate(path, size)


def bombs(root: Path, tiny: Path) -> None:
    length = (90 << 20).to_bytes(8, "little")
    sparse(root / "inspect header" / "model.safetensors", length, 1 << 40)
    sparse(root / "inspect index" / "model.safetensors.index.json", b"{", 1 << 34)
    sparse(root / "inspect tree" / "_METADATA", b"{", 1 << 34)
    sparse(root / "inspect yaml" / "metadata.yaml", b"{", 1 << 34)
    text = b'{"a": {"dtype": "U8", "shape": [%d], "data_offsets": [0, %d]}}' % (1 << 40, 1 << 40)
    header = len(text).to_bytes(8, "little") + text
    (root / "convert data").mkdir()
    shutil.copy(tiny / "config.json", root / "convert data")
    sparse(root / "convert data" / "model.safetensors", header, len(header) + (1 << 40))
    (root / "convert config").mkdir()
    shutil.copy(tiny / "model.safetensors", root / "convert config")
    sparse(root / "convert config" / "config.json", b"{", 1 << 34)
    count = 1 << 34
    specs = {"a/index": TensorSpec("int64", (count,)), "a/bits": TensorSpec("uint32", (count,))}
    header = safetensors_header(specs)
    sparse(root / "exceptions file" / "exceptions.safetensors", header, len(header) + 12 * count)


def orbax_bombs(root: Path) -> None:
    """Chunks much larger than their array, all zeros, which compress to almost nothing."""
    import tensorstore as ts

    for form in ("files", "files zstd", "ocdbt zarr2", "ocdbt zarr3"):
        folder = root / f"orbax {form}"
        shutil.copytree(root / "whole" if form == "files" else _store(root, form), folder)
        for name in ("embedder.input_embedding", "layer_0.mlp.linear"):

            def change(metadata: dict) -> bytes:
                chunk = [1 << 17, 1 << 17, 1 << 17][: len(metadata["shape"])]
                if "chunk_grid" in metadata:
                    metadata["chunk_grid"]["configuration"]["chunk_shape"] = chunk
                else:
                    metadata["chunks"] = chunk
                return json.dumps(metadata).encode()

            alter_array(folder, form, name, change)
    folder = root / "orbax zstd"
    shutil.copytree(root / "whole", folder)
    path = folder / "embedder.input_embedding"
    shutil.rmtree(path)
    metadata = {
        "shape": [6, 7], "chunks": [1 << 13, 1 << 13], "dtype": "|u1", "order": "C",
        "compressor": {"id": "zstd", "level": 1}, "fill_value": None, "filters": None,
    }  # fmt: skip
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/"}}
    store = ts.open(spec | {"metadata": metadata}, open=True, create=True).result()
    store[...] = np.ones((6, 7), np.uint8)


def _store(root: Path, form: str) -> Path:
    folder = root.parent / form
    writer = OrbaxWriter(folder, FORMS[form])
    writer.declare(
        {
            path: (TensorSpec(values.dtype.name, values.shape), values.shape)
            for path, values in VALUES.items()
        }
    )
    for path, values in VALUES.items():
        writer.write(path, tuple((0, size) for size in values.shape), values).result()
    writer.write_tree({})
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_bombs(tiny, tmp_path):
    root = tmp_path / "bombs"
    root.mkdir()
    shutil.copytree(_store(root, "files"), root / "whole")
    bombs(root, tiny("31b", text_only=True))
    orbax_bombs(root)
    names = sorted(folder.name for folder in root.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, root],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    Count.cases += len(names)
    assert not done.returncode, done.stderr[-2000:]
    said = dict(line.split(" | ") for line in done.stdout.splitlines())
    assert sorted(said) == names
    assert [name for name, what in said.items() if what == "everything is read"] == ["whole"]
    assert not (root / "out").exists()
