"""What a report says, a sentence a line, wherever it is shown: terminal, HTML, JUnit."""

from __future__ import annotations

from gemma_convert.flops.hardware import TERA
from gemma_convert.flops.report import human_flops
from gemma_convert.logits.drift import Drift
from gemma_convert.logits.limit import PROOF_LIMIT
from gemma_convert.logits.part_check import FACTOR, LocalCheck
from gemma_convert.logits.report import LogitReport
from gemma_convert.output import counted
from gemma_convert.prompts.images import IMAGE
from gemma_convert.prompts.sounds import SOUND

_MOST_MISTAKES = 6
_OPTIONS = {medium.tower: medium.option for medium in (IMAGE, SOUND)}


def parts_line(report: LogitReport) -> str:
    """What the parts are by themselves, or why that is not known."""
    if report.local is not None:
        return local_line(report.local)
    if report.whole_model:
        why = "with --whole-model"
    elif report.drift is None:
        why = "with golden logits"
    elif report.processes > 1:
        why = "on several processes"
    else:
        why = "between two Hugging Face checkpoints"
    return f"not compared one by one {why}: only the KL of the logits decides"


def local_line(local: LocalCheck) -> str:
    """What the parts are by themselves: within their rounding, or which is not."""
    rounding = f"rounding error in {local.noise} (limit {FACTOR:g})"
    worst = local.worst
    if local.passed:
        return f"all {len(local.parts)} parts are within {worst.times:.1f} × their own {rounding}"
    first = local.failed[0]
    if first.error <= FACTOR * first.noise:
        off = f"{first.name}: one feature is wrong when given the original's inputs,"
    else:
        off = f"{first.name}: error {first.error:.1e} when given the original's inputs,"
    return (
        f"{off} {first.times:,.0f} × its own {rounding}; "
        f"{_fail(len(local.failed), f'of {len(local.parts)} parts')}"
    )


def mistake_lines(local: LocalCheck) -> list[str]:
    """What is wrong with the first parts that failed; that it is not known, where it is not."""
    known = [f"{one.name}: {one.mistake}" for one in local.failed if one.mistake is not None]
    if not known:
        return ["unknown: none of the usual mistakes explains what these parts compute"]
    left = len(local.failed) - min(len(known), _MOST_MISTAKES)
    more = [
        f"{_fail(left, 'more part' if left == 1 else 'more parts')}; the cause is looked for "
        "only in the first two layers that fail"
    ]
    return known[:_MOST_MISTAKES] + (more if left else [])


def _fail(count: int, what: str) -> str:
    return counted(count, f"{what} fails", f"{what} fail")


def noise_line(report: LogitReport) -> str:
    """The KL that rounding alone causes in this network."""
    floor = report.noise_floor or 0.0
    text = f"rounding errors of this size alone change the original's logits by a KL of {floor:.1e}"
    amplified = floor > PROOF_LIMIT
    return text + (": this network amplifies rounding" if amplified else "")


def compared_line(report: LogitReport) -> str:
    """What was compared: tokens, sequences, images and sounds."""
    return (
        f"{counted(report.divergence.tokens, 'token')} in {counted(report.sequences, 'sequence')}, "
        f"the longest {report.longest_sequence} (sliding window {report.sliding_window})"
        + (f", {report.images} with an image" if report.images else "")
        + (f", {report.sounds} with a sound" if report.sounds else "")
    )


def not_run_line(report: LogitReport) -> str:
    """What the native checkpoint has and no input went through; empty where that is nothing."""
    return ", ".join(f"{tower} tower (add {_OPTIONS[tower]})" for tower in report.towers_not_run)


def native_line(report: LogitReport) -> str:
    """How the native side was run: layout, dtype, device and processes."""
    return f"{report.layout}, {report.dtype}, {report.native_device}" + (
        f", {report.processes} processes" if report.processes > 1 else ""
    )


def arithmetic_line(report: LogitReport) -> str:
    """FLOPs, the time that they took, and the rate."""
    return (
        f"{human_flops(report.flops)} in {report.running_seconds:.1f} s, reading weights included: "
        f"{report.flops_per_second / TERA:.3g} TFLOP/s"
    )


def drift_line(drift: Drift) -> str:
    """How far states are apart in the end, and the first stage beyond the tolerance."""
    last = f"hidden states differ by {drift.final_norm:.0e} before the output head"
    if drift.tolerance is None:
        return last
    if drift.first is None:
        return f"{last}; all layers are within {drift.tolerance:.0e}"
    return f"{last}; the first beyond {drift.tolerance:.0e} is {drift.first}"
