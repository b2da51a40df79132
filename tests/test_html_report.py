"""The HTML report and the JUnit XML: what they say is what the report says, whatever is in it."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import sample_reports
from native_checkpoints import edited
from sample_reports import HOSTILE, sequence, with_image

from gemma_convert import logit_check
from gemma_convert.cli.app import main
from gemma_convert.errors import TargetError, UsageError
from gemma_convert.logits.html_plots import drift_plot, kl_plot
from gemma_convert.logits.html_report import html_report
from gemma_convert.logits.html_tokens import MOST_TOKENS, legend, strip
from gemma_convert.logits.junit import junit
from gemma_convert.logits.report import LogitReport
from gemma_convert.logits.report_file import ReportFiles, check_report_file, write_report_file
from gemma_convert.logits.scale import LogRange, figure, log_range

WHEN = datetime(2026, 1, 2, 3, 4, 5)
VOID = {"meta", "link", "br"}
DRAWN = {"path", "circle", "rect"}
SAMPLES = (
    sample_reports.report,
    sample_reports.failed,
    sample_reports.not_a_number,
    sample_reports.indication,
)


class Element:
    """An element of a page, with its attributes, the text in it, and what it holds."""

    def __init__(self, tag, attributes, parent=None):
        self.tag, self.attributes, self.parent = tag, attributes, parent
        self.parts = []

    @property
    def text(self):
        return "".join(one if isinstance(one, str) else one.text for one in self.parts)

    def all(self, tag=None, kind=None):
        found = []
        for one in self.parts:
            if isinstance(one, Element):
                classes = (one.attributes.get("class") or "").split()
                if (tag is None or one.tag == tag) and (kind is None or kind in classes):
                    found.append(one)
                found += one.all(tag, kind)
        return found


class Page(HTMLParser):
    """The tree of a page; every tag must be closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.root = self.at = Element("page", {})
        self.feed(text)
        self.close()
        assert self.at is self.root, f"<{self.at.tag}> is never closed"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), attrs
        one = Element(tag, dict(attrs), self.at)
        self.at.parts.append(one)
        if tag not in VOID:
            self.at = one

    def handle_startendtag(self, tag, attrs):
        assert tag in DRAWN, tag
        self.at.parts.append(Element(tag, dict(attrs), self.at))

    def handle_endtag(self, tag):
        assert tag == self.at.tag, f"</{tag}> in <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.parts.append(data)


def parsed(report):
    text = html_report(report, WHEN)
    text.encode("utf-8")
    return Page(text).root


def sections(page):
    return {one.attributes["aria-labelledby"]: one for one in page.all("section")}


@pytest.mark.parametrize("make", SAMPLES)
def test_page_is_well_formed_and_accessible(make):
    page = parsed(make())
    (html,) = page.all("html")
    assert html.attributes["lang"] == "en"
    meta = {one.attributes.get("name"): one.attributes.get("content") for one in page.all("meta")}
    assert meta["color-scheme"] == "light dark" and "width=device-width" in meta["viewport"]
    assert page.all("head")[0].all("title")[0].text.startswith(make().verdict)
    levels = [int(one.tag[1]) for one in page.all() if re.fullmatch("h[1-6]", one.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [one.attributes["id"] for one in page.all() if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    links = [one.attributes["href"][1:] for one in page.all("a")]
    assert links and set(links) <= set(ids)
    for plot in page.all("svg"):
        assert plot.attributes["role"] == "img" and plot.all("title")[0].text
    for table in page.all("table"):
        assert all(one.attributes.get("scope") for one in table.all("th"))
    assert not page.all("script") and not page.all("img")
    assert not re.search(r'(src|href)="(?!#|data:,)|url\(|@import', html_report(make(), WHEN))


@pytest.mark.parametrize(
    ("make", "badge"),
    [
        (sample_reports.report, "✓ Passed"),
        (sample_reports.failed, "✗ Failed"),
        (sample_reports.not_a_number, "✗ Failed"),
        (sample_reports.indication, "≈ Passed: an indication, not proof"),
    ],
)
def test_verdict_limit_and_worst_token_come_first(make, badge):
    report = make()
    (header,) = parsed(report).all("header")
    assert header.all("h1")[0].text == report.verdict
    assert header.all("p", "badge")[0].text == badge
    lead, worst = header.all("p", "lead")[0].text, report.divergence.worst
    assert figure(worst.kl) in lead and f"{report.limit:.0e} ({report.limit_reason})" in lead
    assert re.search(rf"id {worst.token}\)? at position {worst.position} of ", lead)
    assert [one.text for one in header.all("li")] == list(report.warnings)


def test_figures_settings_versions_and_checksums_are_the_reports():
    report = replace(sample_reports.report(), lossy_rows=("a row: <rounded>",))
    found = sections(parsed(report))
    figures = [one.text for one in found["figures"].all("dd")]
    assert figures == ["3.00e-11", "2.70e-11", figures[2], "98.76%", "94.32%", "1.25e-03", "86"]
    assert figures[2] == figure(report.divergence.kl_mean)
    names = [one.text for one in found["run"].all("dt")]
    settings = dict(zip(names, (one.text for one in found["run"].all("dd")), strict=True))
    assert settings["original"] == "models/gemma & <co>" and settings["converted"] == "out"
    assert settings["native"] == "gemma-jax, float32, cuda: <H200>"
    assert settings["reference"] == "transformers, float32, cpu"
    assert settings["run"].startswith("layer by layer")
    assert settings["limit"] == "1e-05 nats for the worst token: float32, nothing rounded"
    assert settings["rounded"] == "a row: <rounded>" and settings["memory"] == "1.2 GB at most"
    versions, prints = found["run"].all("table")
    cells = [one.text for one in versions.all("td")]
    assert dict(zip(cells[::2], cells[1::2], strict=True)) == report.versions
    assert [one.text for one in prints.all("td")] == [
        "original",
        "config.json",
        "whole file",
        "ab" * 32,
    ]
    whole = sections(parsed(replace(report, whole_model=True)))["run"]
    assert "both models loaded completely" in whole.text


def tokens_of(strip):
    """(level, position, id, KL, text) of each token of a strip."""
    found = []
    for one in strip.all("bdi"):
        title = re.fullmatch(r"position (\d+), id (\d+), KL (\S+)", one.attributes["title"])
        level = int(one.attributes["class"].removeprefix("k"))
        found.append((level, int(title[1]), int(title[2]), title[3], one.text))
    return found


def test_every_token_stands_in_its_strip_with_its_kl():
    report = sample_reports.failed()
    section = sections(parsed(report))["tokens"]
    articles = section.all("article")
    assert [one.all("h3")[0].text for one in articles] == [one.name for one in report.checked]
    for one, article in zip(report.checked, articles, strict=True):
        (text,) = article.all("div", "strip")
        found = tokens_of(text)
        kept = [place for place, kl in enumerate(one.kl) if kl is not None]
        assert [(place, id, kl) for _, place, id, kl, _ in found] == [
            (place, one.ids[place], figure(one.kl[place])) for place in kept
        ]
        assert [text for *_, text in found] == [
            one.pieces[place].replace("\n", "↵") for place in kept
        ]
        soft = [each.text for each in text.all("span", "soft")]
        assert soft == (["image, 9 soft tokens"] if one.medium else [])
        assert len(text.all("br")) == sum(one.pieces[place] == "\n" for place in kept)
    rows = [[cell.text for cell in row.all()] for row in section.all("tbody")[0].all("tr")]
    assert [row[-4:] for row in rows] == [
        [str(len(one.ids)), figure(one.kl_max), str(one.worst), figure(one.kl_mean)]
        for one in report.checked
    ]


@pytest.mark.parametrize(
    ("kl", "level"),
    [
        (0.0, 0),
        (9e-12, 0),
        (2e-11, 1),
        (2e-9, 2),
        (2e-7, 3),
        (2e-6, 4),
        (1e-5, 4),
        (1.01e-5, 5),
        (2e-4, 6),
        (2e-3, 7),
        (2e-2, 8),
        (2e-1, 9),
        (1e300, 9),
        (math.inf, 9),
        (math.nan, 10),
    ],
)
def test_levels_of_kl_and_their_legend(kl, level):
    one = replace(sequence(length=1), kl=(kl,))
    ((found, *_),) = tokens_of(Page(strip(one, 1e-5)).root)
    assert found == level
    items = Page(legend(1e-5)).root.all("li")
    assert [item.all("bdi")[0].attributes["class"] for item in items] == [
        f"k{number}" for number in range(11)
    ]
    ends = [f"up to 1e-0{power}" for power in (9, 7, 6, 5, 4, 3, 2, 1)]
    ends = ["≤ 1e-11", *ends, "> 1e-01", "NaN: a logit was not finite"]
    assert [item.text.removeprefix("token ") for item in items] == ends


def test_a_limit_of_zero_has_levels_too():
    one = replace(sequence(length=3), kl=(0.0, 1e-18, 1e-3))
    assert [level for level, *_ in tokens_of(Page(strip(one, 0.0)).root)] == [0, 5, 9]
    assert len(Page(legend(0.0)).root.all("li")) == 7
    parsed(replace(sample_reports.failed(), limit=0.0))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_shown_and_do_nothing(text):
    one = replace(sequence(length=1), pieces=(text,), name=text or "-")
    candidates = tuple(
        replace(each, text=text) for each in sample_reports.prediction(sequence()).reference
    )
    behind = replace(sample_reports.prediction(one).behind, text=text, sequence=one.name)
    predicted = sample_reports.Prediction(behind, candidates, candidates)
    report = sample_reports.report(
        one, worst=(predicted,), original=text, warnings=(text,), versions={text: text}
    )
    page = parsed(report)
    ((*_, shown),) = tokens_of(page.all("div", "strip")[0])
    assert shown.isprintable() and shown.strip() and "\u202e" not in shown
    if text.isprintable() and text:
        assert shown.removeprefix("◌") == text
    elsewhere = [each.text for each in page.all("td") if each.all("bdi")]
    assert len(elsewhere) == 10 and all(each.startswith(shown) for each in elsewhere)
    inside = html_report(report, WHEN).partition("</style>")[2].replace("\n", "")
    assert inside.isprintable()


def test_signs_of_what_cannot_be_seen():
    from gemma_convert.logits.visible import visible
    from gemma_convert.output import printable

    assert visible("a\n\tb\r") == "a↵⇥b␍" and visible("") == "∅" and visible(" ") == " "
    assert visible("\x1b[0m\u202e\ud800\U000e0001") == "\\u001b[0m\\u202e\\ud800\\U000e0001"
    assert visible("\u0301a") == "◌\u0301a" and visible("é") == "é"
    assert printable("a\nb é") == "a\\u000ab é"


def test_nan_is_shown_and_is_the_worst():
    report = sample_reports.not_a_number()
    page = parsed(report)
    text = sections(page)
    assert [one.text for one in text["figures"].all("dd")][:1] == ["NaN"]
    levels = [level for level, *_ in tokens_of(page.all("div", "strip")[0])]
    assert levels == [3] * 3 + [10] * (len(HOSTILE) - 3)
    assert {one.text for one in text["worst"].all("td", "bar")} == {"NaN"}
    assert "layer 1" in text["drift"].text
    drawn = text["drift"].all("circle", "nan")
    assert [one.text for one in drawn] == ["layer 1: NaN", "layer 2: NaN", "the final norm: NaN"]
    assert "NaN" in [one.text for one in text["drift"].all("text")]
    assert report.checked[0].worst == 3 and math.isnan(report.checked[0].kl_mean)


def test_predictions_stand_side_by_side():
    report = sample_reports.failed()
    articles = sections(parsed(report))["worst"].all("article")
    assert len(articles) == 3
    first = articles[0]
    assert first.all("h3")[0].text == "1. english, position 7" and "3.00e-03" in first.text
    assert first.all("p", "context")[0].text == "<bos>The lighthouse kept,↵    "
    assert first.all("mark")[0].text == "    "
    heads = [one.text for one in first.all("thead")[0].all("th")]
    assert "original, transformers" in heads and "converted, gemma-jax" in heads
    rows = [[cell.text for cell in row.all("td")] for row in first.all("tbody")[0].all("tr")]
    assert rows[0] == ["ships 7", "50.00%", "≠", " <b> 8", "11.25%"]
    assert rows[1][2] == "≠" and rows[2] == ["↵ 9", "3.12%", "the same=", "↵ 9", "2.81%"]
    assert [row.attributes.get("class") for row in first.all("tr")[2:]] == ["differs"] * 2 + [
        None
    ] * 3
    assert rows[4] == ["∅ 11", "0.20%", "the same=", "∅ 11", "0.18%"]


def test_tokens_that_look_alike_are_told_apart_by_their_ids():
    one = sample_reports.prediction(sequence())
    other = tuple(replace(each, token=each.token + 50) for each in one.native)
    page = parsed(sample_reports.report(worst=(replace(one, native=other),)))
    assert [each.text for each in page.all("td", "sign")] == ["≠"] * 5


def points(plot, kind):
    """(x, y, title) of each dot of a plot."""
    return [
        (float(one.attributes["cx"]), float(one.attributes["cy"]), one.text)
        for one in Page(plot).root.all("circle", kind)
    ]


def test_plot_has_each_token_at_its_place_on_a_logarithmic_scale():
    one = replace(sequence(length=5), kl=(1e-8, 1e-6, None, 1e-4, math.nan), medium="sound")
    span = log_range(one.compared, 1e-5)
    assert span == LogRange(-8, -4)
    plot = kl_plot(one, span, 1e-5)
    within, beyond, nan = (points(plot, kind) for kind in ("within", "beyond", "nan"))
    assert [title for *_, title in within] == ["position 0: 1.00e-08", "position 1: 1.00e-06"]
    assert [title for *_, title in beyond] == ["position 3: 1.00e-04"]
    assert [title for *_, title in nan] == ["position 4: NaN"]
    (x0, low, _), (x1, middle, _), (x3, high, _) = *within, *beyond
    assert low - middle == pytest.approx(middle - high, abs=0.2) and low > middle
    assert x3 - x0 == pytest.approx(3 * (x1 - x0), abs=0.3) and nan[0][1] < high
    root = Page(plot).root
    left, right = re.fullmatch(
        r"M(\d+) [\d.]+H(\d+)", root.all("path", "grid")[0].attributes["d"]
    ).groups()
    assert x0 - float(left) == pytest.approx(float(right) - nan[0][0], abs=0.2)
    limit = float(root.all("path", "limit")[0].attributes["d"].split()[1].partition("H")[0])
    assert low - limit == pytest.approx(0.75 * (low - high), abs=0.2)
    texts = [text.text for text in root.all("text")]
    assert {"limit 1e-05", "1e-8", "1e-4", "position", "KL, nats", "sound"} <= set(texts)
    assert "position 4" in root.all("svg")[0].attributes["aria-label"]


def test_drift_plot_names_the_first_layer_beyond():
    drift = sample_reports.failed().drift
    plot = Page(drift_plot(drift)).root
    assert [one.text for one in plot.all("text", "mark-name")] == ["layer 2"]
    assert [one[2] for one in points(drift_plot(drift), "beyond")] == [
        "layer 2: 5.00e-02",
        "layer 3: 8.00e-02",
        "the final norm: 9.00e-02",
    ]
    assert len(plot.all("circle", "mark")) == 1
    exact = drift_plot(replace(drift, layers=(2e-3,), final_norm=0.0))
    assert len(points(exact, "within")) == 3 and not points(exact, "beyond")
    x = {one[2].partition(":")[0]: one[0] for one in points(drift_plot(drift), None)}
    assert float(plot.all("circle", "mark")[0].attributes["cx"]) == x["layer 2"]
    names = {one.text: float(one.attributes["x"]) for one in plot.all("text")}
    assert (names["in"], names["0"], names["3"]) == (x["the embedding"], x["layer 0"], x["layer 3"])
    assert names["norm"] == x["the final norm"] and "tolerance 2e-03" in names
    loose = Page(drift_plot(replace(drift, tolerance=None))).root
    assert not loose.all("path", "limit") and not loose.all("circle", "beyond")


def test_without_layers_there_is_no_plot_of_drift():
    report = replace(sample_reports.report(), drift=None)
    assert "drift" not in sections(parsed(report))
    flat = replace(report.drift or sample_reports.report().drift, embedding=0.0, layers=())
    assert "drift" in sections(parsed(replace(report, drift=replace(flat, final_norm=0.0))))


def test_tokens_that_were_not_kept_are_no_error():
    assert "tokens" not in sections(parsed(sample_reports.report().without_tokens()))


def test_five_thousand_tokens_stay_small():
    one = sequence(length=5000)
    text = html_report(sample_reports.report(one), WHEN)
    assert len(text.encode()) < 1_500_000
    (article,) = sections(Page(text).root)["tokens"].all("article")
    assert len(tokens_of(article.all("div", "strip")[0])) == 5000
    dots = article.all("svg")[0].all("circle")
    assert len(dots) == 600 and len(article.all("p", "note")) == 0
    texts = [dot.text for dot in dots]
    assert texts[0] == f"position 0: {figure(one.kl_max)}"
    assert texts[599] == f"position 4991: {figure(max(one.kl[4991:]))}"


def test_longer_sequences_show_what_is_around_the_worst_token():
    long = sequence(length=MOST_TOKENS + 4000)
    kl = list(long.kl)
    kl[6000] = 1e-3
    (text,) = Page(strip(replace(long, kl=tuple(kl)), 1e-5)).root.all("div", "strip")
    places = [place for _, place, *_ in tokens_of(text)]
    assert places == list(range(3500, 8500))
    note = Page(strip(replace(long, kl=tuple(kl)), 1e-5)).root.all("p", "note")[0].text
    assert note.startswith("Tokens 3500 to 8499 of 9000")
    for worst, first in ((0, 0), (8999, 4000)):
        kl = [1e-3 if place == worst else 1e-9 for place in range(len(long.kl))]
        (text,) = Page(strip(replace(long, kl=tuple(kl)), 1e-5)).root.all("div", "strip")
        places = [place for _, place, *_ in tokens_of(text)]
        assert (places[0], len(places)) == (first, MOST_TOKENS)


def test_ids_stand_in_for_texts():
    page = parsed(sample_reports.indication())
    assert [text for *_, text in tokens_of(page.all("div", "strip")[0])][:2] == ["100", "101"]
    assert not page.all("p", "context")


@pytest.mark.parametrize("make", SAMPLES)
def test_junit_keeps_to_its_schema(make):
    """Elements, their order, and attributes, as JUnit.xsd has them."""
    report = make()
    suite = ElementTree.fromstring(junit(report, WHEN))
    assert suite.tag == "testsuite" and set(suite.attrib) == {
        *("name", "timestamp", "hostname", "tests", "failures", "errors", "skipped", "time")
    }
    assert suite.get("timestamp") == "2026-01-02T03:04:05" and suite.get("time") == "12.500"
    cases = suite.findall("testcase")
    tags = [one.tag for one in suite]
    assert tags == ["properties", *["testcase"] * len(cases), "system-out", "system-err"]
    assert all(set(one.attrib) == {"name", "value"} for one in suite[0])
    assert len({one.get("name") for one in suite[0]}) == len(suite[0])
    assert int(suite.get("tests")) == len(cases) == len(report.checked) + 1
    assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))
    for case in cases:
        assert set(case.attrib) == {"name", "classname", "time"} and float(case.get("time")) >= 0
        assert [set(one.attrib) for one in case] in ([], [{"type", "message"}])
    assert suite.find("system-out").text == report.verdict


def test_junit_fails_the_sequences_that_failed():
    suite = ElementTree.fromstring(junit(sample_reports.failed(), WHEN))
    found = {one.get("name"): one.find("failure") for one in suite.findall("testcase")}
    assert [name for name, failure in found.items() if failure is None] == ["code"]
    assert (
        found["each part by itself"].get("message").startswith("layer 1, dense MLP: error 5.0e-02")
    )
    assert found["english"].get("message") == (
        "A KL of 3.00e-03 is beyond the limit of 1e-05 at position 7 (token id 107, '    ')"
    )
    assert "not the same model" in found["english"].text
    assert suite.get("failures") == "3" and suite.find("system-err").text.startswith("No sequence")
    properties = {one.get("name"): one.get("value") for one in suite[0]}
    assert properties["first_drift"] == "layer 2" and properties["version.jax"] == "0.9.1"
    assert properties["limit"] == "1e-05" and properties["original"] == "models/gemma & <co>"


def test_junit_of_hostile_texts_is_xml():
    suite = ElementTree.fromstring(junit(sample_reports.not_a_number(), WHEN))
    case = suite.find("testcase")
    assert case.get("name") == "hostile </title><script>"
    assert "KL of NaN" in case.find("failure").get("message")
    for text in HOSTILE:
        one = replace(sequence(text or "-", 1, scale=1), pieces=(text,))
        suite = ElementTree.fromstring(junit(sample_reports.report(one, original=text), WHEN))
        assert suite.find("testcase/failure").get("message").isprintable()


def test_a_report_with_tokens_comes_back_from_its_text():
    for make in (sample_reports.report, sample_reports.failed, sample_reports.indication):
        report = make()
        assert LogitReport.from_text(report.as_text()) == report
        bare = LogitReport.from_text(report.without_tokens().as_text())
        assert bare == report.without_tokens() and bare.checked == bare.worst == ()


def test_json_sums_up_each_sequence_and_the_worst_tokens():
    found = json.loads(json.dumps(sample_reports.failed().as_json(), allow_nan=False))
    assert found["schema"] == "gemma-convert/logit-check/3" and found["sequences"] == 3
    last = found["each_sequence"][2]
    assert (last["sequence"], last["tokens"], last["compared"]) == ("image-0 (cat.png)", 30, 21)
    assert last["worst_position"] == 7 and last["kl_max"] == pytest.approx(3e-5)
    first = found["worst_tokens"][0]
    assert (first["sequence"], first["position"], first["token"]) == ("english", 7, 107)
    assert first["reference"][0] == {"token": 7, "text": "ships", "probability": 0.5}
    assert [one["token"] for one in first["native"]] == [8, 7, 9, 10, 11]
    assert found["fingerprints"][0]["sha256"] == "ab" * 32 and found["checkpoint"] == "out"
    found = json.loads(json.dumps(sample_reports.not_a_number().as_json(), allow_nan=False))
    assert found["each_sequence"][0]["kl_max"] is None
    assert found["worst_tokens"][0]["reference"][0]["probability"] is None


def test_files_are_checked_before_and_appear_at_once(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    check_report_file(path, overwrite=False)
    assert list(tmp_path.iterdir()) == []
    write_report_file(path, "é\n", overwrite=False)
    assert path.read_bytes() == "é\n".encode()
    with pytest.raises(TargetError, match="exists already") as caught:
        check_report_file(path, overwrite=False)
    assert caught.value.do == "add --overwrite"
    with pytest.raises(TargetError, match="exists already"):
        write_report_file(path, "new", overwrite=False)
    with pytest.raises(TargetError, match="not a report"):
        write_report_file(path, "new", overwrite=True)
    for make in (html_report, junit):
        report = make(sample_reports.report(), WHEN)
        path.write_text(report)
        (tmp_path / "same").hardlink_to(path)
        write_report_file(path, "new", overwrite=True)
        assert path.read_text() == "new" and (tmp_path / "same").read_text() == report
        (tmp_path / "same").unlink()
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(path)
    for name in ("folder", "link"):
        with pytest.raises(TargetError, match="not a file"):
            check_report_file(tmp_path / name, overwrite=True)
    with pytest.raises(TargetError, match="does not exist"):
        check_report_file(tmp_path / "none" / "report.html", overwrite=True)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "report.html"
    old = junit(sample_reports.report(), WHEN)
    path.write_text(old)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TargetError, match="No space left"):
        write_report_file(path, "new", overwrite=True)
    assert path.read_text() == old and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: full(0))
    with pytest.raises(TargetError, match="cannot be written"):
        check_report_file(tmp_path / "other.html", overwrite=False)


def test_one_file_for_both_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="the same file"):
        ReportFiles(html=tmp_path / "a", junit=tmp_path.joinpath("a").relative_to(tmp_path)).check()
    ReportFiles().check()


@pytest.fixture
def command(monkeypatch, capsys):
    """command(report, *options): exit code, stdout, stderr and calls of a check that found that."""

    def run(report, *options):
        calls = []

        def check(hf, native, **given):
            calls.append(given)
            return report

        monkeypatch.setattr("gemma_convert.logits.check.logit_check", check)
        words = ["gemma-convert", "logit-check", "hf", "out", *map(str, options)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err, calls

    return run


def test_both_files_are_written_whether_it_passes_or_not(command, tmp_path):
    page, xml = tmp_path / "a.html", tmp_path / "a.xml"
    for make, code in ((sample_reports.report, 0), (sample_reports.failed, 1)):
        options = ("--report", page, "--junit", xml, "--overwrite")
        found, out, err, _ = command(make(), *options)
        assert found == code and out.startswith(make().verdict) and err == ""
        assert Page(page.read_text(encoding="utf-8")).root.all("h1")[0].text == make().verdict
        assert ElementTree.parse(xml).getroot().find("system-out").text == make().verdict
        found, out, _, _ = command(make(), *options, "--json")
        assert found == code and json.loads(out)["verdict"] == make().verdict
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.html", "a.xml"]


def test_a_file_that_cannot_be_written_is_refused_before_the_check(command, tmp_path):
    (tmp_path / "there").write_text("mine")
    for option in ("--report", "--junit"):
        for name in ("there", "no/file"):
            code, out, err, calls = command(sample_reports.report(), option, tmp_path / name)
            assert (code, out, calls) == (4, "", []) and "report" in err
    code, _, err, calls = command(
        sample_reports.report(), "--report", tmp_path / "a", "--junit", tmp_path / "a"
    )
    assert (code, calls) == (2, []) and "the same file" in err
    assert (tmp_path / "there").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_of_several_processes_one_writes(command, tmp_path, monkeypatch):
    monkeypatch.setattr("gemma_convert.engine.joined.is_leader", lambda: False)
    (tmp_path / "there").write_text("mine")
    options = ("--report", tmp_path / "there", "--junit", tmp_path / "new")
    code, out, _, calls = command(sample_reports.failed().without_tokens(), *options)
    assert (code, out, len(calls)) == (1, "", 1)
    assert [one.name for one in tmp_path.iterdir()] == ["there"]


def test_a_real_check_from_end_to_end(tiny, converted, tmp_path, monkeypatch, capsys):
    source = tiny("31b", layers=6)
    wrong = {"decoder.3.output_scale/weights": lambda value: value * 1.5}
    native = edited(converted(source, "fast-llm"), tmp_path / "broken", wrong)
    page, xml = tmp_path / "a.html", tmp_path / "a.xml"
    words = ["logit-check", source, native, "--prompt", "a <b>\n🙂", "--report", page]
    monkeypatch.setattr(sys, "argv", ["gemma-convert", *map(str, words), "--junit", str(xml)])
    reports, told = [], []
    monkeypatch.setattr("gemma_convert.logits.check.publish", told.append)

    def noted(*arguments, **options):
        reports.append(logit_check(*arguments, **options))
        return reports[-1]

    monkeypatch.setattr("gemma_convert.logits.check.logit_check", noted)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1 and "not the same model" in capsys.readouterr().out
    (report,) = reports
    assert (report.original, report.checkpoint) == (str(source), str(native))
    assert [LogitReport.from_text(text) for text in told] == [report.without_tokens()]
    root = Page(page.read_text(encoding="utf-8")).root
    assert "layer 3" in sections(root)["drift"].text
    for one, text in zip(report.checked, root.all("div", "strip"), strict=True):
        found = tokens_of(text)
        assert [id for _, _, id, *_ in found] == list(one.ids)
        assert [kl for _, _, _, kl, _ in found] == [figure(kl) for kl in one.kl]
    first = report.worst[0]
    assert first.behind == report.divergence.worst
    assert sections(root)["worst"].all("h3")[0].text == (
        f"1. {first.behind.sequence}, position {first.behind.position}"
    )
    assert len(ElementTree.parse(xml).getroot().findall("testcase/failure")) == 3
    assert "Layer 3, output: error" in sections(root)["parts"].text
    kinds = {(one.side, one.what) for one in report.fingerprints}
    assert {("original", "samples"), ("native", "header"), ("native", "mapping table")} <= kinds


def test_image_tokens_are_one_run_between_texts():
    (text,) = Page(strip(with_image(), 1e-5)).root.all("div", "strip")
    parts = [one.tag for one in text.parts if isinstance(one, Element) and one.tag != "br"]
    assert parts == ["bdi"] * 10 + ["span"] + ["bdi"] * 11
