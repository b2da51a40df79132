"""`gemma-convert flops`: how much a step multiplies, and how well it was done."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_convert.cli.options import AsJson
from gemma_convert.errors import UsageError

LONGEST = 1 << 40
"""More than any sequence, batch or number of devices."""

SOUND_TOKENS = 750
"""Soft tokens of the longest sound, of 30 s."""


class Mode(StrEnum):
    TRAIN = "train"
    PREFILL = "prefill"
    DECODE = "decode"


class Attention(StrEnum):
    EXACT = "exact"
    CUSTOMARY = "customary"
    DENSE = "dense"


class Recomputation(StrEnum):
    NONE = "none"
    FULL = "full"


class Part(StrEnum):
    TEXT = "text"
    VISION = "vision"
    VISION_PROJECTOR = "vision-projector"
    AUDIO = "audio"
    AUDIO_PROJECTOR = "audio-projector"


class WeightDType(StrEnum):
    BF16 = "bf16"
    FP32 = "fp32"


class DType(StrEnum):
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"
    INT8 = "int8"
    TF32 = "tf32"
    FP32 = "fp32"


def command(
    path: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG_OR_PATH",
            help="A config.json, a Hugging Face checkpoint, a converted one, or a published model "
            "(e2b, e4b, 12b, 26b-a4b, 31b).",
        ),
    ],
    seq_len: Annotated[
        int | None,
        typer.Option(
            min=1, max=LONGEST, help="Tokens of a sequence; with --mode decode, of its KV cache."
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="Several sequence lengths: prints a CSV, a line for each."
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, max=LONGEST, help="Sequences of a step, over all devices.")
    ] = 1,
    mode: Annotated[
        Mode, typer.Option(help="A training step, a forward pass, or one new token.")
    ] = Mode.TRAIN,
    attention: Annotated[
        Attention,
        typer.Option(help="Pairs that the mask allows, MaxText's formulas, or all pairs."),
    ] = Attention.EXACT,
    images: Annotated[
        int,
        typer.Option(min=0, help="Images in each sequence.", rich_help_panel="Images and sounds"),
    ] = 0,
    image_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Soft tokens of an image; by default as in config.json.",
            rich_help_panel="Images and sounds",
        ),
    ] = None,
    bidirectional_images: Annotated[
        bool | None,
        typer.Option(
            "--bidirectional-images/--causal-images",
            help="Whether tokens of an image attend to each other; by default as in config.json.",
            rich_help_panel="Images and sounds",
        ),
    ] = None,
    sounds: Annotated[
        int,
        typer.Option(min=0, help="Sounds in each sequence.", rich_help_panel="Images and sounds"),
    ] = 0,
    sound_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Soft tokens of a sound, 25 for each second; 750 by default.",
            rich_help_panel="Images and sounds",
        ),
    ] = None,
    freeze: Annotated[
        list[Part] | None,
        typer.Option(
            help="A part that is not trained; may be given several times.",
            rich_help_panel="Training",
        ),
    ] = None,
    recompute: Annotated[
        Recomputation,
        typer.Option(
            help="Whether layers are run again in the backward pass.", rich_help_panel="Training"
        ),
    ] = Recomputation.NONE,
    weight_dtype: Annotated[
        WeightDType,
        typer.Option(
            help="Dtype of weights and gradients, for their bytes; Adam keeps master weights in "
            "fp32 beside bf16.",
            rich_help_panel="Training",
        ),
    ] = WeightDType.BF16,
    last_logits: Annotated[
        bool,
        typer.Option(
            "--last-logits", help="With --mode prefill: logits of the last position only."
        ),
    ] = False,
    step_time: Annotated[
        float | None,
        typer.Option(
            help="Measured time of a step in seconds, for the achieved TFLOP/s.",
            rich_help_panel="Measured",
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="The hardware of the step, such as H100 or TPU-v5p, for MFU and HFU.",
            rich_help_panel="Measured",
        ),
    ] = None,
    peak: Annotated[
        float | None,
        typer.Option(
            metavar="TFLOPS",
            help="Peak rate of one device, for hardware that is not in the list.",
            rich_help_panel="Measured",
        ),
    ] = None,
    devices: Annotated[
        int,
        typer.Option(min=1, max=LONGEST, help="GPUs or TPU chips that share the step evenly."),
    ] = 1,
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Which peak rate to compare with; bf16 by default.", rich_help_panel="Measured"
        ),
    ] = None,
    sparse: Annotated[
        bool,
        typer.Option(
            "--sparse",
            help="Compare with the peak of 2:4 sparse matrices.",
            rich_help_panel="Measured",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Count the FLOPs of a step by component, exactly, and estimate its bytes, from config.json.

    A multiply-add is two FLOPs. MFU and HFU need --step-time and --hardware or --peak.

    \b
    Examples:
      gemma-convert flops gemma-4-31B-it --seq-len 8192 --batch 64
      gemma-convert flops config.json --seq-len 8192 --step-time 4.2 --hardware H100 --devices 64
      gemma-convert flops config.json --sweep 1024,4096,16384 --batch 8
    """
    from gemma_convert.flops.count import check_towers, count
    from gemma_convert.flops.measured import measured, needs
    from gemma_convert.flops.memory import memory
    from gemma_convert.flops.report import FlopsReport, render
    from gemma_convert.flops.source import read_model
    from gemma_convert.flops.sweep import csv_table
    from gemma_convert.flops.workload import STEPS
    from gemma_convert.output import show, show_json
    from gemma_convert.published import published_config

    lengths = _lengths(seq_len, sweep, as_json, step_time)
    _check_mode(mode, freeze, recompute, last_logits, images + sounds)
    if not images and (image_tokens is not None or bidirectional_images is not None):
        raise needs("--image-tokens, --bidirectional-images or --causal-images", "--images")
    if not sounds and sound_tokens is not None:
        raise needs("--sound-tokens", "--sounds")
    time = measured(step_time, hardware, peak, None if dtype is None else dtype.value, sparse)
    published = None if Path(path).exists() else published_config(path)
    model = read_model(published or path)
    check_towers(model, images, sounds)
    if bidirectional_images is None:
        bidirectional_images = model.bidirectional_images
    options: dict[str, Any] = {
        "rule": attention.value,
        "images": images,
        "image_tokens": (image_tokens or model.image_tokens) if images else 0,
        "sounds": sounds,
        "sound_tokens": (sound_tokens or SOUND_TOKENS) if sounds else 0,
        "bidirectional_images": bidirectional_images and images > 0,
        "frozen": frozenset(part.value for part in freeze or ()),
        "recomputation": recompute.value,
        **({"logits": 1} if last_logits else {}),
    }
    reports = []
    for length in lengths:
        found = count(model, replace(STEPS[mode.value](batch, length), **options))
        held = memory(found, weight_dtype.value)
        reports.append(time.added_to(FlopsReport(path, found, held, devices)))
    if sweep is not None:
        show(csv_table(reports))
    elif as_json:
        show_json(reports[0].as_json())
    else:
        show(render(reports[0]))


def _lengths(
    seq_len: int | None, sweep: str | None, as_json: bool, step_time: float | None
) -> list[int]:
    if (seq_len is None) == (sweep is None):
        raise UsageError(
            "A step has one length of sequences, a sweep has several.",
            expected="--seq-len or --sweep",
            found="both" if sweep is not None else "neither",
        )
    if seq_len is not None:
        return [seq_len]
    if as_json or step_time is not None:
        raise UsageError("--sweep prints a CSV of counts.", do="leave out --json and --step-time")
    words = str(sweep).split(",")
    lengths = [int(word) if word.strip().isdecimal() and len(word) < 16 else 0 for word in words]
    if not all(1 <= one <= LONGEST for one in lengths):
        raise UsageError(
            "--sweep is a list of lengths.", expected="such as 1024,4096", found=str(sweep)[:200]
        )
    return lengths


def _check_mode(
    mode: Mode,
    freeze: list[Part] | None,
    recompute: Recomputation,
    last_logits: bool,
    media: int,
) -> None:
    from gemma_convert.flops.measured import needs

    if mode is not Mode.TRAIN and (freeze or recompute is not Recomputation.NONE):
        raise needs("--freeze and --recompute", "--mode train")
    if mode is not Mode.PREFILL and last_logits:
        raise needs("--last-logits", "--mode prefill")
    if mode is Mode.DECODE and media:
        raise needs("--images and --sounds", "--mode train or --mode prefill")
