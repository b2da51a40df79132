"""`gemma-convert flops`: how much a step multiplies, and how well it was done."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_convert.cli.options import AsJson
from gemma_convert.errors import UsageError

if TYPE_CHECKING:
    from gemma_convert.flops.hardware import Hardware
    from gemma_convert.flops.report import FlopsReport
    from gemma_convert.flops.workload import Workload

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
            help="A config.json, a Hugging Face checkpoint, or a converted one.",
        ),
    ],
    seq_len: Annotated[
        int,
        typer.Option(
            min=1, max=1 << 40, help="Tokens of a sequence; in decoding, of its KV cache."
        ),
    ],
    batch: Annotated[
        int, typer.Option(min=1, max=1 << 40, help="Sequences of a step, over all devices.")
    ] = 1,
    mode: Annotated[
        Mode, typer.Option(help="A training step, a forward pass, or one new token.")
    ] = Mode.TRAIN,
    attention: Annotated[
        Attention,
        typer.Option(help="Pairs that the mask lets through, MaxText's formulas, or all pairs."),
    ] = Attention.EXACT,
    images: Annotated[
        int,
        typer.Option(min=0, help="Images in each sequence.", rich_help_panel="Images and sounds"),
    ] = 0,
    image_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Soft tokens of an image; config.json's by default.",
            rich_help_panel="Images and sounds",
        ),
    ] = None,
    bidirectional_images: Annotated[
        bool | None,
        typer.Option(
            "--bidirectional-images/--causal-images",
            help="Whether tokens of an image see each other; as config.json says by default.",
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
            help="Soft tokens of a sound, 25 a second; 750 by default.",
            rich_help_panel="Images and sounds",
        ),
    ] = None,
    freeze: Annotated[
        list[Part] | None,
        typer.Option(
            help="A part that is not trained; several times for more.", rich_help_panel="Training"
        ),
    ] = None,
    recompute: Annotated[
        Recomputation,
        typer.Option(
            help="Whether layers are run again in the backward pass.", rich_help_panel="Training"
        ),
    ] = Recomputation.NONE,
    last_logits: Annotated[
        bool, typer.Option("--last-logits", help="Prefill: logits of the last position alone.")
    ] = False,
    step_time: Annotated[
        float | None,
        typer.Option(
            help="Measured seconds of a step, for achieved TFLOP/s.", rich_help_panel="Measured"
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="What it ran on, such as H100 or TPU-v5p, for MFU and HFU.",
            rich_help_panel="Measured",
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1 << 40,
            help="GPUs or TPU chips that it ran on; 1 by default.",
            rich_help_panel="Measured",
        ),
    ] = None,
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
    """Count the FLOPs of a step by component, exactly, from config.json alone.

    A multiply-add is two FLOPs. With --step-time and --hardware it also says MFU and HFU.

    \b
    Examples:
      gemma-convert flops gemma-4-31B-it --seq-len 8192 --batch 64
      gemma-convert flops config.json --seq-len 8192 --step-time 4.2 --hardware H100 --devices 64
    """
    from gemma_convert.flops.count import count
    from gemma_convert.flops.report import FlopsReport, render
    from gemma_convert.flops.source import read_model
    from gemma_convert.output import show, show_json

    _check_mode(mode, freeze, recompute, last_logits, images + sounds)
    if not images and (image_tokens is not None or bidirectional_images is not None):
        raise _needs("--image-tokens, --bidirectional-images or --causal-images", "--images")
    if not sounds and sound_tokens is not None:
        raise _needs("--sound-tokens", "--sounds")
    device = _device(hardware, step_time, devices, dtype, sparse)
    model = read_model(path)
    if bidirectional_images is None:
        bidirectional_images = model.bidirectional_images
    work = replace(
        _step(mode, batch, seq_len),
        rule=attention.value,
        images=images,
        image_tokens=(image_tokens or model.image_tokens) if images else 0,
        sounds=sounds,
        sound_tokens=(sound_tokens or SOUND_TOKENS) if sounds else 0,
        bidirectional_images=bidirectional_images and images > 0,
        frozen=frozenset(part.value for part in freeze or ()),
        recomputation=recompute.value,
    )
    found = count(model, replace(work, logits=1) if last_logits else work)
    report = FlopsReport(path, found)
    if step_time is not None:
        report = _measured(report, device, step_time, devices or 1, dtype or DType.BF16, sparse)
    if as_json:
        show_json(report.as_json())
    else:
        show(render(report))


def _step(mode: Mode, batch: int, seq_len: int) -> Workload:
    from gemma_convert.flops import workload

    steps = {
        Mode.TRAIN: workload.train,
        Mode.PREFILL: workload.prefill,
        Mode.DECODE: workload.decode,
    }
    return steps[mode](batch, seq_len)


def _check_mode(
    mode: Mode,
    freeze: list[Part] | None,
    recompute: Recomputation,
    last_logits: bool,
    media: int,
) -> None:
    if mode is not Mode.TRAIN and (freeze or recompute is not Recomputation.NONE):
        raise _needs("--freeze and --recompute", "--mode train")
    if mode is not Mode.PREFILL and last_logits:
        raise _needs("--last-logits", "--mode prefill")
    if mode is Mode.DECODE and media:
        raise _needs("--images and --sounds", "--mode train or --mode prefill")


def _device(
    name: str | None,
    step_time: float | None,
    devices: int | None,
    dtype: DType | None,
    sparse: bool,
) -> Hardware | None:
    """The named hardware; UsageError where an option has no use without another."""
    from gemma_convert.flops.hardware import find_hardware

    if step_time is None and (name is not None or devices is not None):
        raise _needs("--hardware and --devices", "--step-time")
    if name is None and (dtype is not None or sparse):
        raise _needs("--dtype and --sparse", "--hardware")
    return None if name is None else find_hardware(name)


def _measured(
    report: FlopsReport,
    device: Hardware | None,
    seconds: float,
    devices: int,
    dtype: DType,
    sparse: bool,
) -> FlopsReport:
    from gemma_convert.flops.hardware import Utilization

    peak = None if device is None else device.peak(dtype.value, sparse)
    used = Utilization(seconds, devices, report.count.total, report.count.hardware, peak)
    if device is None:
        return replace(report, utilization=used)
    return replace(report, utilization=used, hardware=device, dtype=dtype.value, sparse=sparse)


def _needs(options: str, other: str) -> UsageError:
    return UsageError(f"{options} belong to {other}.", do=f"add {other}, or leave them out")
