"""The HTML report in a real browser: nothing is asked for, nothing overflows, all can be read."""

from __future__ import annotations

import json
from datetime import datetime

import pytest
import sample_reports
from chromium import Chromium, find_chromium

from gemma_convert.logits.comparison import compare_reports
from gemma_convert.logits.comparison_page import comparison_page
from gemma_convert.logits.html_report import html_report

REPORTS = {
    "passed": sample_reports.report,
    "failed": sample_reports.failed,
    "not a number": sample_reports.not_a_number,
    "indication": sample_reports.indication,
}
WRITTEN = datetime(2026, 1, 2, 3, 4, 5)
A4 = 688
"""CSS pixels between the margins of 14 mm, of 96 an inch."""

TOO_FAINT = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(one => one / 255)
    .map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, at) => sum + one * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = element => {
    for (let one = element; one; one = one.parentElement) {
      const colour = rgba(getComputedStyle(one).backgroundColor);
      if (colour[3]) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  let looked = 0;
  for (const element of document.body.querySelectorAll('*')) {
    const own = [...element.childNodes].some(one => one.nodeType === 3 && one.data.trim());
    if (!own || element.closest('title, .hidden')) continue;
    const style = getComputedStyle(element);
    const colour = element.closest('svg') ? style.fill : style.color;
    const [low, high] = [light(rgba(colour)), light(behind(element))].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    looked += 1;
    if (contrast < 4.5) found.push(`${element.outerHTML.slice(0, 80)}: ${contrast.toFixed(2)}`);
  }
  return [looked, found];
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    chromium = Chromium(executable, tmp_path_factory.mktemp("chromium") / "profile")
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, make in REPORTS.items():
        page = html_report(make(), WRITTEN)
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
        (folder / f"{name}.json").write_text(json.dumps(make().as_json()), encoding="utf-8")
    found = compare_reports(folder / "passed.json", folder / "not a number.json")
    (folder / "compared.html").write_text(comparison_page(found, WRITTEN), encoding="utf-8")
    return folder


@pytest.mark.share(3)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("name", [*REPORTS, "compared"])
def test_page_is_quiet_and_fits(browser, pages, name, width, dark):
    address = (pages / f"{name}.html").as_uri()
    browser.visit(address, width, dark)
    assert browser.requests() == [address]
    assert browser.complaints() == []
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= width
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(21, 23, 26)" if dark else "rgb(251, 250, 246)")
    looked, faint = browser.evaluate(TOO_FAINT)
    assert looked > 80 and faint == []


@pytest.mark.parametrize("name", [*REPORTS, "compared"])
def test_paper_is_white_and_nothing_is_cut_off(browser, pages, name):
    """Also where the screen is dark; colours of tokens are printed, headings are not left alone."""
    browser.visit((pages / f"{name}.html").as_uri(), A4, dark=True, media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == WHITE
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= A4
    _, faint = browser.evaluate(TOO_FAINT)
    assert faint == []
    widest = "Math.max(...[...document.querySelectorAll('svg, table')].map(one => one.scrollWidth))"
    assert browser.evaluate(widest) <= A4
    styles = browser.evaluate(
        "[...document.querySelectorAll('h2, h3')].map(one => getComputedStyle(one).breakAfter)"
    )
    assert set(styles) == {"avoid"}
    rows = "[...document.querySelectorAll('tr, svg')].map(one => getComputedStyle(one).breakInside)"
    assert set(browser.evaluate(rows)) == {"avoid"}
    kept = "[...document.querySelectorAll('*')].map(one => getComputedStyle(one).printColorAdjust)"
    assert set(browser.evaluate(kept)) == {"exact"}


WHITE = "rgb(255, 255, 255)"


@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("name", REPORTS)
def test_verdict_is_seen_without_scrolling(browser, pages, name, width):
    browser.visit((pages / f"{name}.html").as_uri(), width, dark=False, height=640)
    left, top, bottom, text = browser.evaluate(
        "(box => [box.left, box.top, box.bottom, document.getElementById('verdict').textContent])"
        "(document.getElementById('verdict').getBoundingClientRect())"
    )
    assert 0 <= top < bottom <= 640 and text == REPORTS[name]().verdict
    seen = "document.elementFromPoint({}, {}).closest('#verdict') !== null"
    assert browser.evaluate(seen.format(left + 20, (top + bottom) / 2))


def test_what_is_wide_scrolls_in_its_own_box(browser, pages):
    browser.visit((pages / "failed.html").as_uri(), 360, dark=False)
    boxes = browser.evaluate(
        "[...document.querySelectorAll('.scroll')].map(one =>"
        " [one.clientWidth, one.scrollWidth, one.tabIndex, getComputedStyle(one).overflowX])"
    )
    assert any(inside > outside for outside, inside, _, _ in boxes)
    assert all(outside <= 360 and tab == 0 and how == "auto" for outside, _, tab, how in boxes)
    smallest = browser.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')]"
        ".map(one => one.getBoundingClientRect().height))"
    )
    assert smallest >= 10


def test_texts_of_tokens_do_nothing(browser, pages):
    browser.visit((pages / "not a number.html").as_uri(), 1600, dark=False)
    assert browser.evaluate("document.querySelectorAll('script, img, [onerror]').length") == 0
    titles = browser.evaluate("document.querySelectorAll('title').length")
    assert titles == browser.evaluate("document.querySelectorAll('svg title').length") + 1
