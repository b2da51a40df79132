"""What a logit check found: one dataclass, its text for another process, and its JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from gemma_convert.flops.hardware import TERA
from gemma_convert.logits.divergence import Divergence, WorstToken
from gemma_convert.logits.drift import Drift
from gemma_convert.logits.fingerprint import Fingerprint
from gemma_convert.logits.part_check import FACTOR, LocalCheck, PartCheck
from gemma_convert.logits.tokens import Candidate, CheckedSequence, Prediction

if TYPE_CHECKING:
    pass

SCHEMA = "gemma-convert/logit-check/3"


@dataclass(frozen=True)
class LogitReport:
    """The result of one check. `limit` is the largest KL, in nats, that a token may have.

    `proof` is False where rounding alone could hide or cause a difference: then a pass is only an
    indication.
    """

    passed: bool
    proof: bool
    limit: float
    limit_reason: str
    divergence: Divergence
    drift: Drift | None
    """None where layers were not compared: with `whole_model`, or with golden logits."""
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
    """Each part on the states of the reference; None where `drift` is None, or with processes."""
    limit_p99: float | None = None
    """The largest KL that all but one token in a hundred may have; None where it is `limit`."""
    noise_floor: float | None = None
    """The KL, in nats, that noise as large as the errors of the parts causes in the reference.

    None where `local` is None, and where a part failed.
    """
    lossy_rows: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    native_devices: int = 1
    """The number of devices, of all processes, that the native model ran on."""
    processes: int = 1
    flops: int = 0
    """Model FLOPs of the forward passes of both models; with golden logits, of the native one."""
    running_seconds: float = 0.0
    """Time of those passes and of the comparison, in which weights are read too."""
    original: str = ""
    checkpoint: str = ""
    """The two checkpoints, as they were given."""
    checked: tuple[CheckedSequence, ...] = ()
    """Every token; of several processes only process 0 has them."""
    worst: tuple[Prediction, ...] = ()
    """What was predicted after the worst tokens, the worst first; only process 0 has them."""
    fingerprints: tuple[Fingerprint, ...] = ()
    towers_not_run: tuple[str, ...] = ()
    """Towers of the native checkpoint that no image or sound went through."""

    @property
    def flops_per_second(self) -> float:
        """The achieved rate, on all devices together."""
        return self.flops / self.running_seconds if self.running_seconds else 0.0

    @property
    def verdict(self) -> str:
        """The result in one line."""
        if not self.passed:
            return (
                "not the same model" if self.proof else "larger difference than rounding explains"
            )
        return "same model" if self.proof else "no difference found: an indication, not proof"

    def without_tokens(self) -> LogitReport:
        """The report without the single tokens, of which there may be millions."""
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
        for name in ("lossy_rows", "warnings", "towers_not_run"):
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
            "towers_not_run": list(self.towers_not_run),
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
                "by_feature": _finite(part.by_feature),
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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
