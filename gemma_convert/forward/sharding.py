"""Which axis of an array is split over the devices, and arrays put there part by part.

All devices of all hosts are one axis of a mesh: a layer's heads and widths are split over them
(tensor parallelism), and what flows between layers is whole on each. On one device arrays stay as
they are, and nothing here costs anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from gemma_convert.forward.stored import StoredArray, read

Axes: TypeAlias = tuple[str, ...]
"""The names of an array's axes."""

MODEL = "model"
"""The mesh's only axis."""

MESH_AXES: Mapping[str, str | None] = {
    "heads": MODEL,
    "mlp": MODEL,
    "expert_mlp": MODEL,
    "kv_heads": MODEL,
    "vocab": MODEL,
    "ple_vocab": MODEL,
    "embed": MODEL,
    "head_dim": MODEL,
    "ple": MODEL,
    "experts": None,  # run one after the other
    "layers": None,
    "blocks": None,
    "block_layers": None,
    "layers_ple": None,
    "kv": None,
    "gate_up": None,
    "attended": None,  # heads and head_dim in one, told apart by a reshape
    "doubled": None,  # cut in two halves
    "patch": None,
    "positions": None,
    "sides": None,
    "time": None,
    "bands": None,
    "channels": None,
    "deeper": None,
    "output": None,
    "one": None,
}
"""Axis of an array → axis of the mesh, the best one to split first; None is never split."""


@cache
def device_mesh() -> Mesh | None:
    """The mesh of all devices of all processes; None where there is only one."""
    devices = jax.devices()
    return Mesh(np.array(devices), (MODEL,)) if len(devices) > 1 else None


def split_axis(shape: Sequence[int], axes: Sequence[str], devices: int) -> int | None:
    """The place of the axis of an array of `shape` that is split over `devices`, None for none.

    That is the first one of `MESH_AXES` whose length `devices` divides. Vectors are whole on every
    device, and so is an array whose axes have no names. Raises KeyError for other names.
    """
    fitting = [
        axis
        for axis, length in zip(axes, shape, strict=False)
        if MESH_AXES[axis] is not None and length % devices == 0
    ]
    if len(shape) < 2 or len(axes) != len(shape) or not fitting:
        return None
    return axes.index(min(fitting, key=list(MESH_AXES).index))


def sharding_of(shape: Sequence[int], axes: Sequence[str], mesh: Mesh) -> NamedSharding:
    """How an array of `shape` lies on the devices of `mesh`."""
    axis = split_axis(shape, axes, mesh.size)
    if axis is None:
        return NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, MESH_AXES[axes[axis]]))  # type: ignore[no-untyped-call]


def place(array: Any, axes: Sequence[str] = ()) -> jax.Array:
    """`array` on the devices, split as `split_axis` says; one that is there stays as it is.

    It may be a host's, equal in all processes, or still in a file, of which a process reads only
    what its own devices hold.
    """
    mesh, placed = device_mesh(), array
    if mesh is None:
        placed = jax.device_put(read(array))
    elif not isinstance(array, jax.Array) or len(array.sharding.device_set) < mesh.size:
        sharding = sharding_of(array.shape, axes, mesh)
        parts = _parts(array, sharding)
        placed = jax.make_array_from_callback(tuple(array.shape), sharding, parts)
    found: jax.Array = placed
    return found


def place_all(tree: Any, axes: Mapping[str, Axes]) -> Any:
    """`tree`, a pytree, with every array placed, one after the other.

    `axes` are the names of an array's axes by its path, the keys of nested dicts joined by slashes.
    An array that it does not know is whole on every device.
    """

    def placed(path: Sequence[Any], array: Any) -> jax.Array:
        keys = (str(entry.key) for entry in path if isinstance(entry, DictKey))
        return place(array, axes.get("/".join(keys), ()))

    return jax.tree_util.tree_map_with_path(placed, tree)


def replicated(x: jax.Array) -> jax.Array:
    """`x`, within a compiled function or without, made whole on every device."""
    mesh = device_mesh()
    if mesh is None:
        return x
    whole: jax.Array = jax.lax.with_sharding_constraint(x, sharding_of((), (), mesh))  # type: ignore[no-untyped-call]
    return whole


def gather(table: Any, rows: np.ndarray[Any, Any]) -> jax.Array:
    """Rows [*places *rest] of `table` [rows *rest], whole on every device.

    They are gathered where the table is, in its file, on the host or on devices: it is never moved.
    """
    if isinstance(table, jax.Array) and device_mesh() is not None:
        found: jax.Array = _gather(table, rows)
        return found
    return place(table[rows])


@jax.jit
def _gather(table: jax.Array, rows: jax.Array) -> jax.Array:
    return replicated(table[rows])


def place_rows(
    shape: tuple[int, int], rows: Callable[[int, int], np.ndarray[Any, Any]]
) -> jax.Array:
    """A table [vocab embed] of `shape` on the devices, whose `rows` (first, last) can be had.

    Those that this process's devices hold are asked for, once and together.
    """
    mesh = device_mesh()
    if mesh is None:
        return place(rows(0, shape[0]))
    sharding = sharding_of(shape, ("vocab", "embed"), mesh)
    first, last = _own(sharding, shape, 0)
    part = _within(rows(first, last), first, shape, 0)
    return jax.make_array_from_callback(shape, sharding, part)


def _parts(array: Any, sharding: NamedSharding) -> Callable[[Any], np.ndarray[Any, Any]]:
    """What gives a device its part of `array`, by the index of that part.

    A part is read from a file alone, unless it is smaller than a chunk, which would be decoded for
    every device that has some of it: then all that this process needs is read at once.
    """
    axis, shape = len(sharding.spec) - 1, tuple(array.shape)
    if (
        not isinstance(array, StoredArray)
        or sharding.is_fully_replicated
        or array.chunk_shape[axis] <= sharding.shard_shape(shape)[axis]
    ):
        return lambda index: np.asarray(array[index])
    first, last = _own(sharding, shape, axis)
    part = (*[slice(None)] * axis, slice(first, last))
    return _within(np.asarray(array[part]), first, shape, axis)


def _own(sharding: NamedSharding, shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    """From where to where on `axis` the devices of this process have parts."""
    parts = sharding.addressable_devices_indices_map(shape).values()
    ends = [part[axis].indices(shape[axis]) for part in parts if part is not None]
    return min(first for first, _, _ in ends), max(last for _, last, _ in ends)


def _within(
    block: np.ndarray[Any, Any], first: int, shape: tuple[int, ...], axis: int
) -> Callable[[Any], np.ndarray[Any, Any]]:
    """What gives a part by its index, of a `block` that starts with entry `first` of `axis`."""

    def part(index: tuple[slice, ...]) -> np.ndarray[Any, Any]:
        start, stop, _ = index[axis].indices(shape[axis])
        return block[(*index[:axis], slice(start - first, stop - first), *index[axis + 1 :])]

    return part
