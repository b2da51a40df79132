"""The logits of the original checkpoint, computed by transformers' own Gemma 4 in float32.

Keys that transformers would fill with random numbers in silence are an error here. Source of the
head: `Gemma4ForCausalLM.forward` in `transformers/models/gemma4/modeling_gemma4.py` (5.23); what
the model is given beside the tokens of an image or a sound: `Gemma4Processor` in
`processing_gemma4.py`.
"""

from __future__ import annotations

import gc
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gemma_convert.errors import SourceError
from gemma_convert.files.libraries import told_by_library
from gemma_convert.files.read_once import once
from gemma_convert.logits.changes import Changes
from gemma_convert.logits.tensor_files import renaming
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import read_architecture
from gemma_convert.model.transformers_folder import handed
from gemma_convert.prompts.images import ImageSequence
from gemma_convert.prompts.soft import SoftSequence
from gemma_convert.prompts.text import TokenSequence
from gemma_convert.stores.safetensors.reader import SafetensorsFolder

if TYPE_CHECKING:
    import torch

_LISTED = 8
_OWN_CONFIG = "use the config.json that belongs to these weights"
_SHARED_LAYER_KEY = re.compile(r"\.?layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")
_IGNORABLE_KEY = re.compile(r"\.(embed_scale|.*inv_freq)$|^lm_head\.weight$")


class Reference:
    """transformers' model of one Hugging Face checkpoint, whole, in float32."""

    def __init__(self, hf: Path, changes: Changes | None = None) -> None:
        """Raises SourceError where the checkpoint does not fill the model exactly.

        `changes` are those of an adapter of it.
        """
        self._hf, self.architecture = hf, read_architecture(hf)
        self.device = reference_device()
        with quiet():
            self._model, report = _load(hf, self.architecture)
        check_loaded(report, self.architecture, hf)
        if changes is not None:
            _change(self._model, changes)
        self._model = self._model.to(self.device).eval()

    @property
    def device_name(self) -> str:
        """Name of the device that the model runs on."""
        return name_device(self.device)

    def hidden(self, sequence: TokenSequence) -> torch.Tensor:
        """What the head is given, [positions embed], on the model's device."""
        import torch

        with torch.no_grad(), cannot_run(self._hf):
            output = self._model.model(**arguments(sequence, self.device), use_cache=False)
        state: torch.Tensor = output.last_hidden_state[0]
        return state

    def image_features(self, sequence: ImageSequence) -> npt.NDArray[np.float32]:
        """What stands in the places of the image in the embedding, [soft_tokens embed]."""
        import torch

        inputs = arguments(sequence, self.device)
        with torch.no_grad(), cannot_run(self._hf):
            output = self._model.model.get_image_features(
                inputs["pixel_values"], inputs["image_position_ids"], return_dict=True
            )
        array: npt.NDArray[np.float32] = output.pooler_output[0].cpu().numpy()
        return array

    def audio_features(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The same for the mel bands of one sound, [frames mel_bands], without padding."""
        import torch

        sound = torch.from_numpy(features)[None].to(self.device)
        heard = torch.ones(sound.shape[:2], dtype=torch.bool, device=self.device)
        with torch.no_grad(), cannot_run(self._hf):
            output = self._model.model.get_audio_features(sound, heard, return_dict=True)
        array: npt.NDArray[np.float32] = output.pooler_output[output.attention_mask].cpu().numpy()
        return array

    def head(self, hidden: torch.Tensor) -> npt.NDArray[np.float32]:
        """Logits [positions vocab] of hidden states [positions embed], soft-capped."""
        import torch

        with torch.no_grad():
            logits = softcapped(self._model.lm_head(hidden), self.architecture)
        array: npt.NDArray[np.float32] = logits.cpu().numpy()
        return array

    def drop_layers(self) -> None:
        """Frees everything but the head, once all hidden states are known."""
        self._model.model = None
        gc.collect()


class TransformersLogits:
    """Logits of the original checkpoint; only hidden states and the head are kept in memory."""

    def __init__(
        self, hf: Path, sequences: Sequence[TokenSequence], changes: Changes | None = None
    ) -> None:
        self._reference = Reference(hf, changes)
        self._hidden = [self._reference.hidden(sequence) for sequence in sequences]
        self._reference.drop_layers()

    @property
    def device(self) -> str:
        """Name of the device that the reference runs on."""
        return self._reference.device_name

    def slices(self, index: int, rows: int) -> Iterator[npt.NDArray[np.float32]]:
        """Logits of one sequence, at most `rows` positions at a time, [positions vocab] each."""
        hidden = self._hidden[index]
        for start in range(0, len(hidden), rows):
            yield self._reference.head(hidden[start : start + rows])


def _change(model: Any, changes: Changes) -> None:
    """Adds an adapter's changes to the weights of a model that is whole in memory."""
    renamed, parameters = renaming(model), dict(model.named_parameters())
    for name in changes.weights:
        if renamed(name) in parameters:  # keys and values of layers that share them are not
            changes.add(name, parameters[renamed(name)].data, None)


def cannot_run(hf: Path) -> AbstractContextManager[None]:
    """Within it transformers runs the model of `hf`; what it cannot run is a SourceError."""
    return told_by_library("transformers cannot run the original checkpoint.", hf)


def reference_device() -> torch.device:
    """Where the reference runs, with float32 products of float32 precision."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # the convolutions of the audio tower
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name_device(device: torch.device) -> str:
    """Name of `device`, for the report."""
    import torch

    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"


def arguments(sequence: TokenSequence, device: torch.device) -> dict[str, torch.Tensor]:
    """The model's arguments for a batch of this one sequence."""
    import torch

    arrays: dict[str, npt.NDArray[Any]] = {"input_ids": np.array(sequence.ids, np.int64)}
    if isinstance(sequence, SoftSequence):
        arrays |= sequence.arguments
    return {name: torch.from_numpy(array)[None].to(device) for name, array in arrays.items()}


def softcapped(logits: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """`logits` as the model caps them."""
    import torch

    softcap = architecture.text.logit_softcap
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def model_class(architecture: Architecture) -> Any:
    """transformers' class of the whole model. Raises SourceError where it has none."""
    import transformers

    try:
        return getattr(transformers, architecture.reference_class)
    except AttributeError as error:
        raise SourceError(
            "The installed transformers does not know this Gemma 4.",
            found=f"transformers {transformers.__version__}",
            expected="transformers 5.17 or later",
        ) from error


@once
def reference_config(hf: Path, architecture: Architecture) -> Any:
    """transformers' configuration of the checkpoint in `hf`, without weights or quantization.

    Raises SourceError for a config.json that transformers does not take.
    """
    maker, folder = model_class(architecture).config_class, handed(hf)
    with (
        quiet(),
        told_by_library("transformers cannot read config.json.", hf / "config.json", _OWN_CONFIG),
    ):
        config = maker.from_pretrained(folder, local_files_only=True)
    for section in (config, config.get_text_config()):
        if hasattr(section, "quantization_config"):
            del section.quantization_config  # the tensors are not quantized, whatever it says
    return config


def eager_attention() -> str | dict[str, str]:
    """transformers' `attn_implementation` for attention in plain PyTorch.

    The audio tower's is that in any case, but 5.17 reads the numbers of an eager mask, zero where
    it attends, as truth values; the mask that goes with `sdpa` holds such. Later ones refuse it.
    """
    from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioModel

    if Gemma4AudioModel._supports_sdpa:
        parts = dict.fromkeys(("", "text_config", "vision_config"), "eager")
        return {**parts, "audio_config": "sdpa"}
    return "eager"


def _load(hf: Path, architecture: Architecture) -> tuple[Any, dict[str, Any]]:
    import torch

    model, config, folder = (
        model_class(architecture),
        reference_config(hf, architecture),
        handed(hf),
    )
    with SafetensorsFolder(hf) as files:
        plain, stored = files.naming.plain, files.naming.stored.items()
    names = {} if plain else {f"^{re.escape(key)}$": name for name, key in stored}
    with told_by_library("transformers cannot load the original checkpoint.", hf):
        return model.from_pretrained(  # type: ignore[no-any-return]
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation=eager_attention(),
            experts_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are reported below, by name
            key_mapping=names or None,
            output_loading_info=True,
        )


def check_loaded(report: Mapping[str, Any], architecture: Architecture, hf: Path) -> None:
    """Nothing where `report`, as transformers' `from_pretrained` makes it, has no fault to tell."""
    unexpected = [key for key in report["unexpected_keys"] if not _ignorable(key, architecture)]
    problems = {
        "missing": sorted(map(str, report["missing_keys"])),
        "of another shape": sorted(str(entry) for entry in report["mismatched_keys"]),
        "unexpected": sorted(unexpected),
        "in error": sorted(map(str, report.get("error_msgs") or ())),
    }
    found = [
        f"{len(keys)} {problem}: {', '.join(keys[:_LISTED])}"
        for problem, keys in problems.items()
        if keys
    ]
    if found:
        raise SourceError(
            "The original checkpoint does not fit its config.json; transformers would initialize "
            "what is missing at random.",
            where=hf,
            found="; ".join(found),
            do="repair the checkpoint, or its config.json",
        )


def _ignorable(key: str, architecture: Architecture) -> bool:
    """True for what published files carry and nothing reads: K and V of layers that share them."""
    shared = _SHARED_LAYER_KEY.search(key)
    if shared is not None and "vision" not in key and "audio" not in key:
        number, layers = int(shared[1]), architecture.text.layers
        return number < len(layers) and not layers[number].owns_kv
    return _IGNORABLE_KEY.search(key) is not None


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars, log lines and the network."""
    import transformers

    bars = transformers.utils.logging.is_progress_bar_enabled()
    level = transformers.utils.logging.get_verbosity()
    offline = os.environ.get("HF_HUB_OFFLINE")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
        if offline is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = offline
