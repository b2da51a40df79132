"""The command line: `gemma-convert COMMAND`; a command is one file that parses, calls, prints."""

from __future__ import annotations

import atexit
import gc
import sys
import traceback
from typing import Annotated

import typer

from gemma_convert.cli import (
    compare_reports,
    flops,
    golden,
    inspect,
    logit_check,
    mappings,
    tiny,
    to_hf,
    to_native,
    verify,
)
from gemma_convert.cli.help import Command, worded
from gemma_convert.cli.streams import standard_streams
from gemma_convert.errors import INTERNAL, INTERRUPTED, GemmaConvertError, UsageError, exit_code
from gemma_convert.output import shown
from gemma_convert.version import __version__

_HELP = """Convert Gemma 4 checkpoints between Hugging Face and native training layouts, and prove
that nothing changed.

\b
Examples:
  gemma-convert to-native gemma-4-E2B-it out --format maxtext
  gemma-convert logit-check gemma-4-E2B-it out --report out.html
"""
_CONVERT, _CHECK, _LOOK, _TRY = "Convert", "Check", "Inspect and count", "Try"

app = typer.Typer(
    name="gemma-convert",
    help=_HELP,
    rich_markup_mode="rich",
    epilog="Exit codes: 0 done, 1 a check failed, 2 usage, 3 bad source, 4 target problem, "
    "70 internal error, 74 the output cannot be printed, 130 interrupted.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command("to-native", cls=Command, rich_help_panel=_CONVERT)(worded(to_native.command))
app.command("to-hf", cls=Command, rich_help_panel=_CONVERT)(worded(to_hf.command))
app.command("verify", cls=Command, rich_help_panel=_CHECK)(worded(verify.command))
app.command("logit-check", cls=Command, rich_help_panel=_CHECK)(worded(logit_check.command))
app.command("compare-reports", cls=Command, rich_help_panel=_CHECK)(worded(compare_reports.command))
app.command("golden", cls=Command, rich_help_panel=_CHECK)(worded(golden.command))
app.command("inspect", cls=Command, rich_help_panel=_LOOK)(worded(inspect.command))
app.command("mappings", cls=Command, rich_help_panel=_LOOK)(worded(mappings.command))
app.command("flops", cls=Command, rich_help_panel=_LOOK)(worded(flops.command))
app.command("tiny", cls=Command, rich_help_panel=_TRY)(worded(tiny.command))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"gemma-convert {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    del version


def _own_fault() -> int:
    from gemma_convert.output import note

    told = "this is an error inside gemma-convert. Please report it with the lines below."
    note(f"{told}\n{traceback.format_exc()}", "error")
    return INTERNAL


def _next_command() -> str:
    names = {command.name for command in app.registered_commands}
    given = [word for word in sys.argv[1:2] if word in names]
    return " ".join(["gemma-convert", *given, "--help"])


def main() -> None:
    """Runs the command line and exits with the documented code."""
    from gemma_convert.output import chatter, note

    atexit.register(gc.freeze)  # else the packages' objects are searched for cycles at the end
    with standard_streams() as failure:
        chatter()
        code = _run()
        lost = failure()
        if lost is not None and not code:
            note(lost.in_shell, "error")
            code = lost.exit_code
    sys.exit(code)


def _run() -> int:  # noqa: PLR0911
    """The exit code of the command, whose error, if any, is told."""
    from gemma_convert.output import note

    try:
        app(prog_name="gemma-convert")
    except GemmaConvertError as error:
        told = error.in_shell
        if isinstance(error, UsageError) and error.do is None:
            told += f"\n  what to do: {_next_command()} lists the options"
        if error.exit_code == INTERNAL:
            told += "\nThis is an error inside gemma-convert. Please report it with your command."
        note(told, "error")
        return exit_code(error)
    except (KeyboardInterrupt, SystemExit) as ending:
        if isinstance(ending, SystemExit) and ending.code != INTERRUPTED:  # typer's word for it
            return ending.code if isinstance(ending.code, int) else bool(ending.code)
        note("interrupted; --resume continues a conversion into a local folder", "error")
        return INTERRUPTED
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "gemma_convert":
            return _own_fault()
        note(
            "A package that this command needs cannot be imported.\n"
            f"  found: {error}\n"
            "  what to do: pip install 'gemma-convert[check]'",
            "error",
        )
        return exit_code(error)
    except OSError as error:
        note(f"{error.strerror or error}\n  where: {shown(error.filename)}", "error")
        return exit_code(error)
    except Exception:  # the last resort: a traceback here is our own fault
        return _own_fault()
    return 0
