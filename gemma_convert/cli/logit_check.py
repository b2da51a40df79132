"""`gemma-convert logit-check`: does a native checkpoint compute what the original does?"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gemma_convert.cli.options import (
    ADAPTERS,
    INPUTS,
    RUNNING,
    AsJson,
    Coordinator,
    Distributed,
    JsonLines,
    Level,
    LogLevel,
    ProcessCount,
    ProcessNumber,
    Prompts,
    Quiet,
    Settings,
    Tokens,
)


class DType(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def command(
    hf: Annotated[
        str,
        typer.Argument(
            metavar="HF", help="The Hugging Face checkpoint: a folder, or owner/name on the hub."
        ),
    ],
    native: Annotated[
        str,
        typer.Argument(
            metavar="NATIVE",
            help="The native checkpoint to check, or another Hugging Face checkpoint.",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="If HF is an adapter of PEFT: its base model, if not where its config says.",
            rich_help_panel=ADAPTERS,
        ),
    ] = None,
    native_base: Annotated[
        str | None,
        typer.Option(
            help="If NATIVE is a native adapter: the conversion of its base model.",
            rich_help_panel=ADAPTERS,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="If NATIVE is a native adapter: its alpha, if its metadata does not have it.",
            rich_help_panel=ADAPTERS,
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Largest KL divergence that a token may have, in nats; by default 1e-5, or 0.03 "
            "where values are rounded."
        ),
    ] = None,
    prompt: Prompts = None,
    tokens: Tokens = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="An image for the vision tower of both models; may be given several times.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    audio: Annotated[
        list[Path] | None,
        typer.Option(
            help="A WAV file for the audio tower of both models; may be given several times.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    dtype: Annotated[
        DType, typer.Option(help="Dtype in which NATIVE runs; the reference runs in float32.")
    ] = DType.FLOAT32,
    golden: Annotated[
        Path | None,
        typer.Option(
            help="Reference logits saved by `gemma-convert golden`.", rich_help_panel=INPUTS
        ),
    ] = None,
    whole_model: Annotated[
        bool,
        typer.Option(
            "--whole-model",
            help="Load both models completely instead of layer by layer.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache",
            help="Do not use JAX's compilation cache, which by default is "
            "~/.cache/gemma-convert/compiled.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the report, with every token, as one HTML page.",
            rich_help_panel="Reports",
        ),
    ] = None,
    junit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write JUnit XML, with one test case for each sequence.",
            rich_help_panel="Reports",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace an existing --report or --junit file.",
            rich_help_panel="Reports",
        ),
    ] = False,
    settings: Settings = None,
    coordinator: Coordinator = None,
    processes: ProcessCount = None,
    process: ProcessNumber = None,
    distributed: Distributed = False,
    quiet: Quiet = False,
    log_level: LogLevel = Level.INFO,
    json_lines: JsonLines = False,
    as_json: AsJson = False,
) -> None:
    """Run both models on the same tokens and compare the distributions that they predict.

    The exit code is 0 if the worst token is within the limit, and 1 if it is not, or if its KL is
    NaN. A model that runs in JAX is sharded over all local devices, and with --coordinator over
    those of several hosts: run the same command on each of them.

    \b
    Examples:
      gemma-convert logit-check gemma-4-31B-it out --image cat.png
      gemma-convert logit-check gemma-4-E2B-it out --golden e2b-golden.safetensors
      gemma-convert logit-check gemma-4-E2B-it run/checkpoints/1000 --settings out/maxtext.yml
    """
    from gemma_convert.cli.allocator import return_large_blocks
    from gemma_convert.cli.threads import let_threads_sleep
    from gemma_convert.engine.joined import is_leader, joined
    from gemma_convert.logits.check import logit_check
    from gemma_convert.logits.report_file import ReportFiles
    from gemma_convert.logits.report_table import render
    from gemma_convert.output import chatter, show, show_json

    progress = chatter("error" if quiet else log_level.value, json_lines)
    return_large_blocks()
    let_threads_sleep()
    files = ReportFiles(html=report, junit=junit, overwrite=overwrite)
    with joined(coordinator, processes, process, distributed, devices=True):
        leads = is_leader()
        if leads:
            files.check()
        found = logit_check(
            hf,
            native,
            base=base,
            native_base=native_base,
            alpha=alpha,
            max_kl=max_kl,
            prompts=tuple(prompt or ()),
            tokens=tokens,
            images=tuple(image or ()),
            audio=tuple(audio or ()),
            dtype=dtype.value,
            golden=golden,
            whole_model=whole_model,
            settings=settings or (),
            cache=not no_cache,
            progress=progress if leads else None,
        )
        if as_json and leads:
            show_json(found.as_json())
        elif leads:
            show(render(found))
    if leads:
        files.write(found)
    if not found.passed:
        raise typer.Exit(1)
