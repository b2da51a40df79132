"""Peak rates of accelerators by their vendors' datasheets, and how much of them a step reaches.

Where NVIDIA's datasheets give the rates of tensor cores with 2:4 sparsity alone, dense rates are
half of those, as their footnotes say; where they print both, both stand here as printed. Of the
GeForce boards the rates are those with float32 accumulation. fp32 of NVIDIA is the rate without
tensor cores. A dtype without a figure in the source is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gemma_convert.errors import UsageError

DType = Literal["bf16", "fp16", "fp8", "int8", "tf32", "fp32"]

TERA = 10**12

SHORTEST = 1e-9
"""Shortest time of a step in seconds, shorter than any clock of a device."""


@dataclass(frozen=True)
class Hardware:
    """Peak rates of one device in TFLOP/s (int8: TOP/s), and where they are from."""

    name: str
    source: str
    dense: Mapping[DType, float]
    sparse: Mapping[DType, float] = field(default_factory=dict)

    def peak(self, dtype: DType, sparse: bool = False) -> float:
        """FLOP/s of one device. Raises UsageError where the source has no such figure."""
        rates = self.sparse if sparse else self.dense
        if dtype not in rates:
            kind = "sparse" if sparse else "dense"
            raise UsageError(
                f"There is no {kind} {dtype} rate of {self.name}.",
                expected=", ".join(rates) or "no sparse rates: leave out --sparse",
                found=dtype,
            )
        return rates[dtype] * TERA


def _nvidia(
    name: str, source: str, sparse: Mapping[DType, float], fp32: float | None = None
) -> Hardware:
    dense: dict[DType, float] = {dtype: rate / 2 for dtype, rate in sparse.items()}
    if fp32 is not None:
        dense["fp32"] = fp32
    return Hardware(name, f"NVIDIA {source}", dense, sparse)


def _tpu(name: str, page: str, dense: Mapping[DType, float]) -> Hardware:
    return Hardware(name, f"Google Cloud, docs.cloud.google.com/tpu/docs/{page}", dense)


def _printed(
    name: str, source: str, rates: Mapping[DType, tuple[float, float]], fp32: float | None = None
) -> Hardware:
    """A source that prints (dense, sparse) of each dtype."""
    dense: dict[DType, float] = {dtype: rate for dtype, (rate, _) in rates.items()}
    if fp32 is not None:
        dense["fp32"] = fp32
    return Hardware(name, source, dense, {dtype: rate for dtype, (_, rate) in rates.items()})


_HOPPER: Mapping[DType, float] = {
    "bf16": 1979,
    "fp16": 1979,
    "fp8": 3958,
    "int8": 3958,
    "tf32": 989,
}

_CDNA3: Mapping[DType, float] = {
    "bf16": 1307.4,
    "fp16": 1307.4,
    "fp8": 2614.9,
    "int8": 2614.9,
    "tf32": 653.7,
}

_TABLE = (
    _nvidia("H100", "H100 Tensor Core GPU datasheet, SXM", _HOPPER, 67),
    _nvidia("H200", "H200 Tensor Core GPU datasheet, SXM", _HOPPER, 67),
    _nvidia(
        "B200",
        "Blackwell datasheet, HGX B200",
        {"bf16": 4500, "fp16": 4500, "fp8": 9000, "int8": 9000},
    ),
    _nvidia(
        "GB200",
        "Blackwell datasheet, GB200 NVL72, one of its GPUs",
        {"bf16": 5000, "fp16": 5000, "fp8": 10000, "int8": 10000, "tf32": 2500},
        80,
    ),
    _nvidia(
        "B300",
        "HGX platform specifications, HGX B300, an eighth of it",
        {"bf16": 4500, "fp16": 4500, "fp8": 9000, "tf32": 2250},
    ),
    _printed(
        "GH200",
        "NVIDIA GH200 Grace Hopper Superchip datasheet",
        {"bf16": (990, 1979), "fp16": (990, 1979), "fp8": (1979, 3958), "tf32": (494, 989)},
    ),
    _nvidia(
        "A100",
        "A100 Tensor Core GPU datasheet",
        {"bf16": 624, "fp16": 624, "int8": 1248, "tf32": 312},
        19.5,
    ),
    _nvidia(
        "L4",
        "L4 Tensor Core GPU datasheet",
        {"bf16": 242, "fp16": 242, "fp8": 485, "int8": 485, "tf32": 120},
        30.3,
    ),
    _printed(
        "L40S",
        "NVIDIA L40S datasheet",
        {"bf16": (362.05, 733), "fp16": (362.05, 733), "fp8": (733, 1466), "tf32": (183, 366)},
        91.6,
    ),
    _printed(
        "A10G",
        "NVIDIA A10G datasheet, Amazon Web Services",
        {"bf16": (70, 140), "fp16": (70, 140)},
    ),
    Hardware(
        "V100",
        "NVIDIA A100 architecture white paper, its column of V100",
        {"fp16": 125, "fp32": 15.7},
    ),
    _nvidia("RTX-A6000", "RTX A6000 datasheet", {"bf16": 309.7, "fp16": 309.7}, 38.7),
    _printed(
        "RTX-4090",
        "NVIDIA Ada GPU architecture white paper, GeForce RTX 4090",
        {
            "bf16": (165.2, 330.4),
            "fp16": (165.2, 330.4),
            "fp8": (330.3, 660.6),
            "int8": (660.6, 1321.2),
        },
    ),
    _printed(
        "RTX-5090",
        "NVIDIA RTX Blackwell GPU architecture white paper, GeForce RTX 5090",
        {"bf16": (209.5, 419), "fp8": (419, 838)},
    ),
    Hardware("MI300X", "AMD Instinct MI300X data sheet", _CDNA3),
    Hardware("MI325X", "AMD Instinct MI325X data sheet", _CDNA3),
    _printed(
        "MI355X",
        "AMD Instinct MI355X GPU brochure",
        {
            "bf16": (2516.6, 5033.2),
            "fp16": (2516.6, 5033.2),
            "fp8": (5033.2, 10066.4),
            "int8": (5033.2, 10066.4),
        },
    ),
    _tpu("TPU-v4", "v4", {"bf16": 275, "int8": 275}),
    _tpu("TPU-v5e", "v5e", {"bf16": 197, "int8": 393}),
    _tpu("TPU-v5p", "v5p", {"bf16": 459}),
    _tpu("TPU-v6e", "v6e", {"bf16": 918, "int8": 1836}),
    _tpu("TPU-v7", "tpu7x", {"bf16": 2307, "fp8": 4614}),
)

HARDWARE: Mapping[str, Hardware] = {one.name.lower(): one for one in _TABLE}
"""Devices by their names in small letters: a GPU, or a TPU chip with all its cores."""


_ALIASES = {
    "v5litepod": "tpu-v5e",
    "trillium": "tpu-v6e",
    "ironwood": "tpu-v7",
    "tpu7x": "tpu-v7",
}
"""Other names of TPUs that Google uses → theirs here."""


def find_hardware(name: str) -> Hardware:
    """The device of that name, in whatever case; `v5p` and `trillium` are TPUs.

    Raises UsageError for another name.
    """
    key = name.lower().replace(" ", "-")
    found = HARDWARE.get(key) or HARDWARE.get(_ALIASES.get(key, f"tpu-{key}"))
    if found is None:
        raise UsageError(
            "This hardware is not known.",
            expected=", ".join(one.name for one in _TABLE),
            found=name[:200],
            do="give its peak rate with --peak instead",
        )
    return found


def given_peak(tera: float) -> float:
    """FLOP/s of `tera` TFLOP/s. Raises UsageError where that is no rate."""
    if not 0 < tera < math.inf:
        raise UsageError("--peak is a rate in TFLOP/s.", expected="above 0", found=tera)
    return tera * TERA


@dataclass(frozen=True)
class Utilization:
    """A measured step: its time in seconds, the devices, and what it needs and computes (FLOPs).

    `peak` is that of one device in FLOP/s, None where no hardware is named.
    """

    seconds: float
    devices: int
    model_flops: int
    hardware_flops: int
    peak: float | None = None

    def __post_init__(self) -> None:
        if not SHORTEST <= self.seconds < math.inf:
            raise UsageError(
                "--step-time is a time in seconds.",
                expected=f"a finite one, at least {SHORTEST:g}",
                found=self.seconds,
            )

    @property
    def per_device(self) -> float:
        """Model FLOP/s of each device."""
        return self.model_flops / self.seconds / self.devices

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization (PaLM, https://arxiv.org/abs/2204.02311, appendix B)."""
        return None if self.peak is None else self.per_device / self.peak

    @property
    def hfu(self) -> float | None:
        """Hardware FLOPs utilization: what is computed again counts too."""
        if self.peak is None:
            return None
        return self.hardware_flops / self.seconds / self.devices / self.peak
