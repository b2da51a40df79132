"""The command line: `gemma-convert COMMAND`; a command is one file that parses, calls, prints."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from gemma_convert.cli import flops, golden, inspect, logit_check, tiny, to_hf, to_native, verify
from gemma_convert.errors import GemmaConvertError, SourceError
from gemma_convert.version import __version__

INTERNAL, INTERRUPTED = 70, 130

app = typer.Typer(
    name="gemma-convert",
    help="Convert Gemma 4 checkpoints between Hugging Face and native training layouts, and prove "
    "that nothing changed.",
    epilog="Exit codes: 0 done, 1 a check failed, 2 usage, 3 bad source, 4 target problem, "
    "70 a fault of gemma-convert, 130 interrupted.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("to-native")(to_native.command)
app.command("to-hf")(to_hf.command)
app.command("verify")(verify.command)
app.command("inspect")(inspect.command)
app.command("logit-check")(logit_check.command)
app.command("golden")(golden.command)
app.command("flops")(flops.command)
app.command("tiny")(tiny.command)


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


def main() -> None:
    """Runs the command line and exits with the documented code."""
    from gemma_convert.output import note

    try:
        app()
    except GemmaConvertError as error:
        note(f"error: {error.message}")
        if error.exit_code == INTERNAL:
            note("This is a fault of gemma-convert. Please report it with the command you ran.")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as ending:
        if isinstance(ending, SystemExit) and ending.code != INTERRUPTED:  # typer's word for it
            raise
        note("interrupted; the same command with --resume continues a conversion")
        sys.exit(INTERRUPTED)
    except ImportError as error:
        note(
            f"error: {error}\n"
            "  what to do: this command needs more packages: pip install 'gemma-convert[check]'"
        )
        sys.exit(2)
    except OSError as error:
        note(f"error: {error.strerror or error}\n  where: {error.filename}")
        sys.exit(SourceError.exit_code)
    except Exception:  # the last resort: a traceback here is our own fault
        note(traceback.format_exc())
        note("This is a fault of gemma-convert. Please report it with the lines above.")
        sys.exit(INTERNAL)
