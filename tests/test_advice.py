"""What messages advise: options that the command has, and parameters in the Python API."""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path

import pytest
from commands import said
from test_cli import fails

import gemma_convert
from gemma_convert import (
    SourceError,
    TargetError,
    UsageError,
    logit_check,
    to_hf,
    to_native,
    verify,
)
from gemma_convert.api.arguments import public
from gemma_convert.cli.app import app
from gemma_convert.errors import GemmaConvertError
from gemma_convert.output import counted

PACKAGE = Path(gemma_convert.__file__).parent
OPTION = re.compile(r"--(?:no-)?([a-z]+(?:-[a-z]+)*)")
COMMANDS = [command.callback for command in app.registered_commands]


@public
def ask(source: str, *, like: str | None = None, names: tuple[str, ...] = (), fast: bool = True):
    raise SourceError(
        "--like is wrong, and --text-only.",
        do=("name it with --like", "take it: --names a.b", "give --name NAME", "drop --no-fast")
        if source == "several"
        else "leave out --format",
    )


def test_a_function_is_told_its_parameters_and_the_shell_its_options():
    with pytest.raises(SourceError) as caught:
        ask("several")
    error = caught.value
    assert str(error) == error.message
    assert "`like` is wrong, and --text-only." in error.message
    for words in ("with `like`, or", "it: `names` a.b, or give names=['NAME'], or drop fast=False"):
        assert words in error.message
    assert "name it with --like, or take it: --names a.b, or give --name NAME" in error.in_shell


def test_a_way_out_that_the_function_does_not_have_is_left_out(converted, shallow, tmp_path):
    """Each of two; a single one stands, as it may be another command's."""

    @public
    def without(source: str):
        raise SourceError("No.", do=("convert it again", "continue with --accept-damage NAME"))

    with pytest.raises(SourceError) as caught:
        without("")
    assert caught.value.do == "convert it again"
    assert GemmaConvertError("No.", do="run it with --resume").do == "run it with --resume"
    out = tmp_path / "out"
    shutil.copytree(converted(shallow("31b"), "maxtext"), out)
    with (out / "hf/config.json").open("a") as file:
        file.write(" ")
    message = fails(3, "logit-check", shallow("31b"), out, "--tokens", 3)
    assert "do: convert the original again\n" in message
    message = fails(3, "to-hf", out, tmp_path / "back")
    assert "do: convert the original again, or continue with --accept-damage NAME\n" in message
    with pytest.raises(SourceError, match=r"again, or continue with accept_damage=\['NAME'\]$"):
        to_hf(out, tmp_path / "back")


def test_another_original_is_named_with_the_commands_own_option(converted, shallow, tmp_path):
    out, other = converted(shallow("31b"), "maxtext"), shallow("26b-a4b")
    for option, *arguments in (("against", "verify", out), ("like", "to-hf", out, tmp_path / "b")):
        message = fails(3, *arguments, f"--{option}", other)
        assert f"checkpoint of the same model with --{option}\n" in message
    with pytest.raises(SourceError, match=r"of the same model with `against`$"):
        verify(out, against=other)


def test_the_target_is_replaced_with_the_parameter(shallow, tmp_path):
    with pytest.raises(TargetError, match=r"replace it with overwrite=True$"):
        to_native(shallow("31b"), tmp_path, layout="maxtext")
    assert "--overwrite\n" in fails(4, "to-native", shallow("31b"), tmp_path, "--format", "maxtext")


def test_every_option_in_the_sources_is_one_of_a_command():
    known = {"help", "version"}
    for command in COMMANDS:
        for name in inspect.signature(command).parameters:
            hint = command.__annotations__[name]
            text = " ".join(str(info.param_decls) + str(info.default) for info in hint.__metadata__)
            known |= {name.replace("_", "-"), *OPTION.findall(text)}
    found = {
        (file.name, option)
        for file in PACKAGE.rglob("*.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if '"' in line
        for option in OPTION.findall(line)
    }
    assert {(file, option) for file, option in found if option not in known} <= {
        ("html_tokens.py", "p"),  # a property of CSS
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "fp16"}, "'keep', 'float32', 'bfloat16'"),
        ({"scaled_dtype": "keep"}, "'float32', 'bfloat16'"),
        ({"memory": "256MB"}, "a whole number, or None"),
        ({"memory": True}, "a whole number, or None"),
        ({"compression": "gz"}, "'none', 'zstd'"),
        ({"settings": "a=b"}, "a list, each item text"),
        ({"accept_damage": [3]}, "a list, each item text"),
        ({"accept_damage": iter(["a"])}, "a list, each item text"),
        ({"like": 3}, "text, or a path, or None"),
        ({"layout": None}, "text"),
    ],
)
def test_an_argument_of_another_kind_is_one_usage_error(options, expected, tmp_path):
    with pytest.raises(UsageError) as caught:
        to_native(tmp_path / "absent", tmp_path / "out", **options)
    (name,) = options
    assert caught.value.what == f"{name} does not take this value."
    assert caught.value.expected == expected


def test_every_public_function_checks_its_arguments(tmp_path):
    functions = [getattr(gemma_convert, name) for name in gemma_convert.__all__ if name.islower()]
    for function in (one for one in functions if callable(one)):
        arguments = [
            3 for one in inspect.signature(function).parameters.values() if one.default is one.empty
        ]
        given = arguments or [3]
        with pytest.raises(UsageError, match="does not take this value"):
            function(*given)
    for options in ({"max_kl": "0"}, {"dtype": "fp16"}, {"tokens": 2.5}, {"images": "cat.png"}):
        with pytest.raises(UsageError, match="does not take this value"):
            logit_check(tmp_path, tmp_path, **options)
    with pytest.raises(TypeError, match="missing"):
        to_native(tmp_path)


def test_dir_has_what_is_loaded_on_first_use():
    assert set(gemma_convert.__all__) <= set(dir(gemma_convert))


@pytest.mark.parametrize(
    ("given", "do"),
    [
        ("MaxText", "did you mean maxtext?"),
        ("maxtxt", "did you mean maxtext?"),
        ("gemma_jax", "did you mean gemma-jax?"),
        ("huggingface", "to-hf writes Hugging Face files"),
        ("HF", "to-hf writes Hugging Face files"),
        ("keras", "choose one with --format"),
    ],
)
def test_a_layout_that_there_is_not(given, do, tmp_path):
    code, _, errors = said("to-native", tmp_path, tmp_path / "out", "--format", given)
    assert code == 2 and errors.endswith(f"what to do: {do}\n")


def test_swapped_source_and_target(shallow, tmp_path):
    for command in (("to-native", "--format", "maxtext"), ("to-hf",)):
        name, *options = command
        message = fails(3, name, tmp_path / "absent", shallow("31b"), *options)
        assert "There is no such checkpoint.\n" in message and "were swapped" in message


def test_words_for_numbers():
    told = [counted(number, "tensor") for number in (0, 1, 2000)]
    assert told == ["0 tensors", "1 tensor", "2,000 tensors"]
    assert counted(1, "it differs", "they differ") == "1 it differs"


def test_help_has_no_words_of_python_and_cuts_no_name(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in app.registered_commands:
        code, out, _ = said(command.name, "--help")
        assert code == 0
        assert not re.search(r"<[a-z]|…|\{[A-Z]", out), command.name


def test_a_check_of_two_originals_says_each_thing_once(shallow):
    source = shallow("31b")
    code, out, errors = said("logit-check", source, source, "--tokens", 3)
    words = " ".join(out.split())
    assert (code, errors) == (0, "")
    assert words.count("! transformers ran both models") == 1
    assert "not compared one by one between two Hugging Face checkpoints" in words
    assert " in 2 sequences, the longest " in words


def test_exit_codes_of_what_is_not_there(shallow, converted, tmp_path):
    """Of options 2; of what is read 3, an original or a base model that nothing names as well."""
    hf, absent = shallow("31b"), tmp_path / "absent"
    native = converted(hf, "maxtext")
    bare = shutil.copytree(native / "0" / "items", tmp_path / "bare")
    for code, *arguments in (
        (2, "logit-check", hf, native, "--image", absent),
        (2, "logit-check", hf, native, "--settings", absent),
        (3, "logit-check", hf, native, "--golden", absent),
        (3, "compare-reports", absent, absent),
        (3, "to-hf", bare, tmp_path / "back"),
    ):
        fails(code, *arguments)
