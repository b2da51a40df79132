"""`gemma-convert verify`: read a converted checkpoint again and prove it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gemma_convert.cli.options import AsJson, JsonLines, Level, LogLevel, Quiet, Settings

if TYPE_CHECKING:
    from gemma_convert.output import Facts
    from gemma_convert.tasks.verify import VerifyReport

SHOWN = 20


def command(
    path: Annotated[
        str, typer.Argument(metavar="OUT", help="A converted or an exported checkpoint.")
    ],
    against: Annotated[
        str | None,
        typer.Option(
            help="The Hugging Face checkpoint that it was made from, or of an export the native "
            "one; by default the checksums in its manifest."
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="Of an export: the original of a native checkpoint that has no sidecar, so that "
            "files and carried tensors are compared too."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model of an adapter that is given with --against, if it is not where "
            "adapter_config.json says."
        ),
    ] = None,
    settings: Settings = None,
    quiet: Quiet = False,
    log_level: LogLevel = Level.INFO,
    json_lines: JsonLines = False,
    as_json: AsJson = False,
) -> None:
    """Read a converted checkpoint again and compare every value with the source.

    If something differs, the arrays, tensors and files are listed, and the exit code is 1.

    \b
    Examples:
      gemma-convert verify out --against gemma-4-E2B-it
      gemma-convert verify exported --against out
      gemma-convert verify exported --against run/checkpoints --like gemma-4-E2B-it
      gemma-convert verify exported --against gemma-4-E2B-it
    """
    from gemma_convert.cli.allocator import reuse_large_blocks
    from gemma_convert.output import chatter, show, show_json
    from gemma_convert.tasks.verify import verify

    progress = chatter("error" if quiet else log_level.value, json_lines)
    reuse_large_blocks()
    report = verify(
        path,
        against=against,
        like=like,
        base=base,
        settings=settings or (),
        progress=progress,
    )
    if as_json:
        show_json(report.as_json())
    else:
        show(_table(report))
    if not report.passed:
        raise typer.Exit(1)


def _table(report: VerifyReport) -> Facts:
    from gemma_convert.output import Facts, counted, human_bytes

    table = Facts()
    table.add_row("verified" if report.passed else "DIFFERENT", f"{report.path}")
    table.add_row("against", report.against)
    files = f" and {counted(report.files, 'other file')}" if report.files else ""
    tensors = counted(report.checked, "tensor")
    table.add_row("compared", f"{tensors}{files}, {human_bytes(report.bytes)}")
    for sentence in report.notes:
        table.add_row("note", sentence)
    for name, how in list(report.different.items())[:SHOWN]:
        table.add_row(name, how)
    if len(report.different) > SHOWN:
        table.add_row("", f"and {len(report.different) - SHOWN} more")
    table.add_row("time", f"{report.seconds:.1f} s")
    return table
