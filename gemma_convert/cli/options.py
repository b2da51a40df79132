"""Options and choices that several commands share."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

import typer

from gemma_convert.errors import UsageError
from gemma_convert.mapping.declared import layout_names

ADAPTERS, RUNNING, INPUTS, TOGETHER = "Adapters", "Running", "Inputs", "Several processes"
STDERR = "Messages"
"""Panels of options in `--help`."""

LAYOUTS = f"[{'|'.join(layout_names())}]"
"""The names of all layouts, as `--help` shows choices."""

LONGEST_SIZE = 24

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class DType(StrEnum):
    KEEP = "keep"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Level(StrEnum):
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


class KVShared(StrEnum):
    KEEP = "keep"
    OMIT = "omit"


FrameworkVersion = Annotated[
    str | None,
    typer.Option(
        "--framework-version",
        help="Version of the framework to convert for, where a layout supports several; by "
        "default its current release.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace the output of an earlier run, once the new output is complete.",
        rich_help_panel=RUNNING,
    ),
]
AcceptDamage = Annotated[
    list[str] | None,
    typer.Option(
        "--accept-damage",
        metavar="NAME",
        help="Continue although this file of SRC differs from its checksum; may be given several "
        "times.",
        rich_help_panel=RUNNING,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--settings",
        metavar="FILE|KEY=VALUE",
        help="The config that the framework used for the native checkpoint: a MaxText config, "
        "gemma.json, or single values; may be given several times. By default the "
        "file in the checkpoint.",
        rich_help_panel=INPUTS,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Continue an interrupted run where it stopped.", rich_help_panel=RUNNING
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Limit of the memory for tensors, such as 256MB; 512MiB by default.",
        rich_help_panel=RUNNING,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Print nothing but results and errors.", rich_help_panel=STDERR
    ),
]
LogLevel = Annotated[
    Level,
    typer.Option(
        "--log-level",
        help="Level of the messages on stderr; progress has the level info.",
        rich_help_panel=STDERR,
    ),
]
JsonLines = Annotated[
    bool,
    typer.Option(
        "--json-lines",
        help="Print progress and messages on stderr as JSON, one object in each line.",
        rich_help_panel=STDERR,
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", help="A prompt of your own; may be given several times.", rich_help_panel=INPUTS
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        help="Use N random tokens (the same in every run) instead of prompts; where N is not more "
        "than the sliding window, a second sequence follows that is longer than it.",
        min=1,
        rich_help_panel=INPUTS,
    ),
]


def parse_size(option: str, text: str | None) -> int | None:
    """Bytes that `5GB` (decimal) or `5GiB` (binary) means, None for None.

    Raises UsageError, naming the option, for other text.
    """
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None or len(text) > LONGEST_SIZE:
        raise UsageError(f"{option} takes a size.", expected="a size such as 5GB", found=text)
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** _POWERS[match[2].lower()])


Coordinator = Annotated[
    str | None,
    typer.Option(
        help="HOST:PORT of process 0, for a run with several processes.",
        rich_help_panel=TOGETHER,
    ),
]
ProcessCount = Annotated[
    int | None,
    typer.Option("--processes", help="Number of processes.", rich_help_panel=TOGETHER),
]
ProcessNumber = Annotated[
    int | None,
    typer.Option(
        "--process",
        help="Index of this process; process 0 prints the report.",
        rich_help_panel=TOGETHER,
    ),
]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="Take the other processes from the environment, as JAX does (TPU pods, SLURM).",
        rich_help_panel=TOGETHER,
    ),
]
