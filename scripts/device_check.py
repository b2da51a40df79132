#!/usr/bin/env python3
"""Conversions and logit checks of every model in every layout, on the accelerator of this machine.

    scripts/device_check.sh [FOLDER] [--seconds 460] [--only TEXT]...

Runs tiny checkpoints of all models, then one of E2B's widths, 5 GB. Where there is no accelerator,
few tiny ones and 0.5 GB, unless others are chosen. Goes on after a failure;
device_check_report.py has what is printed and written.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from device_check_report import FAILED, LATE, PASSED, UNAVAILABLE, Finding, Report, versions
from media import write_picture, write_sound
from real_widths import slice_config, small_config, write_checkpoint

import gemma_convert
from gemma_convert import GemmaConvertError

FORMS = {
    "e2b": ("maxtext", "gemma-jax"),
    "e4b": ("maxtext", "gemma-jax"),
    "12b": ("maxtext", "maxtext scanned", "gemma-jax", "fast-llm"),
    "26b-a4b": ("maxtext", "maxtext scanned", "gemma-jax", "fast-llm"),
    "31b": ("maxtext", "maxtext scanned", "gemma-jax", "fast-llm"),
}
"""Model → the layouts that have a place for it."""

SENSES = {
    ("e2b", "gemma-jax"): ("image", "sound"),
    ("e4b", "gemma-jax"): ("image", "sound"),
    ("26b-a4b", "maxtext"): ("image",),
    ("26b-a4b", "maxtext scanned"): ("image",),
    ("26b-a4b", "gemma-jax"): ("image",),
    ("31b", "maxtext"): ("image",),
    ("31b", "maxtext scanned"): ("image",),
    ("31b", "gemma-jax"): ("image",),
}
"""What a model sees and hears in a layout that has its towers."""

LAYERS = {"e2b": 10, "e4b": 12, "12b": 12, "26b-a4b": 12, "31b": 12}
"""The fewest layers that have every kind, and two blocks where they can be scanned."""

FEW = ("tiny 31b maxtext scanned", "tiny 31b fast-llm", "real e2b")
"""What is run without an accelerator where nothing is chosen: below a minute on two cores."""

TINY_SECONDS, REAL_SECONDS = 20, 45
"""What a step is given at least: with less time left it is not begun."""

SMALL_ROWS = 1 << 12


class UnavailableError(Exception):
    """What a check needs is not on this machine; that is no failure."""


@dataclass(frozen=True)
class Step:
    """One thing that passes or fails; `go` gives its finding. Steps of one name go together."""

    name: str
    model: str
    layout: str
    dtype: str
    what: str
    least_seconds: int
    go: Callable[[], Finding]


def tiny_steps(work: Path) -> list[Step]:
    """Text, images and sounds of the tiny model of each kind, in each layout."""
    return [
        Step(
            name=f"tiny {model} {form}",
            model=model,
            layout=form,
            dtype="float32",
            what=sense,
            least_seconds=TINY_SECONDS,
            go=partial(check_tiny, work, model, form, sense),
        )
        for model, forms in FORMS.items()
        for form in forms
        for sense in ("text", *SENSES.get((model, form), ()))
    ]


def check_tiny(work: Path, model: str, form: str, sense: str) -> Finding:
    """The check of one sense of a tiny model, made and converted where it is the first one."""
    if model == "12b":
        require_unified()
    source = work / f"tiny-{model}"
    if not source.exists():
        gemma_convert.make_tiny(model, source, layers=LAYERS[model])
    native = convert(source, work / f"tiny-{model}-{form.replace(' ', '-')}", form)
    return check(source, native, "float32", sense, work)


def require_unified() -> None:
    """Nothing where transformers has the classes of 12B. Raises UnavailableError else."""
    import transformers

    if not hasattr(transformers, "Gemma4UnifiedForConditionalGeneration"):
        raise UnavailableError(f"transformers {transformers.__version__} has no gemma4_unified")


def convert(source: Path, native: Path, form: str, ignore: Sequence[str] = ()) -> Path:
    """The folder of the conversion, made where it is not there yet; `ignore` are facts."""
    layout, _, scanned = form.partition(" ")
    if not native.exists():
        gemma_convert.to_native(
            source, native, layout=layout, scan_layers=bool(scanned), ignore_facts=ignore
        )
    return native


def check(source: Path, native: Path, dtype: str, sense: str, work: Path) -> Finding:
    """What logit-check finds, and the largest KL of the sequences that are of this sense."""
    images, sounds = [], []
    if sense == "image":
        if find_spec("PIL") is None:
            raise UnavailableError("Pillow is not installed")
        images.append(work / "noise.png")
        write_picture(images[0])
    if sense == "sound":
        sounds.append(work / "noise.wav")
        write_sound(sounds[0])
    report = gemma_convert.logit_check(source, native, dtype=dtype, images=images, audio=sounds)
    mark = f"{sense}-0 "
    kl = [one.kl_max for one in report.checked if sense == "text" or one.name.startswith(mark)]
    sides = dict.fromkeys((report.reference_device, report.native_device))
    return Finding(
        state=PASSED if report.passed else FAILED,
        verdict=report.verdict,
        kl_max=float(np.max(kl)),
        device=" / ".join(sides),
    )


def real_steps(work: Path, small: bool) -> list[Step]:
    """A checkpoint of E2B's widths: converted, verified, and checked in both dtypes."""
    source, native, form = work / "real", work / "real-native", "maxtext"
    works: list[tuple[str, str, Callable[[], Finding]]] = [
        ("conversion", "bfloat16", partial(convert_real, source, native, form, small)),
        ("verification", "bfloat16", partial(verify_real, source, native)),
        ("text", "bfloat16", partial(check, source, native, "bfloat16", "text", work)),
        ("text", "float32", partial(check, source, native, "float32", "text", work)),
    ]
    return [
        Step(f"real e2b {form}", "e2b, real widths", form, dtype, what, REAL_SECONDS, go)
        for what, dtype, go in works
    ]


def convert_real(source: Path, native: Path, form: str, small: bool) -> Finding:
    config = small_config(SMALL_ROWS) if small else slice_config("e2b", 0)
    size = write_checkpoint(source, config, "trained")
    started = time.monotonic()
    ignored = ["text_config.layer_types"] if small else []  # four layers are no whole pattern
    convert(source, native, form, ignored)
    verdict = f"{size / 1e9:.1f} GB in {time.monotonic() - started:.1f} s"
    return Finding(state=PASSED, verdict=verdict)


def verify_real(source: Path, native: Path) -> Finding:
    report = gemma_convert.verify(native, against=source)
    if report.passed:
        return Finding(state=PASSED, verdict=f"{report.checked} tensors are the same")
    name, how = next(iter(report.different.items()))
    return Finding(state=FAILED, verdict=f"{len(report.different)} differ: {name}: {how}")


def run(step: Step) -> Finding:
    """The finding of one step, whatever it raises."""
    try:
        return step.go()
    except UnavailableError as reason:
        return Finding(state=UNAVAILABLE, verdict=f"not run: {reason}")
    except GemmaConvertError as error:
        message = " ".join(error.message.split())
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}".splitlines()[0]
    return Finding(state=FAILED, verdict=f"failed: {message}")


def devices() -> tuple[Finding, bool]:
    """Whether JAX and PyTorch run on the accelerator there is, and whether there is any."""
    import jax
    import torch

    platform, cuda = jax.default_backend(), torch.cuda.is_available()
    names = [str(jax.devices()[0].device_kind)]
    names += [torch.cuda.get_device_name()] if cuda else ["cpu"]
    apart = cuda != (platform == "gpu")
    verdict = f"JAX on {platform}, PyTorch on {'cuda' if cuda else 'cpu'}"
    finding = Finding(
        state=FAILED if apart else PASSED,
        verdict=f"failed: {verdict}" if apart else verdict,
        device=" / ".join(dict.fromkeys(names)),
    )
    return finding, cuda or platform != "cpu"


def main() -> None:
    arguments = _arguments()
    deadline = time.monotonic() + arguments.seconds
    report = Report(arguments.folder / "device-check.json", versions())
    with tempfile.TemporaryDirectory() as folder:
        try:
            found, accelerated = devices()
        except Exception as error:
            found = Finding(FAILED, f"failed: {type(error).__name__}: {error}".splitlines()[0])
            accelerated = False
        report.add(Step("devices", "", "", "", "devices", 0, lambda: found), found, 0.0)
        steps = [*tiny_steps(Path(folder)), *real_steps(Path(folder), small=not accelerated)]
        only = arguments.only or ([""] if accelerated else FEW)
        chosen = [step for step in steps if any(text in step.name for text in only)]
        if not chosen:
            sys.exit(f"no check has such a name: {', '.join(only)}")
        for step in chosen:
            started = time.monotonic()
            if deadline - started < step.least_seconds:
                found = Finding(state=LATE, verdict="not run: no time left")
            else:
                found = run(step)
            report.add(step, found, time.monotonic() - started)
    report.show()
    sys.exit(0 if report.passed else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = os.environ.get("OUT")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(out) if out else None)
    parser.add_argument("--seconds", type=float, default=460, help="no check is begun after these")
    parser.add_argument("--only", action="append", help='names that hold this: "tiny 31b"')
    arguments = parser.parse_args()
    if arguments.folder is None:
        parser.error("name a folder for device-check.json, or set OUT")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    return arguments


if __name__ == "__main__":
    main()
