"""Peaks by datasheet, and utilization."""

from __future__ import annotations

import math

import pytest

from gemma_convert.errors import UsageError
from gemma_convert.flops.hardware import HARDWARE, Utilization, find_hardware, given_peak

DENSE_BF16 = {
    "H100": 989.5,
    "H200": 989.5,
    "B200": 2250,
    "GB200": 2500,
    "B300": 2250,
    "GH200": 990,
    "A100": 312,
    "L4": 121,
    "L40S": 362.05,
    "A10G": 70,
    "V100": None,
    "RTX-A6000": 154.85,
    "RTX-4090": 165.2,
    "RTX-5090": 209.5,
    "MI300X": 1307.4,
    "MI325X": 1307.4,
    "MI355X": 2516.6,
    "TPU-v4": 275,
    "TPU-v5e": 197,
    "TPU-v5p": 459,
    "TPU-v6e": 918,
    "TPU-v7": 2307,
}
"""TFLOP/s by the vendors; NVIDIA's halved from those with sparsity. V100 has none of bf16."""


def test_the_table_is_complete():
    assert {one.name: one.dense.get("bf16") for one in HARDWARE.values()} == DENSE_BF16


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
        ("GB200", "bf16", 2500, 5000),
        ("GB200", "fp8", 5000, 10000),
        ("B300", "bf16", 2250, 4500),
        ("B300", "tf32", 1125, 2250),
        ("RTX-4090", "bf16", 165.2, 330.4),
        ("RTX-4090", "fp8", 330.3, 660.6),
        ("RTX-5090", "bf16", 209.5, 419),
        ("RTX-5090", "fp8", 419, 838),
        ("A10G", "bf16", 70, 140),
        ("MI355X", "bf16", 2516.6, 5033.2),
        ("MI355X", "fp8", 5033.2, 10066.4),
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
        ("GB200", "fp32", 80),
        ("GH200", "tf32", 494),
        ("L40S", "fp8", 733),
        ("L40S", "fp32", 91.6),
        ("V100", "fp16", 125),
        ("V100", "fp32", 15.7),
        ("RTX-4090", "int8", 660.6),
        ("MI300X", "fp8", 2614.9),
        ("MI325X", "tf32", 653.7),
        ("MI355X", "int8", 5033.2),
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
        ("V100", "bf16", False),
        ("MI300X", "bf16", True),
        ("B300", "int8", False),
        ("RTX-5090", "fp16", False),
    ],
)
def test_no_figure_is_made_up(name, dtype, sparse):
    with pytest.raises(UsageError, match=f"no {'sparse' if sparse else 'dense'} {dtype} rate"):
        find_hardware(name).peak(dtype, sparse)


def test_names_in_any_case_and_no_others():
    assert find_hardware("tpu-V5P").name == "TPU-v5p"
    assert find_hardware("rtx 4090").name == "RTX-4090"
    with pytest.raises(UsageError, match="not known") as caught:
        find_hardware("h1000")
    assert caught.value.expected.startswith("H100, H200, B200")


def test_every_figure_has_a_vendors_source():
    assert all(
        one.source.startswith(("NVIDIA ", "AMD ", "Google Cloud")) for one in HARDWARE.values()
    )


def test_utilization():
    used = Utilization(4.0, 5, model_flops=1000, hardware_flops=1300, peak=100.0)
    assert (used.per_device, used.mfu, used.hfu) == (50.0, 0.5, 0.65)
    unknown = Utilization(4.0, 5, 1000, 1300)
    assert (unknown.per_device, unknown.mfu, unknown.hfu) == (50.0, None, None)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_peak_is_a_rate(rate):
    assert given_peak(12.5) == 12.5e12
    with pytest.raises(UsageError, match="--peak"):
        given_peak(rate)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_time_is_above_zero(seconds):
    with pytest.raises(UsageError, match="--step-time"):
        Utilization(seconds, 1, 1, 1)
