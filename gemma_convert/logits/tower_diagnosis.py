"""What is wrong with a part of a tower: the mistake that, made on the original's, gives the same.

As `diagnosis` does for the language model; each is tried on the part alone, whose inputs are the
original's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_convert.forward.parts import Part
from gemma_convert.logits.explanation import Found, closest
from gemma_convert.logits.mistakes import audio, beside, vision
from gemma_convert.logits.mistakes.trial import Subject, Trial
from gemma_convert.logits.tapped import Values
from gemma_convert.logits.tapped_towers import rows

Use: TypeAlias = "Callable[[Part, Any], Any]"

_MODULES = {"vision": vision, "audio": audio}

_ADDED_TO: Mapping[tuple[str, Part], tuple[Part, Part | None]] = {
    ("vision", "sum behind attention"): ("sum behind attention", None),
    ("vision", "output"): ("sum behind the MLP", "sum behind attention"),
    ("audio", "sum behind attention"): ("sum behind attention", "first feed-forward"),
}
"""Tower and part → the sum of a decoder layer that it is, and what is added to; None: the state."""

_ADDS_TO: Mapping[Part, Part | None] = {
    "first feed-forward": None,
    "light convolution": "sum behind attention",
    "second feed-forward": "light convolution",
}
"""A part that holds what it is given, too → the part that makes that; None: the layer's state."""


@dataclass(frozen=True)
class TowerDiagnosis:
    """One step of a tower, to make mistakes on: its module has its weights.

    `run` runs it with arguments in the place of those of the `subject`; `state` leads to it, None
    to the first, and its parts rightly make `exact`.
    """

    tower: str
    subject: Subject
    run: Callable[[Mapping[str, Any], Use], object]
    state: Any
    exact: Values
    real: npt.NDArray[np.bool_]
    """Rows that are no padding."""
    is_layer: bool

    def of_part(self, found: Found) -> str | None:
        """What is wrong with a part, of whose real rows something was found; None: not known."""
        return closest(self._rows(self.exact[found.part]), self._tried(found.part), found)

    def _tried(self, part: Part) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        if self.is_layer:
            yield from self._of_sums(part)
        of = _MODULES[self.tower]
        trials = of.of_layer if self.is_layer else of.of_ends
        for trial in trials(self.subject, part, self.exact):
            yield trial.mistake, self._made(trial, part)

    def _of_sums(self, part: Part) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        made = {one: self._rows(value) for one, value in self.exact.items()}
        state = self._rows(self.state)
        if (self.tower, part) in _ADDED_TO:
            sum_of, before = _ADDED_TO[self.tower, part]
            yield from beside.of_sum(sum_of, state if before is None else made[before], made)
        if part in _ADDS_TO:
            before = _ADDS_TO[part]
            yield "the residual is lost", made[part] - (state if before is None else made[before])

    def _made(self, trial: Trial, part: Part) -> npt.NDArray[Any]:
        """What the part makes [real features] when the mistake is made."""
        seen: list[Any] = []

        def use(one: Part, value: Any) -> Any:
            if one == part:
                seen.append(value.clone())  # towers add in place
            right = self.exact.get(one)
            return None if right is None else right.clone()

        with trial.made_on(self.subject.layer):
            self.run({**self.subject.named, **trial.called}, use)
        return self._rows(seen[0])

    def _rows(self, value: Any) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = rows(value).double().cpu().numpy()
        return found[self.real[: len(found)]]
