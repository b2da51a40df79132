"""What reports are made of: tokens by how bad they are, scales, lines of blocks, fingerprints."""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
import sample_reports
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sample_reports import sequence, with_image

from gemma_convert.logits.divergence import Likeliest, TokenDivergence
from gemma_convert.logits.fingerprint import Fingerprint, fingerprints
from gemma_convert.logits.golden import weight_files
from gemma_convert.logits.html_report import html_report
from gemma_convert.logits.junit import junit
from gemma_convert.logits.report_table import render
from gemma_convert.logits.scale import LogRange, figure, largest_of_bins, log_range
from gemma_convert.logits.sparkline import Sparkline
from gemma_convert.logits.tokens import checked_sequences, worst_first, worst_predictions
from gemma_convert.prompts.images import ImageSequence
from gemma_convert.prompts.text import TokenSequence

NAN, INF = math.nan, math.inf


def test_nan_is_the_worst_and_the_first_of_equals_comes_first():
    assert worst_first([0.0, 3.0, NAN, INF, 3.0, NAN]) == [2, 5, 3, 1, 4, 0]
    assert worst_first([]) == []


def divergence(kl):
    """Figures whose likeliest tokens tell their row: row r has ids from 10 r, and 0.5^(r + 1)."""
    ids = 10 * np.arange(len(kl))[:, None] + np.arange(7)
    side = Likeliest(ids, 0.5 ** (np.arange(1, 8) + np.arange(len(kl))[:, None]))
    other = Likeliest(ids + 1000, side.probabilities / 2)
    plain = np.zeros((len(kl), 1))
    return TokenDivergence(np.array(kl), plain[:, 0], plain, plain, side, other)


IMAGE = ImageSequence(
    "image-0",
    (1, 9, 9, 2),
    ("a", "<i>", "<i>", "b"),
    places=np.array([0, 1, 1, 0]),
    pixels=np.zeros((1, 3), np.float32),
    positions=np.zeros((1, 2), np.int64),
)


def test_kl_stands_where_its_token_stands():
    found = divergence([1.0, 2.0, 3.0, 4.0, 5.0])
    text, image = checked_sequences([TokenSequence("t", (5, 6, 7)), IMAGE], found)
    assert (text.kl, text.medium, text.pieces) == ((1.0, 2.0, 3.0), None, None)
    assert (image.kl, image.medium) == ((4.0, None, None, 5.0), "image")
    assert (image.worst, image.kl_max, image.kl_mean, image.compared) == (3, 5.0, 4.5, [4.0, 5.0])
    nothing = replace(image, kl=(None,) * 4)
    assert nothing.worst is None and math.isnan(nothing.kl_max) and math.isnan(nothing.kl_mean)


def test_predictions_behind_the_worst_tokens():
    kl = [1.0, 5.0, NAN, 2.0, 6.0]
    checked = checked_sequences([TokenSequence("t", (5, 6, 7)), IMAGE], divergence(kl))
    asked = []

    def decode(ids):
        asked.extend(ids)
        return {id: f"<{id}>" for id in ids if id < 1000}

    found = worst_predictions(checked, divergence(kl), decode)
    places = [(one.behind.sequence, one.behind.position, one.behind.token) for one in found]
    assert places == [("t", 2, 7), ("image-0", 3, 2), ("t", 1, 6), ("image-0", 0, 1), ("t", 0, 5)]
    assert [one.behind.text for one in found] == [None, "b", None, "a", None]
    second = found[1]
    assert [one.token for one in second.reference] == [40, 41, 42, 43, 44]
    assert [one.token for one in second.native] == [1040, 1041, 1042, 1043, 1044]
    assert second.reference[2].text == "<42>" and second.native[2].text is None
    assert second.reference[1].probability == 0.5**6 and second.native[1].probability == 0.5**7
    assert asked == sorted(set(asked)) and len(asked) == 50


def test_the_same_text_is_shown_once():
    same = [TokenSequence("a", (5, 6, 7)), TokenSequence("b", (5, 6, 8))]
    kl = [1.0, 3.0, 2.0, 1.0, 3.0, 2.5]
    checked = checked_sequences(same, divergence(kl))
    found = worst_predictions(checked, divergence(kl), lambda ids: {})
    places = [(one.behind.sequence, one.behind.position) for one in found]
    assert places == [("a", 1), ("b", 2), ("a", 2), ("a", 0)]


@given(
    st.lists(st.none() | st.floats(0, 10) | st.just(NAN), max_size=60),
    st.integers(1, 70),
)
def test_bins_keep_the_largest_and_lose_nothing(values, bins):
    found = largest_of_bins(values, bins)
    assert len(found) == min(bins, len(values))
    kept = [one for one in values if one is not None]
    shown = [one for one in found if one is not None]
    assert bool(kept) == bool(shown)
    assert any(map(math.isnan, kept)) == any(map(math.isnan, shown))
    if kept and not any(map(math.isnan, kept)):
        assert max(kept) == max(shown)
    if len(values) <= bins:
        assert repr(found) == repr(values)


def test_bins_are_runs_in_order():
    assert largest_of_bins([1, 5, 2, None, None, 3, NAN, 9], 4) == [
        5,
        2,
        3,
        pytest.approx(NAN, nan_ok=True),
    ]
    assert largest_of_bins([None, None, 1.0], 2) == [None, 1.0] and largest_of_bins([], 3) == []


def test_ranges_hold_all_numbers_and_a_near_limit():
    assert log_range([2e-12, 0.0, NAN, 3e-9, INF], None) == LogRange(-12, -8)
    assert log_range([2e-12], 1e-5) == LogRange(-12, -5)
    assert log_range([2e-3], 1e-5) == LogRange(-5, -2)
    assert log_range([1e-3], 1e30) == LogRange(-3, -2)
    assert log_range([], 1e-5) == LogRange(-6, -5) and log_range([NAN], None).low < 1
    assert log_range([0.0], 0.0) == LogRange(0, 1) and log_range([1e-300], None).low == -18
    span = LogRange(-8, -4)
    assert [span.place(one) for one in (0.0, 1e-9, 1e-8, 1e-4, 1.0)] == [0, 0, 0, 1, 1]
    assert span.place(1e-6) == pytest.approx(0.5)


def test_figures():
    assert [figure(one) for one in (NAN, 0.0, 1.234e-7, INF)] == ["NaN", "0", "1.23e-07", "inf"]


def line(values, width=80, limit=1e-5, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(Sparkline(values, LogRange(-8, 0), limit))
    return console.file.getvalue().rstrip("\n")


def test_a_line_of_blocks():
    values = [10.0**n for n in range(-8, 1)]
    assert line(values) == "▁▂▃▄▅▆▇██"
    assert line([1e-8, None, NAN, 1.0]) == "▁ !█"
    assert line([1e-8] * 300 + [1.0] + [1e-8] * 300, width=40).count("█") == 1
    assert len(line([1e-3] * 600, width=40)) == 40
    coloured = line([1e-6, 1e-5, 1e-4, NAN], force_terminal=True, color_system="standard")
    assert coloured.count("\x1b[32m") == 2 and coloured.count("\x1b[1;31m") == 2
    assert "\x1b[1;31m" not in line([1e9], limit=None, force_terminal=True)


def test_a_line_without_blocks_where_the_terminal_has_none():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=file, width=40).print(Sparkline([1e-8, 1e-4, 1.0, NAN], LogRange(-8, 0), None))
    file.flush()
    assert file.buffer.getvalue() == b"_+#!\n"


def shown(report, width):
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(render(report))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 100, 200])
def test_terminal_has_a_line_for_each_sequence_and_one_for_the_layers(width):
    report = sample_reports.failed()
    lines = shown(report, width)
    assert lines[0].strip() == "not the same model" and max(map(len, lines)) <= width
    found = {one.split("  ")[0]: one for one in lines}
    assert "KL max" in found and "by position, from 1e-8 to 1e-2" in "\n".join(lines)
    for one in report.checked:
        assert figure(one.kl_max) in found[one.name]
        marks = [sign for sign in found[one.name] if sign in "▁▂▃▄▅▆▇█"]
        room = width - 40
        assert len(marks) == len(one.compared) or len(marks) > room / 2
    assert "9.00e-02" in found["drift by layer"] and "▁" in found["drift by layer"]
    assert "first beyond 2e-03 is layer 2" in " ".join("\n".join(lines).split())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"processes": 2}, "on several processes"),
        ({}, "between two Hugging Face checkpoints"),
        ({"drift": None}, "with golden logits"),
        ({"drift": None, "whole_model": True}, "with --whole-model"),
    ],
)
def test_where_kl_alone_decides_it_is_said(changes, why):
    report = sample_reports.report(local=None, noise_floor=None, **changes)
    said = f"not compared one by one {why}: only the KL of the logits decides"
    assert said in " ".join(" ".join(shown(report, 100)).split())
    when = datetime(2026, 8, 1, tzinfo=UTC)
    assert said[1:] in html_report(report, when) and said in junit(report, when)


def test_terminal_shows_the_worst_of_many_sequences_in_their_order():
    many = [sequence(f"prompt-{n}", 5, scale=1e-12 * (1 + n % 7)) for n in range(30)]
    lines = shown(sample_reports.report(*many, drift=None), 100)
    names = [one.split()[0] for one in lines if one.startswith("prompt-")]
    kept = [n for n in range(30) if n % 7 in {5, 6}]
    assert len(names) == 12 and {f"prompt-{n}" for n in kept} <= set(names)
    assert names == sorted(names, key=lambda one: int(one.split("-")[1]))
    assert lines[-1].startswith("and 18 more") and "drift" not in "\n".join(lines)


def test_terminal_shows_nan_and_hostile_names():
    lines = shown(sample_reports.not_a_number(), 100)
    (line,) = [one for one in lines if one.startswith("hostile")]
    assert "NaN" in line and line.rstrip().endswith("!!!!!!!!!!")
    many = [replace(with_image(), name="\x1b[31m\n")]
    assert "\x1b" not in "\n".join(shown(sample_reports.report(*many), 100))
    bare = shown(sample_reports.report().without_tokens(), 100)
    assert not any("KL max" in one for one in bare[3:])


def test_fingerprints_tell_checkpoints_apart(tiny, converted, tmp_path):
    source = tiny("31b", layers=6)
    native = converted(source, "maxtext")
    found = fingerprints(source, native / "0" / "items")
    (weights,) = weight_files(source)
    manifest = native / "hf" / "gemma-convert" / "manifest.json"
    tables = json.loads(manifest.read_text())["mapping_sha256"]

    def digest(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert found[:3] == (
        Fingerprint("original", "config.json", "whole file", digest(source / "config.json")),
        Fingerprint("original", weights.name, "header", weights.header),
        Fingerprint("original", weights.name, "samples", weights.samples),
    )
    items = native / "0" / "items"
    assert Fingerprint("native", "_METADATA", "whole file", digest(items / "_METADATA")) in found
    named = {one.file: one.sha256 for one in found if one.what == "mapping table"}
    assert named == tables and len(tables) == 2
    whole = {one.file: one.sha256 for one in found if one.what == "whole file"}
    assert whole["hf/gemma-convert/manifest.json"] == digest(manifest)


def test_fingerprints_leave_out_what_cannot_be_read(tiny, tmp_path):
    assert fingerprints(tmp_path, tmp_path / "none") == ()
    shutil.copy(tiny("31b", layers=6) / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    (tmp_path / "metadata.yaml").mkdir()
    folder = tmp_path / "hf" / "gemma-convert"
    folder.mkdir(parents=True)
    for text in ("{", "[]", "{}", '{"mapping_sha256": 3}'):
        (folder / "manifest.json").write_text(text)
        found = fingerprints(tmp_path, tmp_path / "1" / "items")
        assert [one.file for one in found] == ["config.json", "hf/gemma-convert/manifest.json"]
