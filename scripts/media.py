"""A picture and a sound, of noise, for checks of the towers."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np


def write_picture(path: Path) -> None:
    """Writes 64 by 48 random pixels; needs Pillow."""
    from PIL import Image

    pixels = np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_sound(path: Path) -> None:
    """Writes one second of noise as a WAV file of 16 kHz."""
    samples = np.random.default_rng(2).integers(-9999, 9999, 16000, np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.tobytes())
