"""The original checkpoint run by transformers' own modules, with one layer in memory at a time.

The model is made without its weights (`weights`). The decoder layers stand aside and note what they
are called with, and are then run one by one, each for all sequences. So the largest thing in memory
is one layer in float32; where that has experts, all of them. Source of what a layer may
be given: `Gemma4TextModel.forward` in `transformers/models/gemma4/modeling_gemma4.py` (5.23), where
no argument but the hidden state comes out of another layer's weights, and the keys and values of
layers that share them go through one object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gemma_convert.files.libraries import told_by_library
from gemma_convert.forward.native_model import Dtype
from gemma_convert.logits.changes import Changes
from gemma_convert.logits.diagnosis import Diagnosis
from gemma_convert.logits.explanation import Found
from gemma_convert.logits.local import Probe
from gemma_convert.logits.other_runs import Calls, OtherRuns, aside
from gemma_convert.logits.reference import (
    arguments,
    cannot_run,
    check_loaded,
    eager_attention,
    model_class,
    name_device,
    quiet,
    reference_config,
    reference_device,
    softcapped,
)
from gemma_convert.logits.tapped import Values, tapped
from gemma_convert.logits.tensor_files import TensorFiles
from gemma_convert.logits.tower_reference import WatchedTower
from gemma_convert.logits.weights import Weights, empty
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import read_architecture
from gemma_convert.prompts.soft import SoftSequence
from gemma_convert.prompts.text import TokenSequence

if TYPE_CHECKING:
    import torch

_HEAD = "lm_head.weight"


class LayerwiseReference:
    """Hidden states behind each layer, and logits, of `sequences`; SourceError as for Reference."""

    def __init__(
        self, hf: Path, sequences: Sequence[TokenSequence], changes: Changes | None = None
    ) -> None:
        """`changes` are those of an adapter of the model in `hf`."""
        self._hf, self.architecture = hf, read_architecture(hf)
        self._sequences, self._device = sequences, reference_device()
        with quiet():
            self._model = _empty_model(hf, self.architecture, self._device)
        self._files = TensorFiles(hf, self._model, changes)
        wanted = {
            name: tuple(tensor.shape)
            for name, tensor in self._model.state_dict().items()
            if name != _HEAD or name in self._files.shapes or not self.architecture.text.tied
        }
        check_loaded(_filling(wanted, self._files.shapes), self.architecture, hf)
        self._text = getattr(self._model.model, "language_model", self._model.model)
        self._prefix = "model." if self._text is self._model.model else "model.language_model."
        self._chosen = self.architecture.text.experts_per_token
        self._weights = Weights(
            self._model.model, self._text, self._prefix, self._files, self._device
        )

    @property
    def device(self) -> str:
        """Name of the device that the reference runs on."""
        return name_device(self._device)

    def stages(self, probe: Probe | None = None) -> Iterator[list[npt.NDArray[np.float32]]]:
        """The states of each sequence [length embed]: embedded, behind each layer, and the norm.

        With `probe` each part of a stage is noted, and run in another precision; and the stage runs
        a second time with noise of the size of the probe's errors, once those are known. A layer's
        weights are then there until the next one is asked for.
        """
        import torch

        with torch.no_grad(), cannot_run(self._hf):
            calls = self._calls = [self.noted(sequence) for sequence in self._sequences]
            other = (
                None
                if probe is None
                else OtherRuns(self.noted, probe, self._sequences, self._chosen)
            )
            if other is not None:
                other.begin(calls)
        states = [call.hidden for call in calls]
        yield _on_host(states)
        if other is not None:
            other.disturb_embedding()
        for index, layer in enumerate(self._text.layers):
            self._weights.fill(layer, f"{self._prefix}layers.{index}.", deep=True)
            with torch.no_grad(), cannot_run(self._hf):
                before = states
                made: list[Values] | None = None if other is None else [{} for _ in states]
                states = _run(layer, index, calls, states, made)
                if other is not None and made is not None:
                    other.measure(layer, index, before, made)
                    self._before, self._made = before, made
            if other is None:
                empty(layer)
            yield _on_host(states)
            if other is not None:
                with torch.no_grad(), cannot_run(self._hf):
                    other.disturb(layer, index)
                empty(layer)
        with torch.no_grad():
            if other is not None:
                other.norm(self._text.norm, states)
                self._noisy = other.noisy
            self._hidden = [self._text.norm(state)[0] for state in states]
        yield _on_host([state[None] for state in self._hidden])

    def tower(self, sequence: SoftSequence, noise: Dtype) -> WatchedTower:
        """The tower that sees or hears what is in a sequence, beside rounding of `noise`."""
        model, vision = self._model.model, self.architecture.vision
        standardize = vision is not None and vision.standardize
        return WatchedTower(
            model,
            sequence,
            noise,
            standardize,
            self._device,
            self._hf,
            self._files,
            self._weights.holding,
        )

    def mistake(self, layer: int | None, place: int, found: Found) -> str | None:
        """What is wrong with a part of the stage that was given last; None where it is not known.

        `layer` is its number, None for what stands beside the layers, `place` that of the sequence.
        """
        import torch

        tried = Diagnosis(self._text, self._files, self._prefix, self.architecture.text)
        calls = self._calls[place]
        with torch.no_grad(), cannot_run(self._hf):
            if layer is not None:
                return tried.of_layer(layer, calls, self._before[place], self._made[place], found)
            if found.part == "embedding":
                return tried.of_embedding(calls, self._sequences[place].ids, found)
            if found.part == "per-layer inputs":
                return tried.of_per_layer_inputs(calls, found)
            if found.part == "final norm":
                return tried.of_final_norm(self._hidden[place], found)
            rows, part = self._first_slice
            (raw,) = self._head(rows, [part], capped=False)
            (right,) = self._head(rows, [part])
            return tried.of_head(raw, right, found)

    def logits(self, vocab: Sequence[slice]) -> Iterator[npt.NDArray[np.float32]]:
        """Logits [positions width] of each slice of the vocabulary, of all compared positions.

        `stages` must have come to its end.
        """
        for logits in self._head(self._compared(self._hidden), vocab):
            yield logits.float().cpu().numpy()

    def logits_and_noise(
        self, vocab: Sequence[slice], picked: npt.NDArray[np.int64], noise: Dtype
    ) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]]:
        """As `logits`; the same of the run with noise; and `picked` rows in another precision."""
        import torch

        rows = self._compared(self._hidden)
        exact = rows[torch.from_numpy(picked)]
        wide = torch.float64 if noise == "float32" else torch.bfloat16
        positions = len(rows)
        self._first_slice = exact, vocab[0]
        both = torch.cat([rows, self._compared(self._noisy)])
        for part in vocab:
            logits, other = self._head(both, [part]), self._head(exact.to(wide), [part])
            values = next(logits).float().cpu().numpy()
            yield values[:positions], values[positions:], next(other).double().cpu().numpy()

    def _compared(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        rows = zip(states, self._sequences, strict=True)
        return torch.cat([state[torch.from_numpy(one.compared)] for state, one in rows])

    def _head(
        self, hidden: torch.Tensor, vocab: Sequence[slice], capped: bool = True
    ) -> Iterator[torch.Tensor]:
        """Logits [positions width] of states [positions embed], in their precision."""
        import torch

        name = _HEAD if _HEAD in self._files.shapes else f"{self._prefix}embed_tokens.weight"
        for part in vocab:
            weight = self._files.read(name, part, self._device).to(hidden.dtype)
            with torch.no_grad():
                logits = torch.nn.functional.linear(hidden, weight)
            yield softcapped(logits, self.architecture) if capped else logits

    def noted(self, sequence: TokenSequence) -> Calls:
        """What the model calls its layers with for this sequence."""
        import torch

        calls = Calls()
        layers = self._text.layers
        self._text.layers = torch.nn.ModuleList(aside(calls) for _ in layers)
        try:
            self._model.model(**arguments(sequence, self._device), use_cache=False)
        finally:
            self._text.layers = layers
        return calls


def _run(
    layer: Any,
    index: int,
    calls: Sequence[Calls],
    states: Sequence[torch.Tensor],
    made: Sequence[Values] | None,
) -> list[torch.Tensor]:
    """The states of all sequences behind one layer; `made` gets what its parts make."""
    after = []
    for number, (call, state) in enumerate(zip(calls, states, strict=True)):
        seen = nullcontext() if made is None else tapped(layer, made[number].__setitem__)
        with seen:
            after.append(call.run(layer, index, state))
    return after


def _empty_model(hf: Path, architecture: Architecture, device: torch.device) -> Any:
    """transformers' model without weights, with the buffers that it computes for itself."""
    import torch

    model_type, config = model_class(architecture), reference_config(hf, architecture)
    where = hf / "config.json"
    with told_by_library("transformers cannot make the model of this config.json.", where):
        with torch.device("meta"):
            model = model_type._from_config(
                config,
                dtype=torch.float32,
                attn_implementation=eager_attention(),
                experts_implementation="eager",
            )
        for module in model.modules():
            computed = module._non_persistent_buffers_set
            module._is_hf_initialized = not computed  # what is read need not be made up before
            for name in computed:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        model.initialize_weights()
    return model.eval().requires_grad_(False)


def _filling(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """What `from_pretrained` would report of filling `wanted` from `found`."""
    return {
        "missing_keys": wanted.keys() - found.keys(),
        "unexpected_keys": found.keys() - wanted.keys(),
        "mismatched_keys": {
            (name, found[name], wanted[name])
            for name in wanted.keys() & found.keys()
            if found[name] != wanted[name]
        },
    }


def _on_host(states: Sequence[torch.Tensor]) -> list[npt.NDArray[np.float32]]:
    return [state[0].cpu().numpy() for state in states]
