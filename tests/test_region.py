"""Regions, boxes, blocks and chunks against brute force over single elements."""

import itertools
from dataclasses import dataclass
from math import prod

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from gemma_convert.mapping.region import (
    Extent,
    NotABoxError,
    Region,
    RegionCopy,
    blocks,
    chunk_shape,
    split_steps,
)

NAMES = ("embed", "heads", "head_dim", "mlp", "experts")


def region(*dims, tensor="t"):
    """A region from tuples of (axis, size) or (axis, size, at)."""
    return Region(tensor, tuple(tuple(Extent(*extent) for extent in dim) for dim in dims))


def test_shape_axes_and_lengths():
    part = region((("heads", 3), ("head_dim", 4)), (), (("kv", 2, 1), ("embed", 5)))
    assert part.shape == (12, 1, 10)
    assert part.axes == ("heads", "head_dim", "embed")
    assert part.lengths({}) == (3, 4, 5)
    assert part.lengths({"head_dim": (1, 3), "kv": (0, 1)}) == (3, 2, 5)


def test_boxes():
    part = region((("heads", 3), ("head_dim", 4)), (), (("kv", 2, 1), ("embed", 5)))
    assert part.box({}) == ((0, 12), (0, 1), (5, 5))
    assert part.box({"heads": (1, 3)}) == ((4, 8), (0, 1), (5, 5))
    assert part.box({"heads": (2, 3), "head_dim": (1, 3)}) == ((9, 2), (0, 1), (5, 5))
    assert part.box({"embed": (2, 4)}) == ((0, 12), (0, 1), (7, 2))
    assert region().box({}) == ()


def test_a_part_that_is_no_box():
    part = region((("heads", 3), ("head_dim", 4)))
    with pytest.raises(NotABoxError, match="heads head_dim"):
        part.box({"head_dim": (0, 2)})
    with pytest.raises(NotABoxError):
        region((("heads", 3), ("kv", 2, 0))).box({})
    assert region((("heads", 1), ("kv", 2, 1))).box({}) == ((1, 1),)
    assert region((("heads", 3, 2), ("kv", 2, 1))).box({}) == ((5, 1),)


def test_meets():
    part = region((("kv", 4, 2), ("embed", 5)))
    assert part.meets({})
    assert part.meets({"kv": (2, 3)})
    assert part.meets({"kv": (0, 3)})
    assert not part.meets({"kv": (0, 2)})
    assert not part.meets({"kv": (3, 4)})
    assert part.meets({"embed": (0, 1)})


def test_permutation():
    source = region((("heads", 3), ("head_dim", 4)), (("embed", 5),))
    target = region((("embed", 5),), (("heads", 3),), (("head_dim", 4),), tensor="n")
    assert RegionCopy("row", source, target, None).permutation == (2, 0, 1)
    assert RegionCopy("row", target, source, None).permutation == (1, 2, 0)


@pytest.mark.parametrize(
    ("limit", "leading", "steps"),
    [
        (7 * 4 * 3 * 2, (), {}),
        (4 * 3 * 2, (), {"embed": 1}),
        (4 * 3 * 2, ("embed",), {"embed": 1}),
        (2 * 4 * 3 * 2, (), {"embed": 1}),
        (2 * 4 * 3 * 2, ("embed",), {"embed": 1}),
        (5 * 4 * 3 * 2, (), {"embed": 1}),
        (5 * 4 * 3 * 2, ("embed",), {"embed": 5}),
        (4 * 3 * 2 - 1, (), {"embed": 1, "heads": 2}),
        (4 * 3 * 2 - 1, ("heads",), {"embed": 1, "heads": 2}),
        (3 * 2 - 1, (), {"embed": 1, "heads": 1, "head_dim": 1}),
        (1, (), {"embed": 1, "heads": 1, "head_dim": 1}),
    ],
)
def test_steps_cut_the_slowest_axes_first(limit, leading, steps):
    whole = region((("embed", 7),), (("heads", 4), ("head_dim", 3)))
    assert split_steps(whole, 2, limit, frozenset(leading)) == steps


def test_blocks_and_their_chunks():
    whole = region((("embed", 5),), (("heads", 4), ("head_dim", 3)))
    assert list(blocks(whole, {"embed": 2})) == [
        {"embed": (0, 2)},
        {"embed": (2, 4)},
        {"embed": (4, 5)},
    ]
    assert list(blocks(whole, {})) == [{}]
    target = region(
        (("heads", 4),), (("block", 6, 2),), (("head_dim", 3),), (("kv", 2, 0), ("embed", 5))
    )
    assert chunk_shape(target, {"embed": 2, "heads": 1}) == (1, 1, 3, 2)
    assert chunk_shape(target, {}) == (4, 1, 3, 5)
    assert chunk_shape(target, {"embed": 9}) == (4, 1, 3, 5)


@dataclass
class Row:
    """A random row: each side shows some axes in names and groups the others into dimensions."""

    sizes: dict[str, int]
    source_names: tuple[str, ...]
    target_names: tuple[str, ...]
    source_dims: tuple[tuple[str, ...], ...]
    target_dims: tuple[tuple[str, ...], ...]
    stacking: tuple[int, int] | None
    """Length and place of one more axis of the target, at which this row has its fixed index."""

    def sources(self):
        return itertools.product(*(range(self.sizes[axis]) for axis in self.source_names))

    def source_shape(self):
        return tuple(prod(self.sizes[axis] for axis in dim) for dim in self.source_dims)

    def target_shape(self):
        shape = [prod(self.sizes[axis] for axis in dim) for dim in self.target_dims]
        if self.stacking:
            shape.insert(min(1, len(shape)), self.stacking[0])
        return tuple(shape)

    def copies(self, values):
        """The copies out of one source tensor, as a plan makes them."""
        index = dict(zip(self.source_names, values, strict=True))
        named = [axis for axis in self.target_names if axis not in index]
        for extra in itertools.product(*(range(self.sizes[axis]) for axis in named)):
            here = {**index, **dict(zip(named, extra, strict=True))}
            in_source = {axis: here[axis] for axis in named}
            in_target = {a: here[a] for a in self.source_names if a not in self.target_names}
            target = self.dims(self.target_dims, in_target)
            if self.stacking:
                at = min(1, len(target))
                target.insert(at, (Extent("block", *self.stacking),))
            name = tuple(here[axis] for axis in self.target_names)
            yield RegionCopy(
                "row",
                Region("source", tuple(self.dims(self.source_dims, in_source))),
                Region(str(name), tuple(target)),
                None,
            )

    def dims(self, dims, fixed):
        return [tuple(Extent(a, self.sizes[a], fixed.get(a)) for a in dim) for dim in dims]

    def place(self, dims, here):
        """Position of one element, dimension by dimension: the definition of a group of axes."""
        place = []
        for dim in dims:
            position = 0
            for axis in dim:
                position = position * self.sizes[axis] + here[axis]
            place.append(position)
        return place

    def elements(self):
        """(names, place) in the source and in the target of every single element."""
        for values in itertools.product(*(range(size) for size in self.sizes.values())):
            here = dict(zip(self.sizes, values, strict=True))
            target = self.place(self.target_dims, here)
            if self.stacking:
                target.insert(min(1, len(target)), self.stacking[1])
            yield (
                tuple(here[axis] for axis in self.source_names),
                tuple(self.place(self.source_dims, here)),
                tuple(here[axis] for axis in self.target_names),
                tuple(target),
            )


@st.composite
def grouped(draw, axes):
    """The axes in a random order, in random groups, with units between."""
    rest, dims = draw(st.permutations(axes)), []
    while rest:
        size = draw(st.integers(0 if len(dims) < 6 else 1, min(3, len(rest))))
        dims.append(tuple(rest[:size]))
        rest = rest[size:]
    return tuple(dims)


@st.composite
def rows(draw):
    names = NAMES[: draw(st.integers(1, len(NAMES)))]
    sizes = {axis: draw(st.integers(1, 6)) for axis in names}
    assume(prod(sizes.values()) <= 700)
    source_names = tuple(axis for axis in names if draw(st.integers(0, 5)) == 0)
    target_names = tuple(axis for axis in names if draw(st.integers(0, 5)) == 0)
    source_dims = draw(grouped([axis for axis in names if axis not in source_names]))
    target_dims = draw(grouped([axis for axis in names if axis not in target_names]))
    stacking = draw(st.none() | st.sampled_from([(1, 0), (3, 2), (4, 0)]))
    return Row(sizes, source_names, target_names, source_dims, target_dims, stacking)


def is_box(mask):
    """Whether the chosen elements fill the smallest box around them."""
    places = np.argwhere(mask)
    if not len(places):
        return True
    return prod(places.max(axis=0) - places.min(axis=0) + 1) == len(places)


def chosen(part, ranges):
    """The elements of the whole tensor that a region takes: each axis on its own, no strides."""
    sizes = [extent.size for extent in part.extents]
    mask = np.ones(sizes, bool)
    for place, extent in enumerate(part.extents):
        keep = np.zeros(extent.size, bool)
        low, high = ranges.get(extent.axis, (0, extent.size))
        keep[slice(low, high) if extent.at is None else extent.at] = True
        mask &= keep.reshape([-1 if i == place else 1 for i in range(len(sizes))])
    return mask.reshape(part.shape)


def slices(box):
    return tuple(slice(start, start + length) for start, length in box)


def assert_box(part, ranges):
    """The box takes exactly the elements that it should; False where they are no box."""
    mask = chosen(part, ranges)
    try:
        box = part.box(ranges)
    except NotABoxError:
        assert not is_box(mask)
        return False
    inside = np.zeros(part.shape, bool)
    inside[slices(box)] = True
    assert np.array_equal(inside, mask)
    return True


@given(rows(), st.data())
@settings(deadline=None, max_examples=150)
def test_a_box_takes_the_right_elements_or_is_refused(row, data):
    values = next(row.sources())
    for copy in itertools.islice(row.copies(values), 3):
        for part in (copy.source, copy.target):
            ranges = {}
            for extent in part.extents:
                if extent.at is None and data.draw(st.booleans()):
                    low = data.draw(st.integers(0, extent.size - 1))
                    ranges[extent.axis] = (low, data.draw(st.integers(low + 1, extent.size)))
            assert_box(part, ranges)


def plan_of(row, itemsize, limit):
    """The steps of one source tensor and its copies, as a plan chooses them."""
    copies = list(row.copies(next(row.sources())))
    whole = Region("source", tuple(row.dims(row.source_dims, {})))
    leading = frozenset.intersection(
        *(frozenset(dim[0].axis for dim in copy.target.dims if dim) for copy in copies)
    )
    return whole, split_steps(whole, itemsize, limit, leading)


@given(rows(), st.sampled_from([1, 2, 4]), st.integers(1, 600))
@settings(deadline=None, max_examples=250)
def test_blocks_follow_the_bytes(row, itemsize, limit):
    whole, steps = plan_of(row, itemsize, limit)
    flat = np.arange(prod(whole.shape)).reshape([extent.size for extent in whole.extents])
    at = 0
    for ranges in blocks(whole, steps):
        part = flat[tuple(slice(*extent.range(ranges)) for extent in whole.extents)].ravel()
        assert part.tolist() == list(range(at, at + part.size))
        assert part.size == prod(whole.lengths(ranges))
        assert part.size * itemsize <= limit or part.size == 1
        at += part.size
    assert at == flat.size


@given(rows(), st.sampled_from([1, 2, 4]), st.integers(1, 600))
@settings(deadline=None, max_examples=250)
def test_blocks_move_every_element_to_its_place(row, itemsize, limit):
    """Reshape, index, transpose, reshape by blocks, as a transfer runs them."""
    whole, steps = plan_of(row, itemsize, limit)
    first = {axis: (0, step) for axis, step in steps.items()}
    for copy in row.copies(next(row.sources())):
        boxes = [assert_box(copy.source, {}), assert_box(copy.target, first)]
        if not all(boxes):
            event("refused: no box")
            return
    event("converted")
    sources = {values: np.full(row.source_shape(), -1) for values in row.sources()}
    targets, writes = {}, {}
    for number, (at_source, place, _, _) in enumerate(row.elements()):
        sources[at_source][place] = number
    for values in row.sources():
        for ranges in blocks(whole, steps):
            lengths = whole.lengths(ranges)
            block = sources[values][slices(whole.box(ranges))].reshape(lengths)
            for copy in row.copies(values):
                if not copy.source.meets(ranges):
                    continue
                index = tuple(
                    slice(None) if e.at is None else e.at - ranges.get(e.axis, (0, 0))[0]
                    for e in copy.source.extents
                )
                part = block[index].transpose(copy.permutation)
                box, chunk = copy.target.box(ranges), chunk_shape(copy.target, steps)
                assert_whole_chunks(box, chunk, row.target_shape())
                assert prod(chunk) * itemsize <= max(limit, itemsize)
                name = copy.target.tensor
                shape = tuple(length for _, length in box)
                values_there = targets.setdefault(name, np.full(row.target_shape(), -1))
                count = writes.setdefault(name, np.zeros(row.target_shape(), int))
                values_there[slices(box)] = part.reshape(shape)
                count[slices(box)] += 1
    for number, (_, _, at_target, place) in enumerate(row.elements()):
        assert targets[str(at_target)][place] == number
        assert writes[str(at_target)][place] == 1
    assert sum(count.sum() for count in writes.values()) == prod(row.sizes.values())


def assert_whole_chunks(box, chunk, shape):
    for (start, length), step, size in zip(box, chunk, shape, strict=True):
        assert start % step == 0
        assert length % step == 0 or start + length == size
