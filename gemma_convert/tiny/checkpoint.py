"""Writes a tiny checkpoint: config, weights, tokenizer and processor files, all or nothing.

The weight files equal what the safetensors library writes byte for byte:
https://huggingface.co/docs/safetensors, section Format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from gemma_convert.api.arguments import public
from gemma_convert.engine.staging import StagedFolder
from gemma_convert.engine.target import check_target
from gemma_convert.errors import TargetError, UsageError
from gemma_convert.mapping.inventory import huggingface_tensors
from gemma_convert.model.architecture import Family
from gemma_convert.model.config import parse_architecture
from gemma_convert.stores.safetensors.header import write_safetensors
from gemma_convert.tiny import tokenizer
from gemma_convert.tiny.config import ConfigSpelling, DType, config_json, generation_config_json
from gemma_convert.tiny.kinds import Weights, weights_of
from gemma_convert.tiny.sizes import POOLING, SIZES, EmbedderSizes, FamilySizes
from gemma_convert.tiny.weights import Array

KVShared = Literal["keep", "omit"]


@dataclass(frozen=True)
class TinyReport:
    """What was made: tensors, the numbers in them, and their bytes without the files' headers."""

    family: Family
    path: Path
    tensors: int
    parameters: int
    bytes: int

    def as_json(self) -> dict[str, object]:
        """The report for `--json`."""
        return {"schema": "gemma-convert/tiny/1", **asdict(self), "path": str(self.path)}


@public
def make_tiny(
    family: Family,
    out: str | Path,
    *,
    seed: int = 0,
    layers: int | None = None,
    kv_shared: KVShared = "keep",
    shards: int = 1,
    text_only: bool = False,
    dtype: DType = "bfloat16",
    config_spelling: ConfigSpelling = "published",
    untied: bool = False,
    weights: Weights = "random",
) -> TinyReport:
    """Writes a tiny checkpoint with the structure of `family` into `out` and returns a report.

    The same arguments always give the same bytes. `layers` counts decoder layers; with `kv_shared`
    "keep" KV-shared layers have keys and values, as in published files; `save_pretrained` omits
    them. An `untied` one has an `lm_head.weight` of its own, which no published model has.
    `weights` may be "random" (so that every mistake shows), "trained" (with the statistics of a
    trained model) or "wild" (they amplify rounding). Raises UsageError for arguments that no
    checkpoint can have, TargetError where `out` exists or cannot be written.
    """
    out = Path(out)
    _check_choice("family", family, get_args(Family))
    _check_choice("kv_shared", kv_shared, get_args(KVShared))
    _check_choice("dtype", dtype, get_args(DType))
    _check_choice("config_spelling", config_spelling, get_args(ConfigSpelling))
    _check_choice("weights", weights, get_args(Weights))
    _check_count("seed", seed, 0, None)
    config = config_json(family, layers, text_only, dtype, config_spelling, tied=not untied)
    architecture = parse_architecture(config, out / "config.json")
    shapes = huggingface_tensors(architecture, kv_leftovers=kv_shared == "keep")
    _check_count("shards", shards, 1, len(shapes))
    check_target(out, overwrite=False)
    tensors = weights_of(weights, dict(sorted(shapes.items())), seed, dtype)
    documents = _documents(family, text_only) | {"config.json": config}
    _write_folder(out, documents, _split(tensors, shards))
    return TinyReport(
        family=family,
        path=out,
        tensors=len(tensors),
        parameters=sum(array.size for array in tensors.values()),
        bytes=sum(array.nbytes for array in tensors.values()),
    )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(
            f"A tiny checkpoint cannot be made with this {name}.",
            expected=", ".join(choices),
            found=value,
        )


def _check_count(name: str, value: int, least: int, most: int | None) -> None:
    if value < least or (most is not None and value > most):
        raise UsageError(
            f"A tiny checkpoint cannot be made with this number: {name}.",
            expected=f"{least} or more" if most is None else f"{least} to {most}",
            found=value,
        )


def _documents(family: Family, text_only: bool) -> dict[str, dict[str, object]]:
    """The JSON files beside config.json, by name; those of a processor only with towers."""
    sizes = SIZES[family]
    model = "Gemma4Unified" if sizes.unified else "Gemma4"
    documents = {
        "generation_config.json": generation_config_json(),
        "tokenizer.json": tokenizer.tokenizer_json(sizes.vocab),
        "tokenizer_config.json": tokenizer.tokenizer_config_json(model, text_only),
        "special_tokens_map.json": tokenizer.special_tokens_map_json(),
    }
    if text_only:
        return documents
    patch_size = sizes.vision.patch_size
    extractor, milliseconds = _sounds(sizes)
    return documents | {
        "preprocessor_config.json": tokenizer.image_processor_json(model, patch_size, POOLING),
        "processor_config.json": tokenizer.processor_json(
            model, patch_size, POOLING, extractor, milliseconds
        ),
    }


def _sounds(sizes: FamilySizes) -> tuple[dict[str, object], int]:
    """What becomes of a sound: keys of the feature extractor, and milliseconds of a soft token."""
    if isinstance(sizes.vision, EmbedderSizes):
        frame = sizes.vision.frame
        extractor: dict[str, object] = {"audio_samples_per_token": frame, "feature_size": frame}
        return extractor, 1000 * frame // tokenizer.SAMPLING_RATE
    return {"feature_size": 128 if sizes.audio is None else sizes.audio.channels[0]}, 40


def _split(tensors: Mapping[str, Array], shards: int) -> Iterator[dict[str, Array]]:
    """The tensors in order, in `shards` parts of about equal bytes, none of them empty."""
    total = sum(array.nbytes for array in tensors.values())
    part: dict[str, Array] = {}
    written, done = 0, 0
    for number, (name, array) in enumerate(tensors.items()):
        part[name] = array
        written += array.nbytes
        left = len(tensors) - number - 1
        full = written * shards >= total * (done + 1) or left < shards - done
        if full and done < shards - 1:
            yield part
            part, done = {}, done + 1
    yield part


def _write_folder(
    out: Path, documents: Mapping[str, object], parts: Iterator[dict[str, Array]]
) -> None:
    """Writes all files into the folder `out`, which appears when it is complete."""
    try:
        with StagedFolder(out) as staged:
            for name, document in documents.items():
                _write_json(staged.folder / name, document)
            template = staged.folder / "chat_template.jinja"
            template.write_text(tokenizer.CHAT_TEMPLATE, encoding="utf-8")
            _write_weights(staged.folder, list(parts))
            staged.publish()
    except OSError as error:
        raise TargetError(
            "The checkpoint cannot be written.", where=out, found=error.strerror
        ) from None


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(folder: Path, parts: list[dict[str, Array]]) -> None:
    """The weight files: one, or several with an index."""
    if len(parts) == 1:
        write_safetensors(folder / "model.safetensors", parts[0])
        return
    files = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        write_safetensors(folder / file, part)
    index = {
        "metadata": {"total_size": sum(a.nbytes for part in parts for a in part.values())},
        "weight_map": {name: f for f, part in zip(files, parts, strict=True) for name in part},
    }
    _write_json(folder / "model.safetensors.index.json", index)
