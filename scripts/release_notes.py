#!/usr/bin/env python3
"""Prints what CHANGELOG.md says of a version, and refuses a tag that is not that of this version.

scripts/release_notes.py v1.0.0
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def notes(tag: str) -> str:
    """The section of the version that `tag` names; ValueError where they do not belong together."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if tag != f"v{project['version']}":
        raise ValueError(f"The tag is {tag}, and pyproject.toml says {project['version']}.")
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        if heading.split()[0] == project["version"]:
            return body.strip() + "\n"
    raise ValueError(f"CHANGELOG.md has no section for {project['version']}.")


if __name__ == "__main__":
    try:
        print(notes(sys.argv[1]), end="")
    except (IndexError, ValueError) as error:
        sys.exit(f"{error}")
