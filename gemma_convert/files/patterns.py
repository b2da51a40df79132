"""Regular expressions that a checkpoint's files hold: tried aside, since some take for ever."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from gemma_convert.errors import SourceError, short

SECONDS = 10
"""Longer is taken for a pattern that has no end."""

_PROGRAM = """
import json, re, sys
pattern, how, names = json.load(sys.stdin)
try:
    compiled = re.compile(pattern)
except Exception as error:
    print(json.dumps(str(error)))
else:
    found = (getattr(compiled, how)(name) for name in names)
    print(json.dumps([None if one is None else one.groups() for one in found]))
"""


def groups(
    pattern: str, how: Literal["match", "fullmatch"], names: Sequence[str], where: str | Path
) -> list[list[str | None] | None]:
    """The groups that a pattern finds in each name, None where it does not match.

    Raises SourceError, with `where`, for a pattern that is none or takes longer than `SECONDS`.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([pattern, how, list(names)]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
        found = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError):
        found = f"it gave no result within {SECONDS} s"
    if isinstance(found, str):
        raise SourceError(
            "A regular expression cannot be used.",
            where=where,
            expected="one that Python's re matches in no time",
            found=f"{short(pattern)}: {found}",
        )
    matched: list[list[str | None] | None] = found
    return matched
