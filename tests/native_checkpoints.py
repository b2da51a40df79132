"""Native checkpoints in tests: read and altered by the libraries that own the formats."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gemma_jax_by_hand import flat
from trees import listed_tree, read_safetensors, restore, same_bits

from gemma_convert import VerifyReport, verify
from gemma_convert.checkpoint.manifest import write_manifest

Arrays = dict[str, np.ndarray]
Edit = Callable[[np.ndarray], np.ndarray]

OURS = Path("hf", "gemma-convert")
CARRIED = OURS / "carried.safetensors"


def sums(folder: Path) -> dict[str, str]:
    """Name → sha256 of every file below `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a converted checkpoint, without what depends on order, time and blocks."""
    content = json.loads((folder / OURS / "manifest.json").read_text())
    for key in ("regions", "array_metadata", "files", "sha256"):
        del content[key]
    return content


def edit_manifest(folder: Path, **changes: object) -> None:
    """Changes entries of a manifest, and seals it again."""
    path = folder / OURS / "manifest.json"
    content = json.loads(path.read_text())
    kept = {key: content[key] for key in content if key not in ("schema", "sha256")}
    write_manifest(path, kept | changes)


def damaged(report: VerifyReport) -> list[str]:
    """What differs, but for the database of Orbax that is another when a value in it is."""
    database = re.compile(r"(.*/)?(manifest\.ocdbt|d/[0-9a-f]{32})")
    return [name for name in report.different if not database.fullmatch(name)]


def nested_tree(folder: Path) -> dict[str, Any]:
    """The nested dict of numpy arrays in an Orbax item folder, restored by Orbax."""
    import jax
    import orbax.checkpoint as ocp

    tree = listed_tree(folder)
    kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    checkpointer = ocp.PyTreeCheckpointer()
    restored: dict[str, Any] = checkpointer.restore(folder.absolute(), restore_args=kinds)
    return restored


def arrays_of(folder: Path, layout: str) -> Arrays:
    """Path → array of a native checkpoint of ours, read by Orbax or by the safetensors library."""
    if layout == "fast-llm":
        return read_safetensors(folder)
    if layout == "gemma-jax":
        return flat(nested_tree(folder))
    if layout == "tunix":
        return flat(nested_tree(folder / "0" / "model_params"))
    return restore(folder / "0" / "items")


def differing(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> list[str]:
    """Arrays that one side lacks, or that differ in dtype, shape or bits."""
    return sorted(
        name
        for name in {*left, *right}
        if name not in left or name not in right or not same_bits(left[name], right[name])
    )


def edited(source: Path, target: Path, edits: Mapping[str, Edit]) -> Path:
    """A copy of a checkpoint in which some tensors of its safetensors files are changed."""
    shutil.copytree(source, target)
    edit_tensors(target, edits)
    return target


def edit_tensors(folder: Path, edits: Mapping[str, Edit]) -> None:
    """Changes tensors of safetensors files in place; the header stays as it is."""
    before = read_safetensors(folder)
    left = dict(edits)
    for file in sorted(folder.glob("*.safetensors")):
        data = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        for name in header.keys() & left.keys():
            begin, end = header[name]["data_offsets"]
            changed = left.pop(name)(before[name].copy()).astype(before[name].dtype)
            data[start + begin : start + end] = np.ascontiguousarray(changed).tobytes()
        file.write_bytes(data)
    assert not left


def alter(items: Path, array: str, edit: Edit) -> None:
    """Writes edited values into one array of an OCDBT store of zarr v2, by tensorstore itself."""
    import tensorstore as ts

    key = array.replace("'", "\0").split("\0")
    path = "".join(part if place % 2 else part.replace("/", ".") for place, part in enumerate(key))
    base = {"driver": "file", "path": f"{items}/"}
    store = ts.open(
        {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{path}/"}},
        open=True,
    ).result()
    store.write(edit(np.array(store.read().result()))).result()


def passes(path: Path, against: Path | None = None) -> VerifyReport:
    """Asserts that a checkpoint is verified, and gives the report."""
    report = verify(path, against=against)
    assert report.passed, report.different
    return report
