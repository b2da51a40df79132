"""Casting and scaling: bits kept where they can be, losses found where they cannot."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from gemma_convert.arrays.dtypes import exact, rounds, widest
from gemma_convert.arrays.values import bits, convert, lost_places, may_lose, restore

ALL_16_BITS = np.arange(1 << 16, dtype=np.uint16)
BF16 = ALL_16_BITS.view(ml_dtypes.bfloat16)
F16 = ALL_16_BITS.view(np.float16)

PUBLISHED_WIDTHS = (1536, 2560, 2816, 5376, 3840)


def converted(source, dtype, scale=None):
    target = np.empty(source.shape, dtype)
    convert(source, target, scale)
    return target


def test_every_bfloat16_is_widened_by_a_shift_of_bits():
    wide = converted(BF16, np.float32)
    assert np.array_equal(bits(wide), ALL_16_BITS.astype(np.uint32) << 16)
    assert np.array_equal(bits(restore(wide, "bfloat16", None))[~np.isnan(wide)],
                          ALL_16_BITS[~np.isnan(wide)])  # fmt: skip


def test_equal_dtypes_copy_bits_whatever_the_layout():
    for source in (BF16, F16, ALL_16_BITS.astype(np.uint32).view(np.float32)):
        square = source.reshape(256, -1)
        for view in (
            square,
            square.T,
            square[::3, ::2],
            square.reshape(16, 16, -1).transpose(2, 0, 1),
        ):
            assert np.array_equal(
                bits(converted(view, view.dtype)), bits(np.ascontiguousarray(view))
            )


def test_large_transposes_are_tiled_without_a_seam():
    source = np.arange(700 * 600, dtype=np.uint32).view(np.float32).reshape(700, 600)
    assert np.array_equal(bits(converted(source.T, np.float32)), bits(source).T)
    cube = np.arange(3 * 300 * 520, dtype=np.uint32).view(np.float32).reshape(3, 300, 520)
    for order in ((2, 0, 1), (0, 2, 1), (1, 2, 0), (2, 1, 0), (1, 0, 2)):
        assert np.array_equal(
            bits(converted(cube.transpose(order), np.float32)), bits(cube).transpose(order)
        )


@pytest.mark.parametrize("width", PUBLISHED_WIDTHS)
def test_scaled_float32_gives_every_ordinary_bfloat16_back(width):
    """So that a float32 embedding is lossless: all finite weights below overflow come back."""
    scale = math.sqrt(width)
    lost = lost_places(BF16, converted(BF16, np.float32, scale), scale)[:, 0]
    ordinary = np.abs(BF16.astype(np.float32)) < 3e38 / scale
    assert not ordinary[lost].any()


def test_scaled_bfloat16_loses_about_one_mantissa_in_seven():
    weights = BF16[(ALL_16_BITS >= 0x3C00) & (ALL_16_BITS < 0x3F00)]
    scale = math.sqrt(1536)
    lost = lost_places(weights, converted(weights, ml_dtypes.bfloat16, scale), scale)
    assert 0.1 < len(lost) / len(weights) < 0.2


def test_scaling_multiplies_in_float32():
    source = np.array([1.5, -2.25, 0.1], np.float32)
    assert np.array_equal(
        converted(source, np.float32, math.sqrt(1536)), source * np.float32(math.sqrt(1536))
    )


def test_rounding_is_to_nearest_even():
    source = np.array([0x3F808000, 0x3F818000, 0x3F808001], np.uint32).view(np.float32)
    assert bits(converted(source, ml_dtypes.bfloat16)).tolist() == [0x3F80, 0x3F82, 0x3F81]


def test_lost_places_are_those_whose_bits_differ():
    source = np.array([[1.0, 1.001], [3.0, np.nan]], np.float32)
    target = converted(source, ml_dtypes.bfloat16)
    assert lost_places(source, target, None).tolist() == [[0, 1]]


def test_minus_zero_infinities_and_denormals_survive():
    for dtype in ("bfloat16", "float16"):
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
        source = np.array([0x8000, 0x0000, 0x0001, 0x8001], np.uint16).view(kind)
        assert not len(lost_places(source, converted(source, np.float32), None))
    infinities = np.array([np.inf, -np.inf], ml_dtypes.bfloat16)
    assert not len(lost_places(infinities, converted(infinities, np.float32, 39.2), 39.2))


def test_policy_words():
    assert exact("bfloat16", "float32")
    assert exact("float16", "float32")
    assert not exact("float32", "bfloat16")
    assert not exact("float16", "bfloat16")
    assert widest("bfloat16", "float16") == "float32"
    assert widest("bfloat16", "bfloat16") == "bfloat16"
    assert may_lose("bfloat16", "float32", 2.0)
    assert not may_lose("bfloat16", "float32", None)
    assert rounds("bfloat16", "bfloat16", scaled=True)
    assert not rounds("bfloat16", "bfloat16", scaled=False)
    assert not rounds("float32", "float32", scaled=True)
