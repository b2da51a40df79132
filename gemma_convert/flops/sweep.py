"""Steps that differ in one number, such as the length of their sequences, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from gemma_convert.flops.report import FlopsReport

COLUMNS = (
    "seq_len",
    "batch",
    "flops",
    "forward_flops",
    "hardware_flops",
    "parameters",
    "weight_bytes",
    "gradient_bytes",
    "optimizer_bytes",
    "activation_bytes",
    "bytes_per_device",
)
"""Whole numbers all; activations are empty where no gradient is computed."""


def csv_table(reports: Sequence[FlopsReport]) -> str:
    """A line of names, and one for each step; `seq_len` is in decoding that of the cache."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    lines.writerows(map(_row, reports))
    return text.getvalue().rstrip("\n")


def _row(report: FlopsReport) -> tuple[int | None, ...]:
    count, held = report.count, report.memory
    work = count.work
    return (
        work.cached or work.tokens,
        work.batch,
        count.total,
        count.forward,
        count.hardware,
        held.parameters,
        held.weights,
        held.gradients,
        held.optimizer,
        held.activations,
        report.bytes_per_device,
    )
