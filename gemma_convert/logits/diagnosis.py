"""What is wrong with a part: the mistake that, made on the reference, gives what the part gives.

Each of the mistakes is tried on the part alone, whose inputs are the reference's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gemma_convert.forward.parts import Part
from gemma_convert.logits.explanation import Found, closest
from gemma_convert.logits.mistakes import beside
from gemma_convert.logits.mistakes.layer import mistakes
from gemma_convert.logits.mistakes.trial import Subject, Trial, of_other_layers
from gemma_convert.logits.other_runs import Calls
from gemma_convert.logits.tapped import Values, features, tapped
from gemma_convert.logits.tensor_files import TensorFiles
from gemma_convert.model.architecture import TextArchitecture

if TYPE_CHECKING:
    import torch

_LARGE: tuple[tuple[Part, str], ...] = (("dense MLP", "mlp"), ("experts", "experts"))
"""Parts that are not computed where another is looked at, and their modules."""


@dataclass(frozen=True)
class Diagnosis:
    """Mistakes tried on transformers' language model; a layer that is asked for has its weights.

    Each method returns the mistake in words, None where no known one gives what was found.
    """

    text: Any
    files: TensorFiles
    prefix: str
    """What the names of the model's tensors begin with."""
    facts: TextArchitecture

    def of_layer(
        self, layer: int, calls: Calls, state: torch.Tensor, exact: Values, found: Found
    ) -> str | None:
        """Of a part of a layer; `state` leads to it, and its parts rightly make `exact` of it."""
        subject = self._subject(layer, calls, state.device)

        def tried() -> Iterator[tuple[str, npt.NDArray[Any]]]:
            if found.part.startswith("sum"):
                rows = {part: _on_host(features(part, value)) for part, value in exact.items()}
                yield from beside.of_sum(found.part, _on_host(state[0]), rows)
            for trial in mistakes(subject, found.part, exact):
                yield trial.mistake, _made(subject, trial, calls, state, exact, found.part)

        right = _on_host(features(found.part, exact[found.part]))
        return closest(right, tried(), found)

    def of_embedding(self, calls: Calls, ids: Sequence[int], found: Found) -> str | None:
        """Of the embedded tokens `ids`."""
        import torch

        def shifted(count: int) -> npt.NDArray[Any]:
            rows = self._read("embed_tokens", (torch.tensor(ids) + count) % self.facts.vocab)
            scaled: npt.NDArray[Any] = rows * self.facts.embed**0.5
            return scaled

        right = _on_host(calls.hidden[0])
        return closest(right, beside.of_embedding(right, shifted), found)

    def of_per_layer_inputs(self, calls: Calls, found: Found) -> str | None:
        """Of the per-layer inputs of all layers."""
        whole = calls.embedded()["per-layer inputs"][0]
        context = _on_host(self.text.project_per_layer_inputs(calls.hidden)[0])
        token = _on_host(whole) * np.sqrt(2.0) - context
        scale = self._read("per_layer_projection_norm")
        tried = beside.of_per_layer_inputs(token, context, scale)
        return closest(_on_host(whole.flatten(1)), tried, found)

    def of_final_norm(self, normed: torch.Tensor, found: Found) -> str | None:
        """Of the final norm, which rightly makes `normed` [length embed]."""
        right = _on_host(normed)
        return closest(right, beside.of_final_norm(right, self._read("norm")), found)

    def of_head(self, raw: torch.Tensor, capped: torch.Tensor, found: Found) -> str | None:
        """Of the head, which rightly makes the logits `capped` [positions width] of the `raw`."""
        tried = beside.of_logits(_on_host(raw), self.facts.logit_softcap, self.facts.embed)
        return closest(_on_host(capped), tried, found)

    def _subject(self, layer: int, calls: Calls, device: torch.device) -> Subject:
        layers = self.text.layers
        per_layer = [others[0] for others, _ in calls.layers if others]
        _, named = calls.layers[layer]
        other = of_other_layers(self.files, self.prefix, layer, device)
        return Subject(layers[layer], layer, len(layers), named, other, per_layer)

    def _read(self, name: str, rows: torch.Tensor | None = None) -> npt.NDArray[np.float64]:
        return _on_host(self.files.read(f"{self.prefix}{name}.weight", rows))


def _made(
    subject: Subject, trial: Trial, calls: Calls, state: torch.Tensor, exact: Values, part: Part
) -> npt.NDArray[Any]:
    """What the part makes [length features] when the mistake is made."""
    seen: list[Any] = []
    given = {**exact, **trial.given}

    def use(one: Part, value: Any) -> Any:
        if one == part:
            seen.append(value)
        return given[one]

    large = {path: exact[one] for one, path in _LARGE if one in exact and one != part}
    idle = Trial("", {f"{path}.forward": _always(value) for path, value in large.items()})
    others, _ = calls.layers[subject.index]
    if trial.per_layer is not None:
        others = (trial.per_layer, *others[1:])
    with ExitStack() as stack:
        stack.enter_context(trial.made_on(subject.layer))
        stack.enter_context(idle.made_on(subject.layer))
        stack.enter_context(tapped(subject.layer, use))
        subject.layer(state, *others, **{**subject.called, **trial.called})
    return _on_host(features(part, seen[0]))


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _on_host(values: torch.Tensor) -> npt.NDArray[np.float64]:
    array: npt.NDArray[np.float64] = values.double().cpu().numpy()
    return array
