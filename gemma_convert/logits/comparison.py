"""Two reports of logit-check, before and after a change: what became of each figure and part.

Worse is a figure that is beyond its limit and larger than it was, or a part that fails and did not.
What stays within its limit is shown and is no fault: rounding moves with every change of the
arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_convert.api.arguments import public
from gemma_convert.errors import SourceError
from gemma_convert.files.json_file import read_object
from gemma_convert.logits.report import SCHEMA as REPORT
from gemma_convert.logits.scale import figure

SCHEMA = "gemma-convert/compare-reports/1"
MAX_REPORT_BYTES = 1 << 30

_FIGURES = {
    "largest KL": "kl_max",
    "99th percentile of the KL": "kl_p99",
    "mean KL": "kl_mean",
    "top-1 agreement": "top1_agreement",
    "top-10 agreement": "topk_overlap",
    "largest logit difference": "max_logit_difference",
    "noise floor": "noise_floor",
    "drift before the output head": "final_norm_drift",
}
_LIMITS = {"kl_max": "limit", "kl_p99": "limit_p99"}
_CIRCUMSTANCES = (
    "layout",
    "dtype",
    "reference",
    "whole_model",
    "limit",
    "tokens",
    "sequences",
    "images",
    "sounds",
)
"""What must be alike for figures to be comparable."""


@dataclass(frozen=True)
class Change:
    """One figure before and after; NaN where it is no number, None where there is none."""

    name: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class PartChange:
    """One kind of part over all layers: the most times its rounding it is off, and what fails."""

    name: str
    before: float | None
    after: float | None
    failed_before: tuple[str, ...]
    failed_after: tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """One of the reports: its file, its verdict, and what it was of."""

    path: str
    passed: bool
    verdict: str
    checkpoint: str
    versions: dict[str, str]


@dataclass(frozen=True)
class ReportComparison:
    """Two reports side by side; the comparison passes where nothing is worse."""

    before: Side
    after: Side
    figures: tuple[Change, ...]
    parts: tuple[PartChange, ...]
    sequences: tuple[Change, ...]
    worse: tuple[str, ...]
    """What is worse and beyond its limit, a sentence each."""
    unlike: tuple[str, ...]
    """Differences between the checks themselves, for which figures may differ."""

    @property
    def passed(self) -> bool:
        return not self.worse

    @property
    def verdict(self) -> str:
        """The result in one line."""
        if self.worse:
            return "worse than before"
        return "better than before" if self.after.passed > self.before.passed else "not worse"

    def as_json(self) -> dict[str, Any]:
        """The comparison as strict JSON: a figure that is missing or not finite is null."""
        values = _finite(asdict(self))
        return {"schema": SCHEMA, "passed": self.passed, "verdict": self.verdict, **values}


@public
def compare_reports(before: str | Path, after: str | Path) -> ReportComparison:
    """Returns the comparison of two reports, files that `logit-check --json` has printed.

    Raises SourceError where one is not such a report, or has another version of the schema.
    """
    old, new = (_read(Path(path)) for path in (before, after))
    try:
        return _compared(Path(before), old, Path(after), new)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise SourceError(
            "A report of logit-check has been changed, so it cannot be compared.",
            where=f"{before} or {after}",
            found=f"{type(error).__name__}: {error}",
            do="print it again with logit-check --json",
        ) from None


def _compared(
    before: Path, old: dict[str, Any], after: Path, new: dict[str, Any]
) -> ReportComparison:
    parts = _parts(old, new)
    return ReportComparison(
        before=_side(before, old),
        after=_side(after, new),
        figures=tuple(
            Change(name, _figure(old, key), _figure(new, key)) for name, key in _FIGURES.items()
        ),
        parts=parts,
        sequences=_sequences(old, new),
        worse=(*_worse_figures(old, new), *_worse_parts(parts)),
        unlike=_unlike(old, new),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_object(path, "the report", MAX_REPORT_BYTES)
    except FileNotFoundError:
        raise SourceError("There is no such report.", where=path) from None
    if found.get("schema") != REPORT:
        raise SourceError(
            "This is no report that logit-check --json has printed.",
            where=path,
            expected=f"schema {REPORT}",
            found=str(found.get("schema", "no schema"))[:200],
            do="run the check again with this version, and keep what --json prints",
        )
    return found


def _side(path: Path, report: dict[str, Any]) -> Side:
    versions = {str(name): str(one) for name, one in report["versions"].items()}
    verdict, checkpoint = str(report["verdict"]), str(report["checkpoint"])
    return Side(str(path), bool(report["passed"]), verdict, checkpoint, versions)


def _figure(report: dict[str, Any], key: str) -> float | None:
    value = report[key]
    if value is None:
        return math.nan if key in report["nan"] else None
    return float(value)


def _worse_figures(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    found = []
    for name, key in _FIGURES.items():
        if key not in _LIMITS:
            continue
        value, was, limit = _figure(new, key), _figure(old, key), new[_LIMITS[key]]
        within = limit is None or (value is not None and value <= limit)
        same = value is not None and was is not None and (value <= was or math.isnan(was))
        if not within and not same:
            found.append(
                f"the {name} was {shown(was)} and is {shown(value)}; the limit is {limit:.0e}"
            )
    return found


def shown(value: float | None) -> str:
    """A figure of a report, nothing where there is none."""
    return "" if value is None else figure(value)


def _worse_parts(parts: tuple[PartChange, ...]) -> list[str]:
    found = []
    for one in parts:
        fresh = [name for name in one.failed_after if name not in one.failed_before]
        if fresh:
            more = f" and {len(fresh) - 1} more of this kind fail" if len(fresh) > 1 else " fails"
            found.append(f"{fresh[0]}{more} now and did not fail before")
    return found


def _parts(old: dict[str, Any], new: dict[str, Any]) -> tuple[PartChange, ...]:
    sides = [_by_kind(report) for report in (old, new)]
    changes = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        (most, failed), (now, fails) = (side.get(name, (None, ())) for side in sides)
        changes.append(PartChange(name, most, now, failed, fails))
    return tuple(changes)


def _by_kind(report: dict[str, Any]) -> dict[str, tuple[float, tuple[str, ...]]]:
    """Name of a kind of part → the most times its rounding that one is off, and those that fail."""
    kinds: dict[str, tuple[float, tuple[str, ...]]] = {}
    for one in (report["local"] or {"parts": []})["parts"]:
        kind = one["part"] if one["tower"] is None else f"{one['tower']}, {one['part']}"
        name = kind if one["layer"] is None else f"layer {one['layer']}, {kind}"
        most, failed = kinds.get(kind, (0.0, ()))
        kinds[kind] = max(most, _times(one)), failed if one["passed"] else (*failed, name)
    return kinds


def _times(part: dict[str, Any]) -> float:
    if part["error"] is None or part["by_feature"] is None or not part["noise"]:
        return math.inf
    return max(float(part["error"]) / float(part["noise"]), float(part["by_feature"]))


def _sequences(old: dict[str, Any], new: dict[str, Any]) -> tuple[Change, ...]:
    """The largest KL of each sequence; null in a report of one is NaN."""
    sides = [
        {
            str(one["sequence"]): math.nan if one["kl_max"] is None else float(one["kl_max"])
            for one in report["each_sequence"]
        }
        for report in (old, new)
    ]
    names = dict.fromkeys([*sides[0], *sides[1]])
    return tuple(Change(name, sides[0].get(name), sides[1].get(name)) for name in names)


def _unlike(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, ...]:
    found = [
        f"{key.replace('_', ' ')}: {_short(old[key])} before, {_short(new[key])} after"
        for key in _CIRCUMSTANCES
        if old[key] != new[key]
    ]
    originals = [
        {
            (one["file"], one["what"]): one["sha256"]
            for one in report["fingerprints"]
            if one["side"] == "original"
        }
        for report in (old, new)
    ]
    if originals[0] != originals[1]:
        found.append("the original: its files have changed")
    if (old["local"] is None) != (new["local"] is None):
        found.append("the parts of layers: only one of the reports has them")
    return tuple(found)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
