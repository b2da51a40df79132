"""`gemma-convert compare-reports`: two reports of logit-check, before and after a change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma_convert.cli.options import AsJson


def command(
    before: Annotated[
        Path, typer.Argument(metavar="OLD", help="What `logit-check --json` printed before.")
    ],
    after: Annotated[
        Path, typer.Argument(metavar="NEW", help="What `logit-check --json` printed after.")
    ],
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the comparison as one HTML page."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing --report file.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two reports of logit-check, such as before and after a change of the model's code.

    The exit code is 1 if a figure is beyond its limit and larger than before, or if a part fails
    that did not fail before. Figures within their limits are shown, but do not count.

    \b
    Example:
      gemma-convert compare-reports before.json after.json --report changes.html
    """
    from datetime import UTC, datetime

    from gemma_convert.logits.comparison import compare_reports
    from gemma_convert.logits.comparison_page import comparison_page
    from gemma_convert.logits.comparison_table import render
    from gemma_convert.logits.report_file import check_report_file, write_report_file
    from gemma_convert.output import show, show_json

    if report is not None:
        check_report_file(report, overwrite=overwrite)
    found = compare_reports(before, after)
    if as_json:
        show_json(found.as_json())
    else:
        show(render(found))
    if report is not None:
        page = comparison_page(found, datetime.now(UTC))
        write_report_file(report, page, overwrite=overwrite)
    if not found.passed:
        raise typer.Exit(1)
