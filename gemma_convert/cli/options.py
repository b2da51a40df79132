"""Options and choices that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class DType(StrEnum):
    KEEP = "keep"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class KVShared(StrEnum):
    KEEP = "keep"
    OMIT = "omit"


AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there, once the new one is complete.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted run where it stopped.")
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="A prompt of your own; may be given several times."),
]
Tokens = Annotated[
    int | None, typer.Option(help="Use N fixed random tokens instead of prompts.", min=1)
]
