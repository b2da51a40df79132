"""What a logit check found: one dataclass, its JSON, and its table for a terminal."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from gemma_convert.flops.hardware import TERA
from gemma_convert.flops.report import human_flops
from gemma_convert.logits.divergence import Divergence, WorstToken
from gemma_convert.logits.drift import Drift
from gemma_convert.logits.fingerprint import Fingerprint
from gemma_convert.logits.limit import PROOF_LIMIT
from gemma_convert.logits.local import FACTOR, LocalCheck, PartCheck
from gemma_convert.logits.scale import figure, log_range
from gemma_convert.logits.sparkline import Sparkline
from gemma_convert.logits.tokens import Candidate, CheckedSequence, Prediction, worst_first
from gemma_convert.output import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = "gemma-convert/logit-check/3"

_MOST_SPARKLINES = 12
_MOST_MISTAKES = 6


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
    local: LocalCheck | None = None
    """Each part on the reference's own states; None where `drift` is, and of several processes."""
    limit_p99: float | None = None
    """The largest KL that all but one token in a hundred may have, None where that is `limit`."""
    noise_floor: float | None = None
    """KL in nats that noise of the size of the local errors gives the reference.

    None where `local` is, and where a part of it failed.
    """
    lossy_rows: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    native_devices: int = 1
    """Devices, of all processes, that the native side ran on."""
    processes: int = 1
    flops: int = 0
    """Model FLOPs of the forward passes: of both sides, or of the native one with golden logits."""
    running_seconds: float = 0.0
    """Time of those passes and of the comparison, weights read in it."""
    original: str = ""
    checkpoint: str = ""
    """The two folders, as they were named."""
    checked: tuple[CheckedSequence, ...] = ()
    """Every token; process 0 alone has them, of several."""
    worst: tuple[Prediction, ...] = ()
    """What was predicted behind the worst tokens, the worst first; as `checked`."""
    fingerprints: tuple[Fingerprint, ...] = ()

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

    def without_tokens(self) -> LogitReport:
        """The report without what it has of single tokens, which may be millions."""
        return replace(self, checked=(), worst=())

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
        if (local := values.pop("local")) is not None:
            local = LocalCheck(tuple(PartCheck(**part) for part in local["parts"]), local["noise"])
        for name in ("lossy_rows", "warnings"):
            values[name] = tuple(values[name])
        values["checked"] = tuple(map(CheckedSequence.from_values, values["checked"]))
        values["worst"] = tuple(map(Prediction.from_values, values["worst"]))
        values["fingerprints"] = tuple(Fingerprint(**one) for one in values["fingerprints"])
        found = Divergence(worst=worst, **divergence)
        return LogitReport(divergence=found, drift=drift, local=local, **values)

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
            "limit_p99": _finite(self.limit if self.limit_p99 is None else self.limit_p99),
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
            "local": None if self.local is None else _local_json(self.local),
            "noise_floor": None if self.noise_floor is None else _finite(self.noise_floor),
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
            "original": self.original,
            "checkpoint": self.checkpoint,
            "each_sequence": [_sequence_json(one) for one in self.checked],
            "worst_tokens": [_prediction_json(one) for one in self.worst],
            "fingerprints": [asdict(one) for one in self.fingerprints],
        }


def _local_json(local: LocalCheck) -> dict[str, Any]:
    return {
        "passed": local.passed,
        "noise": local.noise,
        "factor": FACTOR,
        "parts": [
            {
                "tower": part.tower,
                "part": part.part,
                "layer": part.layer,
                "error": _finite(part.error),
                "noise": _finite(part.noise),
                "passed": part.passed,
                "mistake": part.mistake,
            }
            for part in local.parts
        ],
    }


def _sequence_json(one: CheckedSequence) -> dict[str, Any]:
    return {
        "sequence": one.name,
        "tokens": len(one.ids),
        "compared": len(one.compared),
        "kl_mean": _finite(one.kl_mean),
        "kl_max": _finite(one.kl_max),
        "worst_position": one.worst,
    }


def _prediction_json(one: Prediction) -> dict[str, Any]:
    def side(candidates: tuple[Candidate, ...]) -> list[dict[str, Any]]:
        return [{**asdict(each), "probability": _finite(each.probability)} for each in candidates]

    return {
        **asdict(one.behind),
        "kl": _finite(one.behind.kl),
        "reference": side(one.reference),
        "native": side(one.native),
    }


def render(report: LogitReport) -> RenderableType:
    """A compact table of the report, for rich, with the KL of each sequence's tokens as a line."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    colour = "green" if report.passed and report.proof else "yellow" if report.passed else "red"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for name, value in _lines(report):
        table.add_row(name, Text(value))
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", max_width=24, no_wrap=True, overflow="ellipsis")
    lines.add_column(no_wrap=True)
    lines.add_column()
    lines.add_row()
    for name, value, sparkline in _sparklines(report):
        lines.add_row(Text(printable(name)), value, sparkline)
    warnings = [Text(f"! {warning}", style="yellow") for warning in report.warnings]
    return Group(Text(report.verdict, style=f"bold {colour}"), table, lines, *warnings)


def _sparklines(report: LogitReport) -> list[tuple[str, str, Sparkline | str]]:
    """Name, largest value and line of each sequence, of the worst where they are many."""
    span = log_range([kl for one in report.checked for kl in one.compared], report.limit)
    order = worst_first([one.kl_max for one in report.checked])
    kept = sorted(order[:_MOST_SPARKLINES])
    head = f"by position, from 1e{span.low} to 1e{span.high}"
    rows: list[tuple[str, str, Sparkline | str]] = [("", "KL max", head)] if kept else []
    rows += [
        (one.name, figure(one.kl_max), Sparkline(one.kl, span, report.limit))
        for one in (report.checked[number] for number in kept)
    ]
    if len(order) > len(kept):
        rows.append((f"and {len(order) - len(kept)} more", "", "all of them better"))
    if report.drift is not None:
        drift, tolerance = report.drift, report.drift.tolerance
        stages = drift.stages
        span = log_range(list(stages.values()), tolerance)
        worst = figure(stages[list(stages)[worst_first(list(stages.values()))[0]]])
        rows.append(("drift by layer", worst, Sparkline(list(stages.values()), span, tolerance)))
    return rows


def _lines(report: LogitReport) -> list[tuple[str, str]]:
    found, worst, local = report.divergence, report.divergence.worst, report.local
    text = "" if worst.text is None else f" {worst.text!r}"
    place = f"{printable(worst.sequence)}, position {worst.position}"
    return [
        ("KL max", f"{found.kl_max:.2e}   limit {report.limit:.0e} ({report.limit_reason})"),
        ("worst token", f"{place}: id {worst.token}{text}"),
        ("KL p99, mean", f"{found.kl_p99:.2e}, {found.kl_mean:.2e}"),
        (
            "agreement",
            f"top-1 {found.top1_agreement:.2%}, top-10 {found.topk_overlap:.2%}, largest logit "
            f"difference {found.max_logit_difference:.2e}",
        ),
        *([("drift", _drift(report.drift))] if report.drift is not None else []),
        *([("each part", local_line(report.local))] if report.local is not None else []),
        *([("what is wrong", "\n".join(mistake_lines(local)))] if local and local.failed else []),
        *([("noise floor", noise_line(report))] if report.noise_floor is not None else []),
        ("compared", compared_line(report)),
        ("reference", f"{report.reference}, float32, {report.reference_device}"),
        ("native", native_line(report)),
        ("arithmetic", arithmetic_line(report)),
        (
            "time, memory",
            f"{report.seconds:.1f} s, {report.peak_memory_bytes / 1e9:.1f} GB at most"
            + (", both models whole" if report.whole_model else ", layer by layer"),
        ),
    ]


def local_line(local: LocalCheck) -> str:
    """What the parts are by themselves: within their rounding, or which is not."""
    rounding = f"rounding in {local.noise}"
    worst = local.worst
    if local.passed:
        return (
            f"all {len(local.parts)} within {worst.times:.1f} × their own {rounding} "
            f"(limit {FACTOR:g})"
        )
    first = local.failed[0]
    return (
        f"{first.name} is {first.error:.1e} off on the original's own states, {first.times:,.0f} × "
        f"its {rounding} (limit {FACTOR:g}); {len(local.failed)} of {len(local.parts)} parts fail"
    )


def mistake_lines(local: LocalCheck) -> list[str]:
    """What is wrong with the first parts that failed; that it is not known, where it is not."""
    known = [f"{one.name}: {one.mistake}" for one in local.failed if one.mistake is not None]
    if not known:
        return ["not known: no mistake that is tried gives what these parts give"]
    left = len(local.failed) - min(len(known), _MOST_MISTAKES)
    more = [f"{left} more parts fail; what is wrong is looked for in the first two layers"]
    return known[:_MOST_MISTAKES] + (more if left else [])


def noise_line(report: LogitReport) -> str:
    """What rounding alone amounts to in this network, as KL."""
    floor = report.noise_floor or 0.0
    text = f"errors of that size move the original itself by KL {floor:.1e}"
    amplified = floor > PROOF_LIMIT
    return text + (": this network amplifies rounding" if amplified else "")


def compared_line(report: LogitReport) -> str:
    """What was compared: tokens, sequences, images and sounds."""
    return (
        f"{report.divergence.tokens} tokens in {report.sequences} sequences, the longest "
        f"{report.longest_sequence} (sliding window {report.sliding_window})"
        + (f", {report.images} with an image" if report.images else "")
        + (f", {report.sounds} with a sound" if report.sounds else "")
    )


def native_line(report: LogitReport) -> str:
    """How the native side was run: layout, dtype, device and processes."""
    return f"{report.layout}, {report.dtype}, {report.native_device}" + (
        f", {report.processes} processes" if report.processes > 1 else ""
    )


def arithmetic_line(report: LogitReport) -> str:
    """FLOPs, the time that they took, and the rate."""
    return (
        f"{human_flops(report.flops)} in {report.running_seconds:.1f} s, weights read in it: "
        f"{report.flops_per_second / TERA:.3g} TFLOP/s"
    )


def _drift(drift: Drift) -> str:
    last = f"{drift.final_norm:.0e} before the head"
    if drift.tolerance is None:
        return last
    if drift.first is None:
        return f"{last}, all layers within {drift.tolerance:.0e}"
    return f"{last}; first beyond {drift.tolerance:.0e}: {drift.first}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
