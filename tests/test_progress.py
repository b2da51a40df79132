"""Progress: one kind of event, which callers, JSON lines, plain lines and the bar listen to."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from commands import said

import gemma_convert
from gemma_convert import ProgressEvent, output
from gemma_convert.output import chatter, note, show
from gemma_convert.progress import ended, steps, working


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def usual():
    """What stderr is told is what it is told without options, before a test and behind it."""
    chatter()
    yield
    chatter()


@pytest.fixture
def source(tiny) -> Path:
    return tiny("31b", layers=6)


def tasks(events: Sequence[ProgressEvent]) -> dict[str, list[ProgressEvent]]:
    """The events of each task, which are known to be a start, steps ahead, and an end."""
    found: dict[str, list[ProgressEvent]] = {}
    for event in events:
        found.setdefault(event.task, []).append(event)
    assert [event for events in found.values() for event in events] == list(events)
    for first, *between, last in found.values():
        assert (first.event, first.done, first.name) == ("start", 0, "")
        assert (last.event, last.done, last.name) == ("end", last.total, "")
        assert {one.event for one in between} == {"advance"}
        amounts = [one.done for one in (first, *between, last)]
        assert amounts == sorted(amounts)
        times = [one.seconds for one in (first, *between, last)]
        assert times == sorted(times)
        assert len({(one.total, one.unit) for one in (first, *between, last)}) == 1
    return found


def test_a_caller_hears_of_every_tensor(source, tmp_path):
    events: list[ProgressEvent] = []
    out = tmp_path / "out"
    report = gemma_convert.to_native(source, out, layout="maxtext", progress=events.append)
    found = tasks(events)["convert"]
    assert found[0].total == report.bytes_read and found[0].unit == "bytes"
    from safetensors import safe_open

    with safe_open(source / "model.safetensors", "numpy") as file:
        names = set(file.keys())
    assert {event.name for event in found[1:-1]} <= names
    assert len({event.name for event in found[1:-1]}) == report.tensors_converted

    events.clear()
    gemma_convert.to_hf(out, tmp_path / "back", progress=events.append)
    assert list(tasks(events)) == ["export"]
    for against in (None, source):
        events.clear()
        gemma_convert.verify(out, against=against, progress=events.append)
        assert list(tasks(events)) == ["verify"]


def test_a_caller_hears_of_every_layer(source, converted, tmp_path):
    names = ["embedding", *(f"layer {index}" for index in range(6)), "final norm"]
    events: list[ProgressEvent] = []
    out = converted(source, "fast-llm")  # nothing is compiled
    gemma_convert.logit_check(source, out, tokens=5, progress=events.append)
    found = tasks(events)
    assert list(found) == ["layers", "logits"]
    assert [event.name for event in found["layers"][1:-1]] == names
    assert [event.name for event in found["logits"][1:-1]] == ["vocabulary to 317"]
    assert (found["layers"][0].unit, found["logits"][0].unit) == ("stages", "slices")

    events.clear()
    file = tmp_path / "golden"
    gemma_convert.save_golden(source, file, tokens=5, progress=events.append)
    assert [event.name for event in tasks(events)["layers"][1:-1]] == names
    events.clear()
    options = {"golden": file, "whole_model": True}
    report = gemma_convert.logit_check(source, out, progress=events.append, **options)
    whole = tasks(events)["logits"]
    assert (whole[0].total, whole[0].unit) == (report.sequences, "sequences")


def lines(text: str) -> list[dict]:
    found = [json.loads(line) for line in text.splitlines()]
    assert {one.pop("schema") for one in found} == {"gemma-convert/progress/1"}
    return found


def test_json_lines_are_the_events_that_a_caller_hears(source, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "JSON_INTERVAL_S", 0.0)
    events: list[ProgressEvent] = []
    gemma_convert.to_native(source, tmp_path / "a", layout="maxtext", progress=events.append)
    words = ("to-native", source, tmp_path / "b", "--format", "maxtext", "--json-lines")
    code, printed, errors = said(*words, "--json")
    assert code == 0 and json.loads(printed)["schema"].startswith("gemma-convert/to-native/")
    fields = ("event", "task", "done", "total", "unit", "name")
    assert [[one[field] for field in fields] for one in lines(errors)] == [
        [getattr(event, field) for field in fields] for event in events
    ]


def test_json_lines_come_now_and_then_and_end(monkeypatch):
    errors = heard(chatter("info", json_lines=True))
    assert [(one["event"], one["done"]) for one in lines(errors)] == [
        ("start", 0),
        ("advance", 1024),
        ("advance", 3072),
        ("end", 4096),
    ]


EVENT = ProgressEvent("advance", "convert", 0, 4096, "bytes", "a.\x1b[2Jweight", 0.0)
STEPS = ((1024, 1.0), (2048, 1.1), (3072, 9.0), (4096, 9.05))


def heard(listener, stream: io.StringIO | None = None, events=STEPS) -> str:
    """What stderr gets of a task of four steps."""
    with redirect_stderr(stream or io.StringIO()) as errors:
        listener(replace(EVENT, event="start", name=""))
        for done, seconds in events:
            listener(replace(EVENT, done=done, seconds=seconds))
        listener(replace(EVENT, event="end", done=4096, name="", seconds=9.1))
    return errors.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    with redirect_stderr(io.StringIO()):
        listener = chatter()
    assert heard(listener).splitlines() == [
        "convert  75%  3.0 KiB of 4.0 KiB  341 B/s  3 s left  a.\\u001b[2Jweight"
    ]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return Terminal


def bar(stream: io.StringIO) -> str:
    with redirect_stderr(stream):
        listener = chatter()
    return heard(listener, stream)


def test_a_bar_on_a_terminal(terminal, monkeypatch):
    found = bar(terminal())
    assert "convert" in found and "4.0/4.0 KiB" in found and "a.\\u001b[2Jweight" in found
    assert "\x1b[38;5;" in found
    monkeypatch.setenv("NO_COLOR", "1")
    plain = bar(terminal())
    assert "4.0/4.0 KiB" in plain and "\x1b[3" not in plain
    monkeypatch.setenv("TERM", "dumb")
    assert bar(terminal()).startswith("convert  75%")


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
)
def test_colours_of_results(terminal, variables, coloured, monkeypatch):
    from rich.text import Text

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with redirect_stdout(io.StringIO()) as printed:
        show(Text("warned", style="yellow"))
    assert ("\x1b[33m" in printed.getvalue()) == coloured
    assert "warned" in printed.getvalue()


LOSSY = ("--format", "maxtext", "--dtype", "bfloat16", "--scaled-dtype", "bfloat16")


@pytest.mark.parametrize(
    ("options", "warned", "progress"),
    [
        ((), True, True),
        (("--log-level", "info"), True, True),
        (("--log-level", "warning"), True, False),
        (("--log-level", "error"), False, False),
        (("--quiet",), False, False),
        (("-q", "--log-level", "info"), False, False),
    ],
)
def test_how_much_stderr_is_told(options, warned, progress, source, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "PLAIN_INTERVAL_S", 0.0)
    words = ("to-native", source, tmp_path / "out", *LOSSY, *options)
    code, printed, errors = said(*words)
    assert code == 0 and printed.startswith("converted")
    assert ("convert 100%" in errors) == progress
    assert ("warning: model.language_model.embed_tokens.weight is" in errors) == warned
    assert bool(errors) == warned
    code, printed, errors = said(*words)
    assert (code, printed) == (4, "")
    assert errors.startswith("error: ") and "exists" in errors


@pytest.mark.parametrize("level", ["warning", "error"])
def test_progress_is_no_warning(level, terminal):
    with redirect_stderr(terminal()):
        assert chatter(level) is chatter(level, json_lines=True) is None


def test_messages_are_json_lines_too(source, tmp_path):
    words = ("verify", tmp_path / "nowhere", "--json-lines")
    code, printed, errors = said(*words)
    (line,) = lines(errors)
    assert (code, printed) == (3, "")
    assert (line["event"], line["level"], line["task"]) == ("message", "error", None)
    assert "nowhere" in line["text"] and not line["text"].startswith("error")
    code, _, errors = said(*words[:-1])
    assert errors == f"error: {line['text']}\n"


def test_a_command_leaves_nothing_for_the_next_one(tmp_path):
    said("verify", tmp_path, "--quiet", "--json-lines")
    with redirect_stderr(io.StringIO()) as errors:
        assert said("--version")[0] == 0
        note("words")
    assert errors.getvalue() == "words\n"


def test_an_error_ends_a_task_before_it_is_told():
    events: list[ProgressEvent] = []
    with pytest.raises(ValueError, match="in the midst"), working(events.append, "verify", 9) as it:
        it.advance(4, "a")
        raise ValueError("in the midst")
    assert [(one.event, one.done) for one in events] == [("start", 0), ("advance", 4), ("end", 4)]

    events.clear()
    with pytest.raises(ValueError, match="in the midst"), ended(events.append) as listener:
        items = steps(listener, "layers", "stages", "abc", ["a", "b", "c"])
        for item in items:
            if item == "b":
                raise ValueError("in the midst")
    assert [(one.event, one.done) for one in events] == [("start", 0), ("advance", 1), ("end", 1)]
    items.close()
    assert len(events) == 3


def test_a_listener_may_end_the_work(source, tmp_path):
    """What it raises comes back to the caller, and nothing is left behind."""

    def stop(event: ProgressEvent) -> None:
        if event.event == "advance":
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        gemma_convert.to_native(source, tmp_path / "out", layout="maxtext", progress=stop)
    assert not (tmp_path / "out").exists()
