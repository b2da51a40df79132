"""`gemma-convert tiny`: a tiny random Gemma 4 checkpoint for demos and tests."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gemma_convert.cli.options import AsJson, KVShared


class Family(StrEnum):
    E2B = "e2b"
    E4B = "e4b"
    UNIFIED = "12b"
    A4B = "26b-a4b"
    DENSE = "31b"


class DType(StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT16 = "float16"


def command(
    family: Annotated[
        Family,
        typer.Argument(
            metavar="MODEL", help="The model to imitate: e2b, e4b, 12b, 26b-a4b or 31b."
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to create.")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    layers: Annotated[
        int | None, typer.Option(help="Number of layers: a multiple of the repeating block.")
    ] = None,
    kv_shared: Annotated[
        KVShared,
        typer.Option(help="Whether the unused K and V weights of KV-shared layers are there."),
    ] = KVShared.KEEP,
    shards: Annotated[int, typer.Option(help="Number of safetensors files.")] = 1,
    text_only: Annotated[
        bool,
        typer.Option(
            "--text-only", help="The language model only, without vision and audio tower."
        ),
    ] = False,
    dtype: Annotated[DType, typer.Option(help="Dtype of the weights.")] = DType.BFLOAT16,
    untied: Annotated[
        bool, typer.Option("--untied", help="With lm_head.weight, not tied to the embedding.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a tiny Hugging Face checkpoint with random weights, towers and tokenizer included.

    \b
    Examples:
      gemma-convert tiny e2b tiny-e2b
      gemma-convert tiny 31b tiny-31b --layers 12 --shards 3
    """
    from gemma_convert.output import counted, human_bytes, show, show_json
    from gemma_convert.tiny import make_tiny

    report = make_tiny(
        family.value,
        target,
        seed=seed,
        layers=layers,
        kv_shared=kv_shared.value,
        shards=shards,
        text_only=text_only,
        dtype=dtype.value,
        untied=untied,
    )
    if as_json:
        show_json(report.as_json())
    else:
        show(
            f"made {report.path}: {report.family}, {counted(report.tensors, 'tensor')}, "
            f"{report.parameters:,} parameters, {human_bytes(report.bytes)}"
        )
