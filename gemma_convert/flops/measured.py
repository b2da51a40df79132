"""A measured step: which options belong together, and how well the step was done."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gemma_convert.errors import UsageError
from gemma_convert.flops.hardware import DType, Hardware, Utilization, find_hardware, given_peak
from gemma_convert.flops.report import FlopsReport


@dataclass(frozen=True)
class Measured:
    """Seconds of a step, None where none were measured, and the peak to compare with, in FLOP/s."""

    seconds: float | None
    hardware: Hardware | None
    dtype: DType
    sparse: bool
    peak: float | None

    def added_to(self, report: FlopsReport) -> FlopsReport:
        """The report with its utilization."""
        if self.seconds is None:
            return report
        count = report.count
        used = Utilization(self.seconds, report.devices, count.total, count.hardware, self.peak)
        if self.hardware is None:
            return replace(report, utilization=used)
        return replace(
            report,
            utilization=used,
            hardware=self.hardware,
            dtype=self.dtype,
            sparse=self.sparse,
        )


def measured(
    seconds: float | None,
    hardware: str | None,
    peak: float | None,
    dtype: DType | None,
    sparse: bool,
) -> Measured:
    """What the options of that name say, `peak` in TFLOP/s and bf16 the default of `dtype`.

    Raises UsageError where one has no use without another, or no device has that rate.
    """
    if hardware is not None and peak is not None:
        raise UsageError("--hardware has a peak rate of its own.", do="leave out --peak")
    if seconds is None and (hardware is not None or peak is not None):
        raise needs("--hardware and --peak", "--step-time")
    if hardware is None and (dtype is not None or sparse):
        raise needs("--dtype and --sparse", "--hardware")
    rate = None if peak is None else given_peak(peak)
    if hardware is None:
        return Measured(seconds, None, dtype or "bf16", sparse, rate)
    device = find_hardware(hardware)
    return Measured(seconds, device, dtype or "bf16", sparse, device.peak(dtype or "bf16", sparse))


def needs(options: str, other: str) -> UsageError:
    """The message about options that have no use without another one."""
    return UsageError(f"{options} belong to {other}.", do=f"add {other}, or leave them out")
