"""What comes from a checkpoint does nothing to a terminal, and looks like no line of ours."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from commands import said
from hypothesis import given, settings
from hypothesis import strategies as st
from native_checkpoints import edit_manifest
from test_confined import copied

from gemma_convert.errors import SourceError
from gemma_convert.output import Facts, note, show, show_json

EVIL = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\x7f\u202e\u2066\u200b\u2028\ud800\n  verified: all\x00"
CLEAR = "\n\t"
MANIFEST = "hf/gemma-convert/manifest.json"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def clear(text: str) -> bool:
    """Whether every character is one that only takes a place."""
    return all(one.isprintable() or one in CLEAR for one in text)


def printed(renderable: object) -> str:
    with redirect_stdout(io.StringIO()) as output:
        show(renderable)
    return output.getvalue()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(st.characters()))
def test_whatever_is_printed(text: str) -> None:
    from gemma_convert.output import Facts

    facts = Facts()
    facts.add_row(text, text)
    facts.add_row("verified", "yes")
    assert clear(printed(facts))
    assert clear(printed(text))
    with redirect_stderr(io.StringIO()) as errors:
        note(text)
    assert clear(errors.getvalue())
    with redirect_stdout(io.StringIO()) as output:
        show_json({text: [text]})
    assert clear(output.getvalue()) and output.getvalue().isascii()
    assert json.loads(output.getvalue()) == {text: [text]}
    error = SourceError(text, where=text, expected=text, found=text, do="leave it")
    lines = error.message.split("\n")
    assert clear(error.message)
    ours = [line for line in lines[1:] if not line.startswith("    ")]
    known = ("  where: ", "  expected: ", "  found: ", "  what to do: leave it")
    assert all(line.startswith(known) for line in ours)
    assert len(ours) <= len(known)


def test_our_own_layout_survives() -> None:
    assert printed("name\tvalue\nsecond line: é ü 港 🙂") == "name\tvalue\nsecond line: é ü 港 🙂\n"
    from gemma_convert.output import Facts

    facts = Facts()
    facts.add_row("tensors", ":smile: [red]34[/red]")
    facts.add_row("", "x\ny")
    lines = [line.rstrip() for line in printed(facts).splitlines()]
    assert lines == ["tensors  :smile: [red]34[/red]", "         x\\u000ay"]


def test_styles_of_our_own_reach_a_terminal(monkeypatch) -> None:
    from rich.text import Text

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with redirect_stdout(Terminal()) as output:
        show(Text(f"a{EVIL}b", style="bold"))
    found = output.getvalue()
    assert "\x1b[1m" in found
    assert clear(re.sub(r"\x1b\[[0-9;]*m", "", found)), ascii(found)


def alter(folder: Path, file: str, change: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text())
    change(content)
    path.unlink()
    path.write_text(json.dumps(content))


@pytest.mark.large
def test_a_manifest_that_speaks_to_the_terminal(tiny, converted, tmp_path) -> None:
    """`lossy_rows` and `not_carried` are texts of the manifest, and end in summaries."""
    hf = tiny("31b", layers=6)
    folder = copied(converted(hf, "maxtext"), tmp_path / "in")
    row = {"row": "r", "tensor": EVIL, "reason": EVIL, "values": 1}

    def change(manifest: dict[str, Any]) -> None:
        manifest |= {"lossy_rows": [row], "not_carried": [EVIL], "tool": EVIL}

    alter(folder, MANIFEST, change)
    edit_manifest(folder)
    out = tmp_path / "out"
    seen = ""
    for command in (
        ("inspect", folder),
        ("inspect", folder, "--json"),
        ("verify", folder),
        ("to-native", folder, out, "--format", "gemma-jax", "--dry-run"),
        ("to-native", folder, out, "--format", "gemma-jax"),
        ("to-hf", folder, tmp_path / "back"),
        ("to-hf", folder, tmp_path / "json", "--json"),
        ("logit-check", hf, folder, "--tokens", 5),
        ("logit-check", hf, folder, "--tokens", 5, "--json"),
    ):
        code, output, errors = said(*command)
        assert code == 0, (command, errors)
        assert clear(output) and clear(errors), (command, ascii(output + errors))
        assert not re.search("^ {0,4}verified: all", output + errors, re.M), (
            command,
            output,
            errors,
        )
        if "--json" in command:
            json.loads(output)
        seen += output + errors
    assert "\\u001b[2J" in seen and "\\u202e" in seen


@pytest.mark.parametrize("layout", ["hf", "maxtext"])
def test_file_names_that_speak_to_the_terminal(layout, tiny, converted, tmp_path) -> None:
    hf = tiny("31b", layers=6)
    folder = copied(hf if layout == "hf" else converted(hf, "maxtext"), tmp_path / "in")
    name = EVIL.replace("\0", "").replace("/", "").replace("\ud800", "\udcff")
    (folder / f"{name}.bin").write_text("x")
    (folder / name).symlink_to("/etc/hostname")
    code, output, errors = said("inspect", folder)
    assert code == 3 and clear(output) and clear(errors)
    (folder / name).unlink()
    command = ("to-native", folder, tmp_path / "out", "--format", "gemma-jax")
    code, output, errors = said(*command)
    assert code == 0 and clear(output) and clear(errors), errors
    assert (".bin" in output) == (layout == "hf")


@pytest.mark.share(3, 1)
@pytest.mark.parametrize(
    "file", ["tokenizer_config.json", "config.json", "special_tokens_map.json"]
)
def test_values_that_speak_to_the_terminal(file, tiny, converted, tmp_path, capfd) -> None:
    """Nothing that transformers says of a value gets there either."""
    hf = tiny("31b", layers=6)
    native = converted(hf, "maxtext")
    folder = copied(hf, tmp_path / "in")
    before = (folder / file).read_text() if (folder / file).exists() else "{}"
    refused = [("tokenizer_class",), ("dtype",), ("model_type",), ("bos_token",), ("auto_map",)]
    for keys in (*refused, (EVIL, "transformers_version")):
        (folder / file).unlink(missing_ok=True)
        evil = {**json.loads(before), **dict.fromkeys(keys, EVIL)}
        (folder / file).write_text(json.dumps(evil))
        check = ("logit-check", folder, native, "--max-kl", 9, "--prompt", "a")
        for command in (("inspect", folder), check):
            _, output, errors = said(*command)
            outside = "".join(capfd.readouterr())
            assert clear(output + errors + outside), (keys, ascii(output + errors + outside))


def test_names_are_whole_in_a_pipe_and_on_a_narrow_terminal(monkeypatch, capsys):
    """A name that is cut could be any of several."""
    name = "params/decoder/" + "layer/" * 30 + "kernel"
    table = Facts()
    table.add_row(name, "differs from the source")
    table.add_row("time", "1 s")
    monkeypatch.delenv("COLUMNS", raising=False)
    show(table)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{name}  differs from the source"
    assert second.split() == ["time", "1", "s"]
    assert not second.endswith(" ")
    monkeypatch.setenv("COLUMNS", "60")
    show(table)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert name in "".join(line.split("  ")[0].strip() for line in lines)
