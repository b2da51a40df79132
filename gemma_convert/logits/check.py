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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gemma_convert.engine.joined import is_leader, process_count, publish, published
from gemma_convert.errors import SourceError, UsageError
from gemma_convert.files.given_settings import GivenSettings, given_settings
from gemma_convert.files.libraries import told_by_library
from gemma_convert.files.read_once import reading_once
from gemma_convert.forward.kept_programs import kept_programs
from gemma_convert.forward.native_model import (
    ComparedModel,
    Dtype,
    check_towers,
)
from gemma_convert.logits.achieved import forward_flops
from gemma_convert.logits.fingerprint import fingerprints
from gemma_convert.logits.golden import Golden, load_golden
from gemma_convert.logits.limit import choose_limit, find_lossy_rows, recorded_lossy_rows
from gemma_convert.logits.opened import opened
from gemma_convert.logits.reference import reference_config
from gemma_convert.logits.report import LogitReport
from gemma_convert.logits.running import run_streamed, run_whole, slice_rows
from gemma_convert.logits.sides import AdapterOptions, Sides, sides_of
from gemma_convert.logits.sizes import check_sizes
from gemma_convert.logits.streaming import (
    compared_slices,
)
from gemma_convert.logits.tokens import checked_sequences, worst_predictions
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import read_architecture
from gemma_convert.output import note
from gemma_convert.progress import Listener, ended
from gemma_convert.prompts.images import image_sequences
from gemma_convert.prompts.sounds import sound_sequences
from gemma_convert.prompts.text import (
    check_ids,
    has_tokenizer,
    load_tokenizer,
    token_sequences,
)
from gemma_convert.stores.remote.locations import local
from gemma_convert.tasks.reports import peak_memory


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
    around them are compared. With `golden`, `hf` need only have config.json, and the tokens are
    those of the golden file. `lossy_rows` names what the conversion rounded; by default it is found
    out. `max_kl` is in nats per token. Both models run layer by layer, unless `whole_model` loads
    them completely; then single layers are not compared. The native model runs with the config of
    its framework: `settings` (files, or KEY=VALUE), by default the file in the checkpoint, or else
    the framework's own config of that model. `progress` hears of each layer and of each slice of
    the logits (`gemma_convert.progress`). `cache` keeps what JAX compiles for the next run
    (`gemma_convert.forward.kept_programs`). With several processes (`gemma_convert.engine.joined`)
    all get the report of process 0, which alone runs the reference, without single tokens.
    `hf` may be an adapter of PEFT, whose base model is `base`, by default the one in its config.
    `native` is then the same adapter in a native layout, which runs on the native checkpoint
    `native_base` with its own `alpha` unless one is given, or a model that it was merged into.
    Both may be on the hub (`gemma_convert.stores.remote.locations`). Raises SourceError where one
    of them cannot be read or the two do not fit, UsageError for options that contradict each other.
    """
    with ExitStack() as stack, reading_once():
        sides = sides_of(
            local(hf, stack, config_only=golden is not None, whole=True),
            local(native, stack, whole=True),
            AdapterOptions(base, native_base, alpha),
            stack,
        )
        return _logit_check(
            stack,
            sides,
            max_kl=max_kl,
            prompts=prompts,
            tokens=tokens,
            images=[Path(image) for image in images],
            audio=[Path(sound) for sound in audio],
            dtype=dtype,
            golden=None if golden is None else Path(golden),
            lossy_rows=lossy_rows,
            whole_model=whole_model,
            settings=given_settings(settings),
            cache=cache,
            progress=stack.enter_context(ended(progress)),
        )


def _logit_check(
    stack: ExitStack,
    sides: Sides,
    *,
    max_kl: float | None,
    prompts: Sequence[str],
    tokens: int | None,
    images: Sequence[Path],
    audio: Sequence[Path],
    dtype: Dtype,
    golden: Path | None,
    lossy_rows: Sequence[str] | None,
    whole_model: bool,
    settings: GivenSettings,
    cache: bool,
    progress: Listener | None,
) -> LogitReport:
    """The report on two local checkpoints."""
    started, hf = time.monotonic(), sides.hf
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks on one device
    if golden is not None and (prompts or tokens is not None or images or audio):
        raise UsageError(
            "The tokens to compare come from the golden file.",
            do="leave out prompts, --tokens, --image and --audio",
        )
    if golden is not None and sides.adapter is not None:
        raise UsageError("Golden logits are those of a model.", do="leave out --golden")
    architecture = read_architecture(hf)
    if golden is None:
        check_sizes(hf, architecture)
    side = opened(sides, architecture, settings)
    model = side.model
    stack.enter_context(kept_programs(cache))
    if is_leader():
        for warning in side.warnings:
            note(warning, "warning")
    if lossy_rows is None:
        lossy_rows = find_lossy_rows(model.folder, model.dtypes, model.scaled_dtype, architecture)
        lossy_rows += recorded_lossy_rows(sides.native_adapter) or ()
    limit = choose_limit(max_kl, dtype, lossy_rows)
    stored = None if golden is None else _matching_golden(golden, hf, architecture)
    if stored is None:
        reference_config(hf, architecture)  # before the tokenizer, which would be blamed for it
        sequences = token_sequences(hf, architecture, prompts, tokens)
        sequences += image_sequences(hf, architecture, images) if images else []
        sequences += sound_sequences(hf, architecture, audio) if audio else []
        check_towers(model, sequences)
    else:
        sequences = list(stored.sequences)
    if not is_leader() and side.native is not None:
        text = architecture.text
        rows = slice_rows(text.vocab)
        vocab = compared_slices(sequences, vocab=text.vocab, embed=text.embed)
        side.native.follow(sequences, dtype, whole_model, rows=rows, vocab=vocab)
        return LogitReport.from_text(published())
    running = time.monotonic()
    if whole_model:
        found = run_whole(sides, stored, model, sequences, dtype, architecture, progress)
    else:
        exact = not lossy_rows
        found = run_streamed(sides, stored, side, sequences, dtype, architecture, exact, progress)
    longest, window = max(len(one.ids) for one in sequences), architecture.text.window
    divergence, by_token = found.compared.result(), found.compared.tokens()
    if max_kl is None:
        limit = limit.above(found.noise_floor)
    checked = checked_sequences(sequences, by_token)
    report = LogitReport(
        passed=limit.allows(divergence) and (found.local is None or found.local.passed),
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
        images=len(images),
        sounds=len(audio),
        layout=model.layout,
        dtype=dtype,
        reference="transformers" if stored is None else f"golden logits {stored.path.name}",
        reference_device=found.reference_device,
        native_device=found.native_device,
        whole_model=whole_model,
        peak_memory_bytes=peak_memory(),
        versions=_versions(stored, model),
        seconds=time.monotonic() - started,
        lossy_rows=tuple(lossy_rows),
        warnings=(
            *limit.warnings,
            *side.warnings,
            *_window_warning(longest, window),
            *found.known,
        ),
        flops=forward_flops(architecture, sequences) * (1 if stored else 2),
        running_seconds=time.monotonic() - running,
        native_devices=model.device_count,
        processes=process_count(),
        original=sides.names[0],
        checkpoint=sides.names[1],
        checked=checked,
        worst=worst_predictions(checked, by_token, lambda ids: _texts(hf, ids)),
        fingerprints=fingerprints(hf, model.folder, sides.adapter, sides.native_adapter),
    )
    publish(report.without_tokens().as_text())
    return report


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


def _matching_golden(path: Path, hf: Path, architecture: Architecture) -> Golden:
    golden = load_golden(path)
    golden.check_belongs(hf)
    if golden.vocab != architecture.text.vocab:
        raise SourceError(
            "The golden logits are for another vocabulary.",
            where=path,
            expected=architecture.text.vocab,
            found=golden.vocab,
        )
    for sequence in golden.sequences:
        check_ids(sequence, architecture, path)
    return golden


def _window_warning(longest: int, window: int) -> tuple[str, ...]:
    if longest > window:
        return ()
    return (
        f"No sequence is longer than the sliding window ({longest} of {window} tokens), so a wrong "
        "window cannot be found.",
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
