"""Two reports beside each other: what is worse, what is only different, and what is no report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import sample_reports
from commands import said

from gemma_convert import compare_reports
from gemma_convert.errors import SourceError
from gemma_convert.logits.comparison_page import comparison_page
from gemma_convert.logits.drift import Drift
from gemma_convert.logits.report import LogitReport

WRITTEN = datetime(2026, 1, 2, 3, 4)


@pytest.fixture
def compared(tmp_path):
    """compared(before, after): the comparison of two reports."""

    def compare(before: LogitReport, after: LogitReport):
        return compare_reports(saved(before, tmp_path / "old"), saved(after, tmp_path / "new"))

    return compare


def saved(report: LogitReport, path: Path) -> Path:
    path.write_text(json.dumps(report.as_json()), encoding="utf-8")
    return path


def quiet(scale: float) -> LogitReport:
    """A report whose largest KL is three times this, all parts right."""
    return sample_reports.report(sample_reports.sequence(scale=scale))


def test_alike(compared):
    found = compared(sample_reports.report(), sample_reports.report())
    assert (found.passed, found.verdict, found.worse, found.unlike) == (True, "not worse", (), ())
    assert all(one.before == one.after for one in (*found.figures, *found.sequences))
    assert [one.name for one in found.sequences] == ["english", "code", "image-0 (cat.png)"]


def test_worse_within_the_limit_is_shown_and_passes(compared):
    found = compared(quiet(1e-11), quiet(1e-6))
    figures = {one.name: (one.before, one.after) for one in found.figures}
    assert figures["largest KL"] == (3e-11, 3e-6)
    assert figures["99th percentile of the KL"] == pytest.approx((2.7e-11, 2.7e-6))
    assert figures["top-1 agreement"] == (0.9876, 0.9876)
    assert figures["drift before the output head"] == (9e-7, 9e-7)
    assert found.passed


def test_beyond_the_limit_is_worse_with_what_is_beyond(compared):
    found = compared(sample_reports.report(), sample_reports.failed())
    assert not found.passed and found.verdict == "worse than before"
    assert found.worse == (
        "the largest KL was 3.00e-11 and is 3.00e-03; the limit is 1e-05",
        "the 99th percentile of the KL was 2.70e-11 and is 2.70e-03; the limit is 1e-05",
        "layer 1, dense MLP fails now and did not fail before",
    )
    (part,) = (one for one in found.parts if one.name == "dense MLP")
    assert part.before == pytest.approx(2e-7 / 1.5e-7)
    assert part.after == pytest.approx(5e-2 / 1.5e-7)
    assert (part.failed_before, part.failed_after) == ((), ("layer 1, dense MLP",))
    tower = next(one for one in found.parts if one.name == "vision, keys")
    assert tower.before == tower.after == pytest.approx(1 / 1.5)


def test_what_failed_before_may_fail_no_worse(compared):
    failing = sample_reports.failed()
    assert compared(failing, failing).verdict == "not worse"
    assert compared(failing, sample_reports.report()).verdict == "better than before"
    further = replace(failing, divergence=replace(failing.divergence, kl_max=4e-3))
    assert compared(failing, further).worse == (
        "the largest KL was 3.00e-03 and is 4.00e-03; the limit is 1e-05",
    )
    assert compared(further, failing).passed


def test_a_part_that_fails_anew_is_worse_beside_one_that_failed(compared):
    failing = sample_reports.failed()
    parts = list(failing.local.parts)
    parts[3] = replace(parts[3], error=1.0)  # layer 0, keys
    parts[5] = replace(parts[5], error=1.0)  # layer 1, keys
    other = replace(failing, local=replace(failing.local, parts=tuple(parts)))
    assert compared(failing, other).worse == (
        "layer 0, keys and 1 more of this kind fail now and did not fail before",
    )


def test_no_number_is_worse_than_any(compared):
    found = compared(sample_reports.failed(), sample_reports.not_a_number())
    assert "the largest KL was 3.00e-03 and is NaN; the limit is 1e-05" in found.worse
    figures = {one.name: one.after for one in found.figures}
    assert math.isnan(figures["largest KL"])
    values = json.dumps(found.as_json(), allow_nan=False)
    assert json.loads(values)["figures"][0] == {
        "name": "largest KL",
        "before": 3e-3,
        "after": None,
    }
    again = compared(sample_reports.not_a_number(), sample_reports.not_a_number())
    assert again.passed


def test_what_is_not_alike_is_said(compared):
    other = sample_reports.report(
        sample_reports.sequence(),
        dtype="bfloat16",
        limit=0.03125,
        local=None,
        drift=None,
        noise_floor=None,
        fingerprints=(),
    )
    found = compared(sample_reports.report(), other)
    assert found.passed
    assert found.unlike == (
        "dtype: float32 before, bfloat16 after",
        "limit: 1e-05 before, 0.0312 after",
        "tokens: 86 before, 40 after",
        "sequences: 3 before, 1 after",
        "the original: its files have changed",
        "the parts of layers: only one of the reports has them",
    )
    figures = {one.name: one.after for one in found.figures}
    assert figures["noise floor"] is figures["drift before the output head"] is None
    assert all(one.after is None for one in found.parts)
    assert [one.after for one in found.sequences][1:] == [None, None]


TABLE = """\
worse than before
✗ the largest KL was 3.00e-11 and is 3.00e-03; the limit is 1e-05
✗ the 99th percentile of the KL was 2.70e-11 and is 2.70e-03; the limit is 1e-05
before  {old}: same model
after   {new}: not the same model

                                  before       after     change
largest KL                      3.00e-11    3.00e-03    × 1e+08
99th percentile of the KL       2.70e-11    2.70e-03    × 1e+08
mean KL                         1.16e-11    1.16e-03    × 1e+08
top-1 agreement                   98.76%      98.76%
top-10 agreement                  94.32%      94.32%
largest logit difference        1.25e-03    1.25e-03
noise floor                     3.00e-09    3.00e-09
drift before the output head    9.00e-07    1.80e-06        × 2

each part, error / rounding    before    after    change
vision, patch embedding         0.7 ×    0.7 ×
vision, keys                    0.7 ×    0.7 ×
embedding                       0.0 ×    0.0 ×
keys                            1.3 ×    1.3 ×
dense MLP                       1.3 ×    1.3 ×
final norm                      1.3 ×    1.3 ×
head                            0.7 ×    0.7 ×

largest KL of      before       after     change
english          3.00e-11    3.00e-03    × 1e+08
"""


def test_the_command(tmp_path, monkeypatch):
    old = saved(quiet(1e-11), tmp_path / "old")
    drifted = replace(quiet(1e-3), drift=Drift(1e-7, (2e-7,), 1.8e-6, 2e-3))
    new = saved(drifted, tmp_path / "new")
    monkeypatch.setenv("COLUMNS", "200")
    code, printed, errors = said("compare-reports", old, new)
    lines = [line.rstrip() for line in printed.splitlines()]
    assert (code, errors) == (1, "")
    assert lines == TABLE.format(old=old, new=new).splitlines()
    code, printed, errors = said("compare-reports", new, new, "--json")
    assert (code, errors) == (0, "")
    assert json.loads(printed)["after"]["path"] == str(new)


def test_the_page_is_written_like_a_report(tmp_path):
    old, new = saved(quiet(1e-11), tmp_path / "old"), saved(quiet(1e-3), tmp_path / "new")
    page = tmp_path / "page.html"
    words = ("compare-reports", old, new, "--report", page)
    assert said(*words)[0] == 1
    first = page.read_text(encoding="utf-8")
    assert first.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert "<title>worse than before: two reports compared, logit-check</title>" in first
    assert said(*words)[0] == 4 and said(*words, "--overwrite")[0] == 1
    page.write_text("mine")
    assert said(*words, "--overwrite")[0] == 4 and page.read_text() == "mine"


def test_texts_of_a_report_do_nothing_in_the_page(compared):
    hostile = sample_reports.report(
        sample_reports.sequence("<img src=x onerror=alert(1)>"),
        checkpoint="</script><b>\x1b[2J",
        versions={"<i>": "&amp;"},
    )
    page = comparison_page(compared(hostile, hostile), WRITTEN)
    for text in ("<img", "<b>", "<i>", "\x1b", "<script"):
        assert text not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page and "&amp;amp;" in page
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "There is no such report"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no report that logit-check --json has printed"),
        ('{"schema": "gemma-convert/verify/2"}', "no report that logit-check --json"),
    ],
)
def test_what_is_no_report_is_three(text, message, tmp_path):
    good, bad = saved(sample_reports.report(), tmp_path / "good"), tmp_path / "bad"
    if text is not None:
        bad.write_text(text)
    for words in ((good, bad), (bad, good)):
        code, printed, errors = said("compare-reports", *words)
        assert (code, printed) == (3, "") and errors.startswith("error: ")
        assert message in errors and str(bad) in errors


USED = sorted(
    {
        "passed",
        "verdict",
        "limit",
        "limit_p99",
        "kl_max",
        "local",
        "noise_floor",
        "final_norm_drift",
        "each_sequence",
        "fingerprints",
        "versions",
        "checkpoint",
        "dtype",
    }
)


@pytest.mark.parametrize("key", USED)
def test_a_report_that_was_changed_is_refused(key, tmp_path):
    good = saved(sample_reports.report(), tmp_path / "good")
    values = sample_reports.report().as_json()
    values.pop(key)
    (tmp_path / "bad").write_text(json.dumps(values))
    with pytest.raises(SourceError, match="changed") as caught:
        compare_reports(good, tmp_path / "bad")
    assert key in caught.value.found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("local", {"parts": [1]}),
        ("local", 7),
        ("each_sequence", [{"sequence": "a", "kl_max": "b"}]),
        ("versions", []),
        ("kl_max", []),
        ("kl_max", 10**400),
        ("limit", "1e-5"),
        ("fingerprints", {"a": 1}),
    ],
)
def test_values_of_another_kind_are_refused(key, value, tmp_path):
    good = saved(sample_reports.report(), tmp_path / "good")
    values = sample_reports.report().as_json() | {key: value}
    (tmp_path / "bad").write_text(json.dumps(values))
    with pytest.raises(SourceError, match="changed"):
        compare_reports(good, tmp_path / "bad")
