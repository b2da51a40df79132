"""Does a native checkpoint compute what the original does? Both are run and their logits compared.

The native side is run by its layout, which knows no mapping table there. The reference is
transformers on the original checkpoint, or golden logits saved from it.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gemma_convert.api.arguments import public
from gemma_convert.engine.joined import is_leader, process_count, publish, published
from gemma_convert.errors import SourceError, UsageError
from gemma_convert.files.given_settings import GivenSettings, given_settings
from gemma_convert.files.libraries import told_by_library
from gemma_convert.files.read_once import reading_once
from gemma_convert.forward.kept_programs import kept_programs
from gemma_convert.forward.native_model import ComparedModel, Dtype, NativeModel
from gemma_convert.logits.achieved import forward_flops
from gemma_convert.logits.fingerprint import fingerprints
from gemma_convert.logits.golden import Golden
from gemma_convert.logits.inputs import Inputs, towers_not_run
from gemma_convert.logits.limit import Limit, choose_limit, find_lossy_rows, recorded_lossy_rows
from gemma_convert.logits.opened import Opened, opened
from gemma_convert.logits.report import LogitReport
from gemma_convert.logits.running import Run, run_streamed, run_whole, slice_rows
from gemma_convert.logits.sides import AdapterOptions, Sides, sides_of
from gemma_convert.logits.streaming import compared_slices
from gemma_convert.logits.tokens import checked_sequences, worst_predictions
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import read_architecture
from gemma_convert.progress import Listener, ended
from gemma_convert.prompts.text import TokenSequence, has_tokenizer, load_tokenizer
from gemma_convert.stores.remote.locations import local
from gemma_convert.tasks.reports import peak_memory


@public
def logit_check(
    hf: str | Path,
    native: str | Path,
    *,
    base: str | Path | None = None,
    native_base: str | Path | None = None,
    alpha: float | None = None,
    max_kl: float | None = None,
    prompts: Sequence[str] = (),
    tokens: int | None = None,
    images: Sequence[str | Path] = (),
    audio: Sequence[str | Path] = (),
    dtype: Dtype = "float32",
    golden: str | Path | None = None,
    lossy_rows: Sequence[str] | None = None,
    whole_model: bool = False,
    settings: Sequence[str] = (),
    cache: bool = True,
    progress: Listener | None = None,
) -> LogitReport:
    """Compares the logits of the checkpoint `native`, of any layout, with those of `hf`.

    `native` may be a Hugging Face checkpoint too, such as the export of another converter: then
    transformers runs both, in float32, and the parts of layers are not compared one by one. With
    `images` or `audio` (WAV files) the vision or audio tower is run too, and the logits of the text
    around them are compared. With `golden`, `hf` needs only config.json, and the tokens are those
    of the golden file. `lossy_rows` names what the conversion rounded; by default it is read from
    the checkpoint. `max_kl` is in nats per token. Both models run layer by layer, unless
    `whole_model` loads them completely; then single layers are not compared. The native model runs
    with the config of its framework: `settings` (files, or KEY=VALUE), by default the file in the
    checkpoint, or else the framework's own config of that model. `progress` is called with a
    `ProgressEvent` for each layer and each slice of the logits. `cache` keeps what JAX compiles for
    the next run, in the folder `gemma-convert/compiled` of the user's cache (`XDG_CACHE_HOME`). In
    a run of several processes, which `logit-check --coordinator` starts, only process 0 runs the
    reference; the others return its report without single tokens.

    `hf` may be an adapter of PEFT, whose base model is `base`, by default the one in its config.
    `native` is then the same adapter in a native layout, which runs on the native checkpoint
    `native_base` with its own `alpha` unless one is given, or a model that it was merged into. Both
    may be `owner/name` on the hub. Raises SourceError where one of them cannot be read or the two
    do not fit, UsageError for options that contradict each other.
    """
    files = [Path(image) for image in images], [Path(sound) for sound in audio]
    inputs = Inputs(prompts, tokens, *files, None if golden is None else Path(golden))
    with ExitStack() as stack, reading_once():
        sides = sides_of(
            local(hf, stack, config_only=golden is not None, whole=True),
            local(native, stack, whole=True),
            AdapterOptions(base, native_base, alpha),
            stack,
        )
        if golden is not None and sides.adapter is not None:
            raise UsageError("Golden logits are those of a model.", do="leave out --golden")
        stack.enter_context(kept_programs(cache))
        options = _Options(dtype, max_kl, lossy_rows, whole_model, given_settings(settings))
        return _check(sides, inputs, options, stack.enter_context(ended(progress)))


@dataclass(frozen=True)
class _Options:
    dtype: Dtype
    max_kl: float | None
    lossy_rows: Sequence[str] | None
    whole_model: bool
    settings: GivenSettings


@dataclass(frozen=True)
class _Prepared:
    """A check whose models have not run yet; `golden` takes the reference's place if there."""

    sides: Sides
    inputs: Inputs
    options: _Options
    architecture: Architecture
    side: Opened
    lossy_rows: tuple[str, ...]
    sequences: list[TokenSequence]
    golden: Golden | None


def _check(
    sides: Sides, inputs: Inputs, options: _Options, progress: Listener | None
) -> LogitReport:
    """The report on two local checkpoints; of several processes it is that of process 0."""
    started = time.monotonic()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks on one device
    check = _prepare(sides, inputs, options)
    limit = choose_limit(options.max_kl, options.dtype, check.lossy_rows)
    if not is_leader() and check.side.native is not None:
        _follow(check.side.native, check)
        return LogitReport.from_text(published())
    running = time.monotonic()
    found = _run(check, progress)
    if options.max_kl is None:
        limit = limit.above(found.noise_floor)
    now = time.monotonic()
    report = _report(check, found, limit, running_seconds=now - running, seconds=now - started)
    publish(report.without_tokens().as_text())
    return report


def _prepare(sides: Sides, inputs: Inputs, options: _Options) -> _Prepared:
    architecture = read_architecture(sides.hf)
    inputs.check_sizes(sides.hf, architecture)
    side = opened(sides, architecture, options.settings)
    model = side.model
    lossy_rows = options.lossy_rows
    if lossy_rows is None:
        lossy_rows = find_lossy_rows(model.folder, model.dtypes, model.scaled_dtype, architecture)
        lossy_rows += recorded_lossy_rows(sides.native_adapter) or ()
    sequences, golden = inputs.sequences(sides.hf, architecture, model)
    rows = tuple(lossy_rows)
    return _Prepared(sides, inputs, options, architecture, side, rows, sequences, golden)


def _run(check: _Prepared, progress: Listener | None) -> Run:
    sides, golden, side, sequences = check.sides, check.golden, check.side, check.sequences
    dtype, architecture = check.options.dtype, check.architecture
    if check.options.whole_model:
        return run_whole(sides, golden, side.model, sequences, dtype, architecture, progress)
    exact = not check.lossy_rows
    return run_streamed(sides, golden, side, sequences, dtype, architecture, exact, progress)


def _follow(native: NativeModel, check: _Prepared) -> None:
    """Runs this process's part of the native model."""
    text, options = check.architecture.text, check.options
    rows = slice_rows(text.vocab)
    vocab = compared_slices(check.sequences, vocab=text.vocab, embed=text.embed)
    native.follow(check.sequences, options.dtype, options.whole_model, rows=rows, vocab=vocab)


def _report(
    check: _Prepared, found: Run, limit: Limit, *, running_seconds: float, seconds: float
) -> LogitReport:
    sides, side, golden, sequences = check.sides, check.side, check.golden, check.sequences
    architecture, options = check.architecture, check.options
    longest, window = max(len(one.ids) for one in sequences), architecture.text.window
    divergence, by_token = found.compared.result(), found.compared.tokens()
    checked = checked_sequences(sequences, by_token)
    passed = limit.allows(divergence) and (found.local is None or found.local.passed)
    warnings = *limit.warnings, *side.warnings, *_window_warning(longest, window), *found.known
    if not passed:
        warnings = *warnings, *_rounding_warning(side.model, architecture)
    adapters = sides.adapter, sides.native_adapter
    return LogitReport(
        passed=passed,
        proof=limit.proof,
        limit=limit.kl,
        limit_p99=limit.kl_p99,
        limit_reason=limit.reason,
        divergence=divergence,
        drift=found.drift,
        local=found.local,
        noise_floor=found.noise_floor,
        sequences=len(sequences),
        longest_sequence=longest,
        sliding_window=window,
        images=len(check.inputs.images),
        sounds=len(check.inputs.audio),
        towers_not_run=towers_not_run(side.model, sequences),
        layout=side.model.layout,
        dtype=options.dtype,
        reference="transformers" if golden is None else f"golden logits {golden.path.name}",
        reference_device=found.reference_device,
        native_device=found.native_device,
        whole_model=options.whole_model,
        peak_memory_bytes=peak_memory(),
        versions=_versions(golden, side.model),
        seconds=seconds,
        running_seconds=running_seconds,
        lossy_rows=check.lossy_rows,
        warnings=warnings,
        flops=forward_flops(architecture, sequences) * (1 if golden else 2),
        native_devices=side.model.device_count,
        processes=process_count(),
        original=sides.names[0],
        checkpoint=sides.names[1],
        checked=checked,
        worst=worst_predictions(checked, by_token, lambda ids: _texts(sides.hf, ids)),
        fingerprints=fingerprints(sides.hf, side.model.folder, *adapters),
    )


def _texts(hf: Path, ids: Sequence[int]) -> dict[int, str]:
    """Each id's text; nothing where the folder has no tokenizer, which golden logits do without."""
    try:
        tokenizer = load_tokenizer(hf) if has_tokenizer(hf) else None
    except SourceError:
        return {}
    if tokenizer is None:
        return {}
    with told_by_library("The tokenizer has no text for a token.", hf):
        return {id: tokenizer.decode([id]) for id in ids}


def _window_warning(longest: int, window: int) -> tuple[str, ...]:
    if longest > window:
        return ()
    return (
        f"No sequence is longer than the sliding window ({longest} of {window} tokens), so a wrong "
        "window cannot be found.",
    )


def _rounding_warning(model: ComparedModel, architecture: Architecture) -> tuple[str, ...]:
    """Of a checkpoint that training has written wider than the Hugging Face one is."""
    trained = recorded_lossy_rows(model.folder) is None
    if not trained or model.dtypes != {"float32"} or architecture.dtype != "bfloat16":
        return ()
    return (
        "All native arrays are float32, and the Hugging Face checkpoint is bfloat16. If it was "
        "exported from them after training, its values were rounded: check it with --dtype "
        "bfloat16, or export with --dtype float32.",
    )


def _versions(golden: Golden | None, model: ComparedModel) -> dict[str, str]:
    names = {"gemma-convert", "numpy", *model.libraries}
    found = {"python": platform.python_version()}
    found |= {} if golden is None else golden.versions
    for name in sorted(names if golden is not None else names | {"transformers", "torch"}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
