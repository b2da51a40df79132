"""What a logit check found: one dataclass, its JSON, and its table for a terminal."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gemma_convert.flops.hardware import TERA
from gemma_convert.flops.report import human_flops
from gemma_convert.logits.divergence import Divergence, WorstToken
from gemma_convert.logits.drift import Drift

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = "gemma-convert/logit-check/1"


@dataclass(frozen=True)
class LogitReport:
    """Result of one check. `limit` is the largest KL (nats) that any token may have.

    `proof` is False where rounding alone could hide or cause a difference: then even a pass is an
    indication.
    """

    passed: bool
    proof: bool
    limit: float
    limit_reason: str
    divergence: Divergence
    drift: Drift | None
    """None where layers were not compared: of the whole model at once, or with golden logits."""
    sequences: int
    longest_sequence: int
    sliding_window: int
    images: int
    sounds: int
    layout: str
    dtype: str
    reference: str
    reference_device: str
    native_device: str
    whole_model: bool
    peak_memory_bytes: int
    versions: dict[str, str]
    seconds: float
    lossy_rows: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    native_devices: int = 1
    """Devices, of all processes, that the native side ran on."""
    processes: int = 1
    flops: int = 0
    """Model FLOPs of the forward passes: of both sides, or of the native one with golden logits."""
    running_seconds: float = 0.0
    """Time of those passes and of the comparison, weights read in it."""

    @property
    def flops_per_second(self) -> float:
        """What was achieved, on all devices together."""
        return self.flops / self.running_seconds if self.running_seconds else 0.0

    @property
    def verdict(self) -> str:
        """The result in one line."""
        if not self.passed:
            return "not the same model" if self.proof else "further apart than rounding should be"
        return "same model" if self.proof else "no difference seen: an indication, not proof"

    def as_text(self) -> str:
        """All of it, for `from_text` in another process."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> LogitReport:
        """The report of which this is the `as_text`."""
        values = json.loads(text)
        divergence, drift = values.pop("divergence"), values.pop("drift")
        worst = WorstToken(**divergence.pop("worst"))
        if drift is not None:
            drift = Drift(**drift | {"layers": tuple(drift["layers"])})
        for name in ("lossy_rows", "warnings"):
            values[name] = tuple(values[name])
        return LogitReport(divergence=Divergence(worst=worst, **divergence), drift=drift, **values)

    def as_json(self) -> dict[str, Any]:
        """The report as strict JSON: figures that are NaN or infinite are null, listed in `nan`."""
        figures = asdict(self.divergence)
        tokens, worst = figures.pop("tokens"), figures.pop("worst")
        drift = self.drift
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "verdict": self.verdict,
            "proof": self.proof,
            "limit": _finite(self.limit),
            "limit_reason": self.limit_reason,
            **{name: _finite(value) for name, value in figures.items()},
            "nan": sorted(name for name, value in figures.items() if not math.isfinite(value)),
            "worst_token": {**worst, "kl": _finite(worst["kl"])},
            "embedding_drift": None if drift is None else _finite(drift.embedding),
            "layers": [
                {"layer": index, "drift": _finite(value)}
                for index, value in enumerate(() if drift is None else drift.layers)
            ],
            "final_norm_drift": None if drift is None else _finite(drift.final_norm),
            "drift_tolerance": None if drift is None else drift.tolerance,
            "first_drift": None if drift is None else drift.first,
            "sequences": self.sequences,
            "tokens": tokens,
            "longest_sequence": self.longest_sequence,
            "sliding_window": self.sliding_window,
            "images": self.images,
            "sounds": self.sounds,
            "layout": self.layout,
            "dtype": self.dtype,
            "reference": self.reference,
            "devices": {"reference": self.reference_device, "native": self.native_device},
            "native_devices": self.native_devices,
            "processes": self.processes,
            "whole_model": self.whole_model,
            "peak_memory_bytes": self.peak_memory_bytes,
            "flops": self.flops,
            "running_seconds": round(self.running_seconds, 3),
            "tflops_per_second": self.flops_per_second / TERA,
            "versions": dict(self.versions),
            "seconds": round(self.seconds, 3),
            "lossy_rows": list(self.lossy_rows),
            "warnings": list(self.warnings),
        }


def render(report: LogitReport) -> RenderableType:
    """A compact table of the report, for rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    colour = "green" if report.passed and report.proof else "yellow" if report.passed else "red"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for name, value in _lines(report):
        table.add_row(name, Text(value))
    warnings = [Text(f"! {warning}", style="yellow") for warning in report.warnings]
    return Group(Text(report.verdict, style=f"bold {colour}"), table, *warnings)


def _lines(report: LogitReport) -> list[tuple[str, str]]:
    found, worst = report.divergence, report.divergence.worst
    text = "" if worst.text is None else f" {worst.text!r}"
    return [
        ("KL max", f"{found.kl_max:.2e}   limit {report.limit:.0e} ({report.limit_reason})"),
        ("KL p99, mean", f"{found.kl_p99:.2e}, {found.kl_mean:.2e}"),
        ("worst token", f"{worst.sequence}, position {worst.position}: id {worst.token}{text}"),
        ("top-1, top-10", f"{found.top1_agreement:.2%}, {found.topk_overlap:.2%} the same"),
        ("largest logit difference", f"{found.max_logit_difference:.2e}"),
        *([("drift", _drift(report.drift))] if report.drift is not None else []),
        (
            "compared",
            f"{found.tokens} tokens in {report.sequences} sequences, the longest "
            f"{report.longest_sequence} (sliding window {report.sliding_window})"
            + (f", {report.images} with an image" if report.images else "")
            + (f", {report.sounds} with a sound" if report.sounds else ""),
        ),
        ("reference", f"{report.reference}, float32, {report.reference_device}"),
        (
            "native",
            f"{report.layout}, {report.dtype}, {report.native_device}"
            + (f", {report.processes} processes" if report.processes > 1 else ""),
        ),
        (
            "arithmetic",
            f"{human_flops(report.flops)} in {report.running_seconds:.1f} s, weights read in it: "
            f"{report.flops_per_second / TERA:.3g} TFLOP/s",
        ),
        (
            "time, memory",
            f"{report.seconds:.1f} s, {report.peak_memory_bytes / 1e9:.1f} GB at most"
            + (", both models whole" if report.whole_model else ", layer by layer"),
        ),
    ]


def _drift(drift: Drift) -> str:
    last = f"{drift.final_norm:.0e} before the head"
    if drift.tolerance is None:
        return last
    if drift.first is None:
        return f"{last}, all layers within {drift.tolerance:.0e}"
    return f"{last}; first beyond {drift.tolerance:.0e}: {drift.first}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
