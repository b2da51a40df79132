"""Peaks by datasheet, and utilization."""

from __future__ import annotations

import math

import pytest

from gemma_convert.errors import UsageError
from gemma_convert.flops.hardware import HARDWARE, Utilization, find_hardware

DENSE_BF16 = {
    "H100": 989.5,
    "H200": 989.5,
    "B200": 2250,
    "A100": 312,
    "L4": 121,
    "RTX-A6000": 154.85,
    "TPU-v4": 275,
    "TPU-v5e": 197,
    "TPU-v5p": 459,
    "TPU-v6e": 918,
    "TPU-v7": 2307,
}
"""TFLOP/s, as the vendors' own pages have them; NVIDIA's halved from those with sparsity."""


def test_the_table_is_complete():
    assert {one.name: one.dense["bf16"] for one in HARDWARE.values()} == DENSE_BF16


@pytest.mark.parametrize(
    ("name", "dtype", "dense", "sparse"),
    [
        ("H100", "fp8", 1979, 3958),
        ("H200", "int8", 1979, 3958),
        ("H200", "tf32", 494.5, 989),
        ("B200", "bf16", 2250, 4500),
        ("B200", "fp8", 4500, 9000),
        ("A100", "int8", 624, 1248),
        ("A100", "tf32", 156, 312),
        ("L4", "fp8", 242.5, 485),
        ("L4", "tf32", 60, 120),
        ("RTX-A6000", "fp16", 154.85, 309.7),
    ],
)
def test_dense_is_half_of_sparse(name, dtype, dense, sparse):
    device = find_hardware(name)
    assert device.peak(dtype) == dense * 10**12
    assert device.peak(dtype, sparse=True) == sparse * 10**12


@pytest.mark.parametrize(
    ("name", "dtype", "rate"),
    [
        ("H100", "fp32", 67),
        ("A100", "fp32", 19.5),
        ("L4", "fp32", 30.3),
        ("RTX-A6000", "fp32", 38.7),
        ("TPU-v4", "int8", 275),
        ("TPU-v5e", "int8", 393),
        ("TPU-v6e", "int8", 1836),
        ("TPU-v7", "fp8", 4614),
    ],
)
def test_other_dtypes(name, dtype, rate):
    assert find_hardware(name).peak(dtype) == rate * 10**12


@pytest.mark.parametrize(
    ("name", "dtype", "sparse"),
    [
        ("A100", "fp8", False),
        ("H100", "fp32", True),
        ("TPU-v5p", "bf16", True),
        ("TPU-v5p", "fp16", False),
        ("B200", "tf32", False),
    ],
)
def test_no_figure_is_made_up(name, dtype, sparse):
    with pytest.raises(UsageError, match=f"no {'sparse' if sparse else 'dense'} {dtype} rate"):
        find_hardware(name).peak(dtype, sparse)


def test_names_in_any_case_and_no_others():
    assert find_hardware("tpu-V5P").name == "TPU-v5p"
    with pytest.raises(UsageError, match="not known") as caught:
        find_hardware("h1000")
    assert caught.value.expected.startswith("H100, H200, B200")


def test_every_figure_has_a_vendors_source():
    assert all(one.source.startswith(("NVIDIA ", "Google Cloud")) for one in HARDWARE.values())


def test_utilization():
    used = Utilization(4.0, 5, model_flops=1000, hardware_flops=1300, peak=100.0)
    assert (used.per_device, used.mfu, used.hfu) == (50.0, 0.5, 0.65)
    unknown = Utilization(4.0, 5, 1000, 1300)
    assert (unknown.per_device, unknown.mfu, unknown.hfu) == (50.0, None, None)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_time_is_above_zero(seconds):
    with pytest.raises(UsageError, match="--step-time"):
        Utilization(seconds, 1, 1, 1)
