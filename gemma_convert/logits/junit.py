"""A report as JUnit XML: one test suite, and a test case for each sequence.

Schema: the one of Apache Ant's reports (windyroad/JUnit-Schema, JUnit.xsd), which Jenkins, GitLab
and GitHub's viewers read.
"""

from __future__ import annotations

from datetime import datetime
from xml.etree import ElementTree

from gemma_convert.logits.part_check import LocalCheck
from gemma_convert.logits.report import LogitReport
from gemma_convert.logits.report_lines import (
    compared_line,
    local_line,
    native_line,
    not_run_line,
    parts_line,
)
from gemma_convert.logits.scale import figure
from gemma_convert.logits.tokens import CheckedSequence
from gemma_convert.output import printable

SUITE = "gemma-convert.logit-check"


def junit(report: LogitReport, written: datetime) -> str:
    """The XML; a sequence fails where a token of it is beyond the limit, and NaN is."""
    failed = [one for one in report.checked if not _passed(one, report.limit)]
    apart = report.local is not None and not report.local.passed
    suite = ElementTree.Element(
        "testsuite",
        name=SUITE,
        timestamp=f"{written:%Y-%m-%dT%H:%M:%S}",
        hostname="localhost",
        tests=str(len(report.checked) + (report.local is not None)),
        failures=str(len(failed) + apart),
        errors="0",
        skipped="0",
        time=f"{report.seconds:.3f}",
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(report).items():
        ElementTree.SubElement(properties, "property", name=name, value=printable(value))
    share = report.running_seconds / max(1, len(report.checked))
    for one in report.checked:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            name=printable(one.name),
            classname=f"{SUITE}.{report.layout}",
            time=f"{share:.3f}",
        )
        if one in failed:
            message = _message(one, report.limit)
            failure = ElementTree.SubElement(case, "failure", type="KL", message=message)
            failure.text = f"{message}\n{report.verdict}"
    if report.local is not None:
        _part_case(suite, report.local, report.layout)
    lines = [report.verdict] if report.local is not None else [report.verdict, parts_line(report)]
    ElementTree.SubElement(suite, "system-out").text = "\n".join(map(printable, lines))
    ElementTree.SubElement(suite, "system-err").text = "\n".join(map(printable, report.warnings))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=False) + "\n"


def _part_case(suite: ElementTree.Element, local: LocalCheck, layout: str) -> None:
    """Every part by itself as one test case."""
    name, place = "each part by itself", f"{SUITE}.{layout}"
    case = ElementTree.SubElement(suite, "testcase", name=name, classname=place, time="0.000")
    if not local.passed:
        message = local_line(local)
        failure = ElementTree.SubElement(case, "failure", type="part", message=message)
        failure.text = "\n".join(
            f"{part.name}: error {part.error:.1e}, rounding error {part.noise:.1e}"
            + ("" if part.mistake is None else f"; probable cause: {part.mistake}")
            for part in local.failed
        )


def _passed(sequence: CheckedSequence, limit: float) -> bool:
    return sequence.worst is None or sequence.kl_max <= limit


def _message(sequence: CheckedSequence, limit: float) -> str:
    place = sequence.worst or 0
    text = "" if sequence.pieces is None else f", {printable(repr(sequence.pieces[place]))}"
    return (
        f"A KL of {figure(sequence.kl_max)} is beyond the limit of {limit:.0e} at position "
        f"{place} (token id {sequence.ids[place]}{text})"
    )


def _properties(report: LogitReport) -> dict[str, str]:
    drift = report.drift
    return {
        "verdict": report.verdict,
        "proof": str(report.proof).lower(),
        "limit": f"{report.limit:g}",
        "limit_reason": report.limit_reason,
        "kl_max": figure(report.divergence.kl_max),
        "kl_mean": figure(report.divergence.kl_mean),
        "original": report.original,
        "checkpoint": report.checkpoint,
        "reference": f"{report.reference}, float32, {report.reference_device}",
        "native": native_line(report),
        "whole_model": str(report.whole_model).lower(),
        "compared": compared_line(report),
        **({"not_run": not_run_line(report)} if report.towers_not_run else {}),
        **({} if report.noise_floor is None else {"noise_floor": figure(report.noise_floor)}),
        **({} if drift is None else {"first_drift": drift.first or "none"}),
        **{f"version.{name}": value for name, value in report.versions.items()},
    }
