"""`gemma-convert golden`: save the reference logits, for machines that cannot hold both models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma_convert.cli.options import (
    AsJson,
    JsonLines,
    Level,
    LogLevel,
    Prompts,
    Quiet,
    Tokens,
)


def command(
    hf: Annotated[
        str,
        typer.Argument(
            metavar="HF", help="The Hugging Face checkpoint: a folder, or owner/name on the hub."
        ),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The safetensors file to create.")],
    prompt: Prompts = None,
    tokens: Tokens = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing golden file.")
    ] = False,
    quiet: Quiet = False,
    log_level: LogLevel = Level.INFO,
    json_lines: JsonLines = False,
    as_json: AsJson = False,
) -> None:
    """Save the float32 logits of transformers, for `logit-check --golden`.

    \b
    Example:
      gemma-convert golden gemma-4-E2B-it e2b-golden.safetensors
    """
    from gemma_convert.cli.allocator import return_large_blocks
    from gemma_convert.cli.threads import let_threads_sleep
    from gemma_convert.logits.golden_writing import save_golden
    from gemma_convert.output import chatter, counted, show, show_json

    progress = chatter("error" if quiet else log_level.value, json_lines)
    return_large_blocks()
    let_threads_sleep()
    golden = save_golden(
        hf,
        file,
        prompts=tuple(prompt or ()),
        tokens=tokens,
        overwrite=overwrite,
        progress=progress,
    )
    count = sum(len(sequence.ids) for sequence in golden.sequences)
    if as_json:
        show_json(
            {
                "schema": "gemma-convert/golden/1",
                "path": str(golden.path),
                "sequences": len(golden.sequences),
                "tokens": count,
            }
        )
    else:
        sequences = counted(len(golden.sequences), "sequence")
        show(f"saved {golden.path}: logits of {counted(count, 'token')} in {sequences}")
