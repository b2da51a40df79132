"""Prompts with a sound: text before and behind it, and the mel bands of its frames.

Frames come from transformers' own feature extractor, called as `Gemma4Processor` calls it; those
that it makes of padding are dropped, since nothing else sees them. WAV files are read by Python's
`wave` and never resampled.
"""

from __future__ import annotations

import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gemma_convert.errors import SourceError, UsageError, short
from gemma_convert.files.json_file import read_object
from gemma_convert.files.libraries import told_by_library
from gemma_convert.model.architecture import Architecture, AudioArchitecture
from gemma_convert.model.config import MAX_CONFIG_BYTES
from gemma_convert.prompts.soft import (
    PROCESSOR_FILES,
    Medium,
    SoftPrompts,
    SoftSequence,
    load_processor,
    no_tower,
)

SOUND = Medium(
    one="sound",
    many="sounds",
    tower="audio",
    option="--audio",
    processor="audio feature extractor",
    begin="boa_token",
    place="audio_token",
    end="eoa_token",
    before="A recording from the harbour:\n",
    question="\nWhat is heard in it, and how far away? One hears",
)

_LONGEST = 480_000
"""Samples; the feature extractor of transformers 5.23 cuts off in silence what lies beyond."""

_MOST_SOFT_TOKENS = 750
"""What `Gemma4Processor` of transformers 5.23 takes where no `audio_seq_length` is configured."""

_EXTRACTOR = {
    "sampling_rate": (1000, 192_000),
    "frame_length_ms": (1, 100),
    "hop_length_ms": (1, 100),
}
"""Least and most of what the feature extractor may ask for; Gemma 4 has 16000, 20 and 10."""

_WIDTHS = (1, 2, 3, 4)
_CONVERSION = "convert it, for example with: ffmpeg -i IN -ar {rate} -ac 1 -c:a pcm_s16le OUT.wav"


@dataclass(frozen=True, eq=False, kw_only=True)
class SoundSequence(SoftSequence):
    """Token ids of one prompt with one sound; `features` [frames mel] are the sound's log-mels."""

    medium: ClassVar[Medium] = SOUND
    features: npt.NDArray[np.float32]

    @property
    def arguments(self) -> Mapping[str, npt.NDArray[Any]]:
        """The frames, and a mask that leaves none out."""
        return {
            "input_features": self.features,
            "input_features_mask": np.ones(len(self.features), bool),
        }


def sound_sequences(
    hf: Path, architecture: Architecture, files: Sequence[Path], prompts: Sequence[str] = ()
) -> list[SoundSequence]:
    """One sequence for each WAV file with each prompt behind it, or with a built-in question.

    Nothing is fetched from a network, and no code of the checkpoint is run. Raises UsageError where
    the model hears no sounds, or a file or a prompt cannot be used, and SourceError where the
    checkpoint's tokenizer or feature extractor is missing or does not fit its model.
    """
    if architecture.audio is None or architecture.text_only:
        raise no_tower(SOUND, hf)
    _check_extractor(hf, architecture.audio)
    extractor = load_processor(hf, SOUND, "Gemma4AudioFeatureExtractor")
    _check_bands(extractor.feature_size, architecture.audio, hf)
    texts = SoftPrompts(
        hf, architecture, SOUND, _config(hf / "config.json", "audio_token_id"), prompts
    )
    most = _config(hf / "processor_config.json", "audio_seq_length") or _MOST_SOFT_TOKENS
    sequences = []
    for number, path in enumerate(files):
        features = _features(extractor, path, hf)
        soft_tokens = _halved(_halved(len(features)))
        if soft_tokens > most:
            raise _too_long(path, f"at most {most} soft tokens", soft_tokens)
        for text, places in texts.around(f"sound-{number} ({path.name})", soft_tokens):
            sequences.append(
                SoundSequence(text.name, text.ids, text.pieces, places=places, features=features)
            )
    return sequences


def _halved(frames: int) -> int:
    """What a convolution of kernel three, stride two and padding one leaves of frames or bands."""
    return (frames - 1) // 2 + 1


def _config(path: Path, key: str) -> int | None:
    """A whole number in a JSON file, None where there is no file or no key."""
    try:
        value = read_object(path, path.name, MAX_CONFIG_BYTES).get(key)
    except FileNotFoundError:
        return None
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise SourceError(f"{key} is not an integer.", where=path, found=short(value))
    return value


def _check_extractor(hf: Path, audio: AudioArchitecture) -> None:
    """Raises SourceError for sizes of the feature extractor that nothing bears out.

    It makes a table of frequencies by bands as soon as it is made itself.
    """
    for name in PROCESSOR_FILES:
        try:
            values = read_object(hf / name, name, MAX_CONFIG_BYTES)
        except FileNotFoundError:
            continue
        for section in (values, values.get("feature_extractor")):
            if not isinstance(section, dict):
                continue
            for key, (least, most) in _EXTRACTOR.items():
                value = section.get(key, least)
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if not number or not least <= value <= most:
                    raise SourceError(
                        "The audio feature extractor is not that of a Gemma 4.",
                        where=f"{hf / name}, key {key}",
                        expected=f"a number from {least} to {most}",
                        found=short(value),
                        do="use the feature extractor that belongs to this checkpoint",
                    )
            if isinstance(section.get("feature_size"), int):
                _check_bands(section["feature_size"], audio, hf)


def _check_bands(bands: int, audio: AudioArchitecture, hf: Path) -> None:
    if _halved(_halved(bands)) != audio.frequencies:
        raise SourceError(
            "The audio feature extractor does not fit the audio tower.",
            where=hf,
            expected=f"feature_size {4 * audio.frequencies}",
            found=bands,
            do="use the feature extractor that belongs to this checkpoint",
        )


def _features(extractor: Any, path: Path, hf: Path) -> npt.NDArray[np.float32]:
    """The real frames of a file [frames mel]."""
    samples = _samples(path, extractor.sampling_rate)
    with told_by_library(
        "transformers' audio feature extractor cannot make frames of the sound.",
        f"{path}, with the feature extractor of {hf}",
    ):
        found = extractor([samples], return_tensors="np")
        features: npt.NDArray[np.float32] = found["input_features"][0]
        real: npt.NDArray[np.float32] = features[found["input_features_mask"][0]]
    if not len(real):
        raise UsageError(
            "The sound is too short for a single frame.",
            where=path,
            expected=f"more than {extractor.frame_length // 2} samples",
            found=len(samples),
        )
    return real


def _samples(path: Path, rate: int) -> npt.NDArray[np.float32]:
    """The samples of a WAV file from -1 to 1 [samples], its channels averaged."""
    if not path.is_file():
        raise UsageError("The sound does not exist.", where=path, expected="a file")
    try:
        with wave.open(str(path), "rb") as file:
            found = file.getparams()
            _check_readable(path, found, rate)
            data = file.readframes(found.nframes)
    except (wave.Error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            "The file is not a WAV file with PCM samples.",
            where=path,
            found=str(error)[:500] or "the end of the file",
            do=_CONVERSION.format(rate=rate),
        ) from error
    width, channels = found.sampwidth, found.nchannels
    if len(data) != found.nframes * channels * width:
        raise UsageError(
            "The WAV file ends early.",
            where=path,
            expected=f"{found.nframes} samples",
            found=len(data) // (channels * width),
        )
    words = np.zeros((found.nframes * channels, 4), np.uint8)
    words[:, 4 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
    if width == 1:
        words[:, 3] ^= 0x80  # 8 bits alone have no sign
    samples = words.view("<i4").reshape(-1, channels) / 2.0**31
    mono: npt.NDArray[np.float32] = samples.mean(axis=1).astype(np.float32)
    return mono


def _check_readable(path: Path, found: Any, rate: int) -> None:
    if found.framerate != rate:
        raise UsageError(
            "The sound has another sampling rate than the audio tower needs.",
            where=path,
            expected=f"{rate} Hz",
            found=f"{found.framerate} Hz",
            do=_CONVERSION.format(rate=rate),
        )
    if found.sampwidth not in _WIDTHS:
        raise UsageError(
            "The samples of the WAV file are too wide.",
            where=path,
            expected="8, 16, 24 or 32 bits",
            found=f"{8 * found.sampwidth} bits",
            do=_CONVERSION.format(rate=rate),
        )
    if found.nframes > _LONGEST:
        raise _too_long(path, f"at most {_LONGEST} samples", found.nframes)


def _too_long(path: Path, most: str, found: int) -> UsageError:
    return UsageError(
        "The sound is longer than the model's processor takes.",
        where=path,
        expected=most,
        found=found,
        do="give a shorter one",
    )
