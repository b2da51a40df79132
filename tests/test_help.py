"""Help tells the truth: every example in it runs; completion and hints name what exists."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import models
import pytest
import sample_reports
from cases import LAYOUTS
from test_cli import fails, run, run_apart

from gemma_convert.cli.app import app

COMMANDS = {command.name: command.callback for command in app.registered_commands}
TEXTS = {"": app.info.help, **{name: call.__doc__ for name, call in COMMANDS.items()}}
EXAMPLE = re.compile(r"^ {2}(gemma-convert .*)$", re.MULTILINE)
SLOW = re.compile(r"gemma-convert (golden|logit-check)(?!.*--(golden|image))")
"""Examples that run on all prompts, where a few tokens show as well whether they are true."""

MOST_EXAMPLES = 3


def examples(text: str) -> list[str]:
    return EXAMPLE.findall(inspect.cleandoc(text))


EXAMPLES = [line for text in TEXTS.values() for line in examples(text)]


@pytest.fixture
def desk(shallow, converted, tmp_path):
    """desk(example): a folder with what the example reads, tiny; what it writes is not there."""

    def lay(example: str) -> Path:
        words = shlex.split(example)[2:]
        dense = shallow("31b", scanned="--scan-layers" in example)
        model = dense if "31B" in example else shallow("e2b")
        out = converted(model, "maxtext")
        reads = {
            "gemma-4-E2B-it": shallow("e2b"),
            "gemma-4-31B-it": dense,
            "config.json": models.FOLDER / models.DENSE / "config.json",
        }
        if "to-native" not in example:
            reads["out"] = out
        if "run/" in example:
            reads["run/checkpoints/1000"] = out / "0"
        for word in (*words, *(word.partition("/")[0] for word in words)):
            if word in reads and not (tmp_path / word).exists():
                place = tmp_path / word
                place.parent.mkdir(parents=True, exist_ok=True)
                source = reads[word]
                (shutil.copytree if source.is_dir() else shutil.copy)(source, place)
        make_files(words, example, tmp_path, model, out)
        return tmp_path

    return lay


def make_files(words: list[str], example: str, folder: Path, model: Path, out: Path) -> None:
    """The other files that an example names: a picture, golden logits, an export."""
    if "cat.png" in words:
        from PIL import Image

        Image.new("RGB", (40, 30), "grey").save(folder / "cat.png")
    if "--golden" in words:
        saved = run("golden", model, folder / words[words.index("--golden") + 1], "--tokens", 8)
        assert saved.returncode == 0, saved.stderr
    if words[0] == "before.json":
        for name in words[:2]:
            report = json.dumps(sample_reports.report().as_json())
            (folder / name).write_text(report, encoding="utf-8")
    if words[0] == "exported" and "verify" in example:
        assert run("to-hf", out, folder / "exported").returncode == 0


@pytest.mark.share(5)
@pytest.mark.parametrize("example", sorted(set(EXAMPLES)))
def test_every_example_runs(example, desk):
    quick = ["--tokens", "8"] if SLOW.match(example) else []
    if "--image" in example:
        quick = ["--prompt", "a cat"]
    done = run(*shlex.split(example)[1:], *quick, cwd=desk(example))
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("name", TEXTS)
def test_examples_stand_in_a_block_of_their_own(name):
    """One a line, each whole, under a heading, where help shows lines as they stand."""
    text = inspect.cleandoc(TEXTS[name])
    *_, block = text.split("\n\n")
    title, *lines = block.removeprefix("\b\n").splitlines()
    assert block.startswith("\b\n")
    assert title == ("Example:" if len(lines) == 1 else "Examples:")
    assert 1 <= len(lines) <= MOST_EXAMPLES
    assert lines == [f"  {line}" for line in examples(text)]
    assert text.count("gemma-convert ") == len(lines)
    if name:
        assert all(line.startswith(f"  gemma-convert {name} ") for line in lines)
    shown = run(*([name] if name else []), "--help").stdout
    rows = [row.strip() for row in shown.splitlines()]
    for line in lines:
        assert line.strip() in rows or len(line) > 96
    assert "\b" not in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_of_the_help_is_taken_for_markup(name):
    """`[default: 5]` in a text would vanish: rich reads square brackets."""
    shown = "".join(run(name, "--help").stdout.split())
    for parameter in inspect.signature(COMMANDS[name], eval_str=True).parameters.values():
        (info,) = parameter.annotation.__metadata__
        words = re.findall(r"[\w.,;:-]+", info.help or "")
        assert words, parameter.name
        brackets = re.findall(r"\[[^\]]*\]", info.help)
        assert brackets == [], parameter.name
    for line in TEXTS[name].splitlines():
        assert not re.search(r"\[[a-z]", line)
    assert "--json" in shown and "Printthereport" in shown


def test_commands_with_many_options_have_panels():
    for name, call in COMMANDS.items():
        infos = [
            parameter.annotation.__metadata__[0]
            for parameter in inspect.signature(call, eval_str=True).parameters.values()
        ]
        plain = [info for info in infos if info.rich_help_panel is None]
        assert len(plain) <= 11, name
    for panel in ("Storage", "Running", "Several processes"):
        assert f"─ {panel} ─" in run("to-native", "--help").stdout
    for panel in ("Convert", "Check", "Inspect and count", "Try"):
        assert f"─ {panel} ─" in run("--help").stdout


def complete(shell: str, line: str, capture) -> list[str]:
    """What a shell is told at the end of a line, in the way in which its script asks."""
    words = line.split(" ")
    environment = {
        "_GEMMA_CONVERT_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        done = run()
    text = done.stdout + "".join(capture.readouterr())
    if shell == "zsh":
        return re.findall(r'"([^":]+)"(?::"[^"]*")?', text)
    return [row.split("\t")[0] for row in text.splitlines() if row]


LINES = [
    ("gemma-convert to-native --format ", list(LAYOUTS)),
    ("gemma-convert mappings --format m", ["maxtext"]),
    ("gemma-convert mappings --model ", ["e2b", "e4b", "12b", "26b-a4b", "31b"]),
    ("gemma-convert mappings --model 2", ["26b-a4b"]),
    ("gemma-convert tiny ", ["e2b", "e4b", "12b", "26b-a4b", "31b"]),
    ("gemma-convert flops --mode ", ["train", "prefill", "decode"]),
    ("gemma-convert to-native --scaled-dtype b", ["bfloat16"]),
    ("gemma-convert l", ["logit-check"]),
]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(("line", "wanted"), LINES)
def test_completion_of_choices(shell, line, wanted, capfd):
    assert complete(shell, line, capfd) == wanted


def test_paths_are_left_to_the_shell(capfd):
    assert complete("bash", "gemma-convert inspect ", capfd) == []


@pytest.mark.share(3)
@pytest.mark.parametrize(
    ("shell", "file"),
    [
        ("bash", ".bash_completions/gemma-convert.sh"),
        ("zsh", ".zfunc/_gemma-convert"),
        ("fish", ".config/fish/completions/gemma-convert.fish"),
    ],
)
def test_completion_is_installed_and_shown(shell, file, tmp_path):
    environment = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}

    def called(option):
        code = "from gemma_convert.cli.app import main; main()"
        return subprocess.run(
            [sys.executable, "-c", code, option, shell],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | environment,
        ).stdout

    assert f"{shell} completion installed" in called("--install-completion")
    script = (tmp_path / file).read_text()
    assert f"_GEMMA_CONVERT_COMPLETE=complete_{shell}" in script
    assert called("--show-completion").strip() == script.strip()


def test_completion_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['gemma-convert']\n"
        "from gemma_convert.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'jax', 'transformers', 'orbax', 'tensorstore', 'numpy', 'ml_dtypes'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    environment = {
        "_GEMMA_CONVERT_COMPLETE": "complete_bash",
        "COMP_WORDS": "gemma-convert mappings --model ",
        "COMP_CWORD": "3",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    assert done.stdout.split() == ["e2b", "e4b", "12b", "26b-a4b", "31b", "HEAVY", "[]"]


def test_usage_errors_name_the_next_command(tiny, tmp_path):
    message = fails(2, "to-native", tiny("31b"), run=run_apart)
    assert "Usage: gemma-convert to-native" in message
    assert "gemma-convert to-native --help" in message
    message = fails(2, "nothing", run=run_apart)
    assert "gemma-convert --help" in message
    for size in ("many", "5 apples"):
        message = fails(2, "to-hf", tmp_path, tmp_path / "out", "--memory", size)
        assert "what to do: gemma-convert to-hf --help lists the options" in message


def test_an_error_that_says_what_to_do_says_nothing_more():
    message = fails(2, "mappings", "--scan-layers")
    assert "--help" not in message
    assert message.count("what to do") == 1


def test_a_module_of_our_own_that_cannot_be_imported_is_our_own_fault(monkeypatch):
    """More packages would not help; of another package's module that is the advice."""
    monkeypatch.setitem(sys.modules, "gemma_convert.tasks.mappings", None)
    done = run("mappings")
    assert (done.returncode, done.stdout) == (70, "")
    assert "error inside gemma-convert" in done.stderr
    assert "pip install" not in done.stderr
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "numpy", None)
    monkeypatch.delitem(sys.modules, "gemma_convert.tasks.mappings", raising=False)
    monkeypatch.delitem(sys.modules, "gemma_convert.arrays.dtypes", raising=False)
    assert "pip install 'gemma-convert[check]'" in fails(2, "mappings")


def test_no_command_shows_all_of_them():
    done = run()
    assert done.returncode in (0, 2)
    for name in COMMANDS:
        assert f" {name} " in done.stdout + done.stderr
