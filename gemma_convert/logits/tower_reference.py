"""The original's towers run step by step, and beside themselves: in another precision, with noise.

As in the decoder, layers stand aside while what stands around them runs, and are then run one by
one; each module has its own weights while it is called. Steps are those of
`gemma_convert.forward.encoder`: what makes states, each layer, and what makes soft tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from gemma_convert.forward.native_model import Dtype
from gemma_convert.forward.parts import Part
from gemma_convert.logits.drift import relative
from gemma_convert.logits.explanation import Found, closest
from gemma_convert.logits.mistakes.trial import Subject, of_other_layers
from gemma_convert.logits.other_runs import Calls, aside, disturbed
from gemma_convert.logits.precision import computed_in
from gemma_convert.logits.reference import arguments, cannot_run
from gemma_convert.logits.tapped import Values
from gemma_convert.logits.tapped_towers import around, modules_of, rows, within
from gemma_convert.logits.tensor_files import TensorFiles
from gemma_convert.logits.tower_diagnosis import TowerDiagnosis
from gemma_convert.prompts.soft import SoftSequence

if TYPE_CHECKING:
    import torch


@dataclass
class TowerStep:
    """One step of the reference's tower, whose `layer` is None before and behind the layers.

    `state` [rows embed] leads to it, None to the first; `parts` is what its parts make of it
    [rows features], and `other` the same in another precision, each on what the one before made.
    Rows that are not `real` [rows] are padding. `errors` [rows], by part, are to be filled in
    before the next step is asked for, and are the size of its noise. `known` has what a part makes
    where its norms with biases have the epsilon of the text model's, as some frameworks have it.
    """

    layer: int | None
    state: npt.NDArray[np.float32] | None
    parts: Mapping[Part, npt.NDArray[Any]]
    other: Mapping[Part, npt.NDArray[Any]]
    real: npt.NDArray[np.bool_]
    errors: dict[Part, npt.NDArray[np.float64]] = field(default_factory=dict)
    known: Mapping[Part, npt.NDArray[Any]] = field(default_factory=dict)


class Holding(Protocol):
    """What keeps the weights of modules between their calls."""

    def __call__(
        self, paths: Sequence[str], but: str | None = None
    ) -> AbstractContextManager[None]:
        """Within it those at and below `paths`, but not those below `but`, have their weights."""


class WatchedTower:
    """The tower of transformers' `model` that sees or hears what is in a sequence."""

    def __init__(
        self,
        model: Any,
        sequence: SoftSequence,
        noise: Dtype,
        standardize: bool,
        device: torch.device,
        hf: Path,
        files: TensorFiles,
        holding: Holding,
    ) -> None:
        """`noise` is the precision whose rounding is measured; `hf` is named in errors."""
        import torch

        self._files, self._holding, self._device = files, holding, device
        self._model, self._tower, self._hf = model, sequence.medium.tower, hf
        self._modules = modules_of(model, self._tower)
        self._first, self._standardize = self._modules.first, standardize
        holder = self._modules.holder
        self._holder = None if holder is None else model.get_submodule(holder)
        self._given = arguments(sequence, device)
        self._dtype = torch.float64 if noise == "float32" else torch.bfloat16
        self._random = torch.Generator().manual_seed(0)
        self.soft_errors: npt.NDArray[np.float64] = np.zeros(0)
        """How far noise moves each soft token, relative to its length [tokens], after `steps`."""

    def steps(self) -> Iterator[TowerStep]:
        """Every step, in the order in which they run."""
        with self._running():
            calls, made = self._around(None, None)
            precise, other = self._around(None, made)
        state: torch.Tensor = made[self._first]
        step = self._step(None, None, {self._first: state}, other)
        if self._holder is None:
            step.known = {self._first: _on_host(self._with_epsilon_of_text()[self._first])}
        self._last = step, calls, None, {self._first: state}
        yield step
        noisy = self._noise(step)(self._first, state)
        for index, layer in enumerate(() if self._holder is None else self._holder.layers):
            with self._running():
                made = self._layer(layer, index, calls, state, None)
                other = self._layer(layer, index, precise, state, made)
            step = self._step(index, state, made, other)
            self._last = step, calls, state, made
            yield step
            with self._running(), within(layer, self._modules, self._noise(step)):
                noisy = calls.run(layer, index, noisy)
            state = made["output"]
        with self._running():
            _, made = self._around(state, None)
            _, other = self._around(state, made)
        del made[self._first]
        step = self._step(None, state, made, other)
        self._last = step, calls, state, made
        yield step
        with self._running():
            _, moved = self._call(noisy, self._given, self._noise(step))
        noisy_tokens = _on_host(moved)
        exact = _on_host(made["soft tokens"])[: len(noisy_tokens)]
        self.soft_errors = relative(exact, noisy_tokens)

    def mistake(self, found: Found) -> str | None:
        """What is wrong with a part of the last step, seen in its real rows; None: not known."""
        step, calls, state, exact = self._last
        modules, index = self._modules, step.layer
        if modules.holder is None:
            return closest(step.parts[found.part][step.real], (), found)
        layers = f"model.{modules.holder}.layers"
        if index is None:
            held = self._holding(sorted(f"model.{one}" for one in modules.roots), layers)
        else:
            held = self._holding([f"{layers}.{index}"])
        with self._running(), held:
            subject, run = self._made_of(step.layer, calls, state)
            tried = TowerDiagnosis(
                self._tower, subject, run, state, exact, step.real, step.layer is not None
            )
            return tried.of_part(found)

    def _made_of(
        self, index: int | None, calls: Calls, state: torch.Tensor | None
    ) -> tuple[Subject, Callable[[Mapping[str, Any], Callable[[Part, Any], Any]], object]]:
        """A layer, or what stands around all of them, to make mistakes on, and what runs it."""
        if index is None:
            subject = Subject(self._model, 0, 1, self._given, lambda _, __: None)
            return subject, partial(self._call, state)
        assert self._holder is not None
        layers, (others, named) = self._holder.layers, calls.layers[index]
        prefix = f"model.{self._modules.holder}."
        other = of_other_layers(self._files, prefix, index, self._device)

        def run(given: Mapping[str, Any], use: Callable[[Part, Any], Any]) -> object:
            with within(layers[index], self._modules, use):
                return layers[index](state, *others, **given)

        return Subject(layers[index], index, len(layers), named, other), run

    def _around(
        self, state: torch.Tensor | None, exact: Values | None
    ) -> tuple[Calls, dict[Part, Any]]:
        """What layers that make `state` are called with, and what the parts around them make.

        In the other precision where it is known what they exactly make, which they are given.
        """
        made: Values = {}
        with self._precision(exact):
            calls, _ = self._call(state, self._given, self._noted(made, exact))
        return calls, made

    def _layer(
        self, layer: Any, index: int, calls: Calls, state: torch.Tensor, exact: Values | None
    ) -> Values:
        """What the parts of a layer make, as in `_around`."""
        made: Values = {}
        given = state if exact is None else state.to(self._dtype)
        with self._precision(exact), within(layer, self._modules, self._noted(made, exact)):
            calls.run(layer, index, given)
        return made

    def _call(
        self,
        state: torch.Tensor | None,
        given: Mapping[str, Any],
        use: Callable[[Part, Any], Any],
    ) -> tuple[Calls, torch.Tensor]:
        """What the layers are called with, and the soft tokens, where the layers make `state`."""
        import torch

        if self._holder is None:
            return Calls(), self._soft_tokens(given, self._led_by(state, use))
        calls, layers = Calls(), self._holder.layers
        self._holder.layers = torch.nn.ModuleList(aside(calls, state) for _ in layers)
        try:
            return calls, self._soft_tokens(given, use)
        finally:
            self._holder.layers = layers

    def _soft_tokens(
        self, given: Mapping[str, Any], use: Callable[[Part, Any], Any]
    ) -> torch.Tensor:
        """The soft tokens [tokens embed] of all of the tower, whose parts `use` sees."""
        model = self._model
        with around(model, self._modules, self._standardize, use):
            if self._tower == "vision":
                pixels, positions = given["pixel_values"], given["image_position_ids"]
                seen = model.get_image_features(pixels, positions, return_dict=True)
                found: torch.Tensor = seen.pooler_output[0]
                return found
            frames, mask = given["input_features"], given["input_features_mask"]
            heard: torch.Tensor = model.get_audio_features(
                frames, mask, return_dict=True
            ).pooler_output
            return heard

    def _led_by(
        self, state: torch.Tensor | None, use: Callable[[Part, Any], Any]
    ) -> Callable[[Part, Any], Any]:
        """`use` where the part that layers would begin with makes `state`, if there is one."""

        def led(part: Part, value: torch.Tensor) -> Any:
            instead = use(part, value)
            return state if part == self._first and state is not None else instead

        return led

    def _with_epsilon_of_text(self) -> Values:
        """What parts make where norms with biases have the epsilon of the text model's."""
        import torch

        norms = [one for one in self._model.modules() if isinstance(one, torch.nn.LayerNorm)]
        own = [norm.eps for norm in norms]
        try:
            for norm in norms:
                norm.eps = self._model.config.get_text_config().rms_norm_eps
            with self._running():
                return self._around(None, None)[1]
        finally:
            for norm, epsilon in zip(norms, own, strict=True):
                norm.eps = epsilon

    def _noted(self, made: Values, exact: Values | None) -> Callable[[Part, Any], Any]:
        def use(part: Part, value: torch.Tensor) -> torch.Tensor | None:
            made[part] = value.clone()  # towers add in place
            return None if exact is None else exact[part].to(self._dtype)

        return use

    def _noise(self, step: TowerStep) -> Callable[[Part, Any], Any]:
        def use(part: Part, value: torch.Tensor) -> torch.Tensor:
            if part not in step.errors:
                return value
            return disturbed(value, step.errors[part][: len(rows(value))], self._random)

        return use

    def _step(
        self, layer: int | None, state: torch.Tensor | None, made: Values, other: Values
    ) -> TowerStep:
        length = max(len(rows(value)) for value in made.values())
        real = np.ones(length, np.bool_)
        if "soft tokens" in made and self._holder is not None:
            real[len(rows(made["soft tokens"])) :] = False
        elif self._tower == "vision":
            positions = self._given["image_position_ids"][0]
            real = (positions != -1).any(dim=-1).cpu().numpy()
        exact, wide = (
            {part: _filled(_on_host(each[part]), length) for part in made} for each in (made, other)
        )
        return TowerStep(layer, None if state is None else _on_host(state), exact, wide, real)

    def _precision(self, exact: Values | None) -> Any:
        return nullcontext() if exact is None else computed_in(self._dtype)

    @contextmanager
    def _running(self) -> Iterator[None]:
        import torch

        with torch.no_grad(), cannot_run(self._hf):
            yield


def _on_host(value: torch.Tensor) -> npt.NDArray[Any]:
    """What a part made [rows features], in float64 where it was bfloat16."""
    import torch

    found = rows(value)
    array: npt.NDArray[Any] = (
        (found.double() if found.dtype is torch.bfloat16 else found).cpu().numpy()
    )
    return array


def _filled(values: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """Values [rows features] with zeros for padding behind them [length features]."""
    together = np.zeros((length, values.shape[1]), values.dtype)
    together[: len(values)] = values
    return together
