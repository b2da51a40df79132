"""Prompts with an image: text before and behind it, and the patches of its pixels.

Pixels come from transformers' own image processor, always the one that runs on Pillow: that with
torchvision resizes a little differently, and a check should not depend on what is installed.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gemma_convert.errors import SourceError, UsageError
from gemma_convert.files.libraries import told_by_library
from gemma_convert.model.architecture import Architecture, VisionArchitecture, VisionEmbedder
from gemma_convert.prompts.soft import Medium, SoftPrompts, SoftSequence, load_processor, no_tower

IMAGE = Medium(
    one="image",
    many="images",
    tower="vision",
    option="--image",
    processor="image processor",
    begin="boi_token",
    place="image_token",
    end="eoi_token",
    before="A picture from the harbour:\n",
    question="\nWhat does it show, and which colours stand out? It shows",
)


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageSequence(SoftSequence):
    """Token ids of one prompt with one image, and the image.

    `pixels` [patches patch] are the flattened patches in rows, `positions` [patches 2] the column
    and row of each, and -1 for patches that only fill up. Where there is an embedder in the place
    of a tower, patches are the squares that it takes.
    """

    medium: ClassVar[Medium] = IMAGE
    pixels: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int64]

    @property
    def arguments(self) -> Mapping[str, npt.NDArray[Any]]:
        """Patches and their positions, and which tokens are the image's."""
        return {
            "pixel_values": self.pixels,
            "image_position_ids": self.positions,
            "mm_token_type_ids": self.places,
        }


def image_sequences(
    hf: Path, architecture: Architecture, images: Sequence[Path], prompts: Sequence[str] = ()
) -> list[ImageSequence]:
    """One sequence for each image file with each prompt behind it, or with a built-in question.

    Nothing is fetched from a network, and no code of the checkpoint is run. Raises UsageError where
    the model sees no images, or a file or a prompt cannot be used, and SourceError where the
    checkpoint's tokenizer or processor is missing or does not fit its model.
    """
    sight = architecture.sight
    if sight is None or architecture.text_only:
        raise no_tower(IMAGE, hf)
    _require_pillow()
    processor = load_processor(hf, IMAGE, "Gemma4ImageProcessorPil")
    _check_fits(processor, sight, hf)
    texts = SoftPrompts(hf, architecture, IMAGE, architecture.image_token, prompts)
    sequences = []
    for number, path in enumerate(images):
        patches = _patches(processor, path, hf)
        if isinstance(sight, VisionEmbedder):
            patches = _squares(patches, sight.pooling)
        _check_positions(patches, sight, hf)
        for text, places in texts.around(f"image-{number} ({path.name})", patches.soft_tokens):
            sequences.append(
                ImageSequence(
                    text.name,
                    text.ids,
                    text.pieces,
                    places=places,
                    pixels=patches.pixels,
                    positions=patches.positions,
                )
            )
    return sequences


def _require_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise UsageError(
            "Images need Pillow, which is not installed.", do="pip install 'gemma-convert[check]'"
        ) from None


@dataclass(frozen=True)
class _Patches:
    pixels: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int64]
    soft_tokens: int


def _patches(processor: Any, path: Path, hf: Path) -> _Patches:
    image = _open(path)
    with told_by_library(
        "transformers' image processor cannot cut the image into patches.",
        f"{path}, with the processor of {hf}",
    ):
        found = processor(image, return_tensors="np")
        return _Patches(
            pixels=found["pixel_values"][0],
            positions=found["image_position_ids"][0],
            soft_tokens=int(found["num_soft_tokens_per_image"][0]),
        )


def _squares(patches: _Patches, side: int) -> _Patches:
    """Squares of `side` × `side` patches as patches, row by row, padding behind them.

    As `Gemma4UnifiedImageProcessor` has them, which itself cannot be made without torchvision.
    """
    count, real = len(patches.pixels) // side**2, patches.soft_tokens * side**2
    columns, rows = patches.positions[:real].max(axis=0) // side + 1
    size = round((patches.pixels.shape[1] / 3) ** 0.5)
    image = patches.pixels[:real].reshape(rows, side, columns, side, size, size, 3)
    pixels = np.zeros((count, side**2 * patches.pixels.shape[1]), np.float32)
    pixels[: rows * columns] = image.transpose(0, 2, 1, 4, 3, 5, 6).reshape(rows * columns, -1)
    positions = np.full((count, 2), -1, np.int64)
    row, column = np.divmod(np.arange(rows * columns), columns)
    positions[: rows * columns] = np.stack([column, row], axis=1)
    return _Patches(pixels, positions, patches.soft_tokens)


def _open(path: Path) -> Any:
    """The image as transformers opens a file: turned as its EXIF says, in RGB without alpha."""
    import PIL.Image
    from transformers.image_utils import load_image

    if not path.is_file():
        raise UsageError("The image does not exist.", where=path, expected="a file")
    try:
        with PIL.Image.open(path) as image:
            return load_image(image)
    except PIL.Image.DecompressionBombError as error:
        raise UsageError(
            "The image has more pixels than Pillow accepts.",
            where=path,
            found=error,
            do="give a smaller one",
        ) from None
    except (OSError, ValueError, SyntaxError, RuntimeError, EOFError) as error:
        raise UsageError(
            "Pillow cannot read this file as an image.", where=path, found=str(error)[:500]
        ) from error


def _check_fits(processor: Any, vision: VisionArchitecture | VisionEmbedder, hf: Path) -> None:
    """Raises SourceError for other sizes than the tower's, which might ask for any memory."""
    expected = {"patch_size": vision.patch_size, "pooling_kernel_size": vision.pooling}
    for key, size in expected.items():
        found = getattr(processor, key)
        if found != size:
            raise _unfit(hf, f"{key} {size}", f"{key} {reprlib.repr(found)}")


def _check_positions(
    patches: _Patches, vision: VisionArchitecture | VisionEmbedder, hf: Path
) -> None:
    width, highest = patches.pixels.shape[-1], int(patches.positions.max(initial=-1))
    if width != vision.patch or not 0 <= highest < vision.positions:
        raise _unfit(
            hf,
            f"patches of {vision.patch} values at positions below {vision.positions}",
            f"{width} values, positions to {highest}",
        )


def _unfit(hf: Path, expected: str, found: str) -> SourceError:
    return SourceError(
        "The image processor does not fit the vision tower.",
        where=hf,
        expected=expected,
        found=found,
        do="use the processor that belongs to this checkpoint",
    )
