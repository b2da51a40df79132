#!/usr/bin/env python3
"""Writes docs/commands.md from the command line itself: every command, argument and option.

    scripts/commands_page.py [--check]

With `--check` nothing is written, and the exit code is 1 where the page is not current.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from gemma_convert.cli.app import app
from gemma_convert.cli.help import plain

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"

_HEAD = """\
# Commands

Written by `scripts/commands_page.py` from the command line itself; `gemma-convert COMMAND --help`
says the same. Results go to stdout, progress and warnings to stderr. The
[exit codes](exit-codes.md) are the same for all commands.
"""
_DEFAULT = re.compile(r"\s*\[default: ([^\]]*)\]")
_EXAMPLE = re.compile(r"^(?:\x08|\[[a-z ]+\])?\s*Examples?\b", re.IGNORECASE)


@dataclass(frozen=True)
class Parameter:
    """One argument or option: `value` is what it takes, empty for a flag."""

    names: tuple[str, ...]
    argument: bool
    value: str
    default: str
    required: bool
    repeated: bool
    help: str


@dataclass(frozen=True)
class Command:
    """One command, as its function declares it."""

    name: str
    help: str
    parameters: tuple[Parameter, ...]

    @property
    def options(self) -> frozenset[str]:
        """Every spelling of every option."""
        return frozenset(n for one in self.parameters if not one.argument for n in one.names)


def commands() -> list[Command]:
    """Every command, in the order of `gemma-convert --help`."""
    return [_command(one.name or "", one.callback) for one in app.registered_commands]


def page() -> str:
    """The text of docs/commands.md."""
    return "\n".join([_HEAD, *(_section(command) for command in commands())])


def _command(name: str, function: Callable[..., Any] | None) -> Command:
    assert function is not None
    hints = get_type_hints(function, include_extras=True)
    given = inspect.signature(function).parameters
    parameters = (_parameter(key, hints[key], given[key].default) for key in given)
    return Command(name, inspect.cleandoc(function.__doc__ or ""), tuple(parameters))


def _parameter(key: str, hint: Any, default: object) -> Parameter:
    kind, info, *_ = get_args(hint)
    argument = isinstance(info, ArgumentInfo)
    assert argument or isinstance(info, OptionInfo), key
    kind, repeated = plain(kind)
    flag = kind is bool
    names = (info.metavar or key.upper(),) if argument else _names(key, info, flag)
    text = info.help or ""
    said = _DEFAULT.search(text)
    return Parameter(
        names=names,
        argument=argument,
        value="" if argument else _choices(info.metavar),
        default=said[1] if said else _shown(default, names),
        required=default is inspect.Parameter.empty,
        repeated=repeated,
        help=_DEFAULT.sub("", text).strip(),
    )


def _names(key: str, info: OptionInfo, flag: bool) -> tuple[str, ...]:
    word = key.replace("_", "-")
    both = (f"--{word}", f"--no-{word}") if flag else (f"--{word}",)
    declared = (info.default, *(info.param_decls or ()))  # in Annotated the first one is `default`
    spelled = [name for one in declared if isinstance(one, str) for name in one.split("/")]
    return tuple(name for name in spelled if name.startswith("-")) or both


def _choices(metavar: str | None) -> str:
    """What stands for the value in `--help`; the brackets around choices are left out."""
    return (metavar or "").strip("[]").replace("|", " | ")


def _shown(default: object, names: tuple[str, ...]) -> str:
    if isinstance(default, bool):
        long = [name for name in names if name.startswith("--")]
        return long[0 if default else 1] if len(long) > 1 else ""
    if default in (None, inspect.Parameter.empty):
        return ""
    return str(default.value if isinstance(default, Enum) else default)


def _section(command: Command) -> str:
    arguments = [one for one in command.parameters if one.argument]
    options = [one for one in command.parameters if not one.argument]
    usage = " ".join(_bracketed(one) for one in arguments)
    lines = [f"## {command.name}", "", *_paragraphs(command.help), "```text"]
    lines += [f"gemma-convert {command.name} {usage} [OPTIONS]".replace("  ", " "), "```", ""]
    if arguments:
        lines += ["| argument | meaning |", "|---|---|"]
        lines += [f"| `{one.names[0]}` | {_cell(one.help)} |" for one in arguments]
        lines.append("")
    lines += ["| option | meaning | default |", "|---|---|---|", *map(_row, options), ""]
    return "\n".join(lines)


def _paragraphs(text: str) -> Iterator[str]:
    """The description, without the examples that end it."""
    for paragraph in text.split("\n\n"):
        if _EXAMPLE.match(paragraph):
            return
        yield " ".join(paragraph.split())
        yield ""


def _bracketed(one: Parameter) -> str:
    name = f"{one.names[0]}..." if one.repeated else one.names[0]
    return name if one.required else f"[{name}]"


def _row(one: Parameter) -> str:
    names = ", ".join(f"`{name}`" for name in one.names)
    value = f" {_values(one.value.split(' | '))}" if one.value else ""
    several = "; several times for more" if one.repeated and "several" not in one.help else ""
    default = f"`{one.default}`" if one.default else "required" if one.required else ""
    return f"| {names}{value} | {_cell(one.help.rstrip('.'))}{several}. | {default} |"


def _values(values: list[str]) -> str:
    """What an option takes: one word, or the choices."""
    *others, last = (f"`{one}`" for one in values)
    return f"{', '.join(others)} or {last}" if others else last


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes docs/commands.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; is it current?")
    if parser.parse_args().check:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
