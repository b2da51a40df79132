"""Commands run in the process of the tests, as the script runs them."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from gemma_convert.cli.app import main


def said(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    output, errors = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["gemma-convert", *map(str, arguments)]
    try:
        with redirect_stdout(output), redirect_stderr(errors), pytest.raises(SystemExit) as end:
            main()
    finally:
        sys.argv = before
    return int(end.value.code or 0), output.getvalue(), errors.getvalue()
