"""The reference beside itself: in another precision on its own states, and with noise.

What the first says of a layer is how far rounding alone may take it; what the second says of the
logits is what rounding of that size amounts to in this network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gemma_convert.logits.local import Probe
from gemma_convert.logits.precision import computed_in
from gemma_convert.prompts.text import TokenSequence

if TYPE_CHECKING:
    import torch

ROUTER_FACTOR = 4.0
"""How many times further from a tie than rounding moves it a choice of experts is decided."""


class Calls:
    """The embedded prompt, and what each layer is called with behind its hidden state."""

    def __init__(self) -> None:
        self.hidden: Any = None
        self.layers: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

    def run(self, layer: Any, index: int, state: torch.Tensor) -> torch.Tensor:
        """What a layer makes of a state with what the model calls it with."""
        others, named = self.layers[index]
        after: torch.Tensor = layer(state, *others, **named)
        return after


@contextmanager
def router_seen(layer: Any) -> Iterator[list[torch.Tensor]]:
    """The probabilities [tokens experts] that the router of a layer gives, call by call."""
    seen: list[torch.Tensor] = []
    router = getattr(layer, "router", None)
    if router is None:
        yield seen
        return
    hook = router.register_forward_hook(lambda _, __, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        hook.remove()


def moved(exact: torch.Tensor, other: torch.Tensor, chosen: int) -> float:
    """How far rounding moves probabilities [tokens experts], in log, at the most.

    Of the experts that are chosen and the next one; those that nothing is left of do not count.
    """
    best, experts = exact.double().topk(min(chosen + 1, exact.shape[1]), dim=-1)
    apart = (other.double().gather(-1, experts) / best).log().abs()
    return float(apart.nan_to_num(0.0, posinf=0.0).max())


def decided(probabilities: torch.Tensor, chosen: int, apart: float) -> npt.NDArray[np.bool_]:
    """Whether the last expert that is chosen is further than that from the next, in log, [tokens].

    The token with the clearest choice always is.
    """
    best = probabilities.double().topk(min(chosen + 1, probabilities.shape[1]), dim=-1).values.log()
    margin = (best[:, chosen - 1] - best[:, -1]).nan_to_num(0.0).cpu().numpy()
    clear: npt.NDArray[np.bool_] = (margin > apart) | (margin == margin.max())
    return clear


class OtherRuns:
    """The reference beside itself: on its own states in another precision, and with noise.

    Both have keys and values of their own for the layers that share them.
    """

    def __init__(
        self,
        noted: Callable[[TokenSequence], Calls],
        probe: Probe,
        sequences: Sequence[TokenSequence],
        chosen: int,
    ) -> None:
        """`noted` gives what layers are called with, `chosen` how many experts a token goes to."""
        import torch

        self._probe, self._random = probe, torch.Generator().manual_seed(0)
        self._dtype = torch.float64 if probe.noise == "float32" else torch.bfloat16
        with computed_in(self._dtype):
            self._precise = [noted(sequences[place]) for place in probe.measured]
        self._calls = [noted(sequence) for sequence in sequences]
        self._chosen = chosen
        self._routed: list[torch.Tensor] = []
        self.noisy: list[torch.Tensor] = []

    def begin(self, states: Sequence[torch.Tensor]) -> None:
        """The embedded sequences, which lead to the first layer."""
        self.noisy = list(states)
        self._give([call.hidden for call in self._precise])

    def run(self, layer: Any, index: int, states: Sequence[torch.Tensor]) -> None:
        """One layer, whose weights are there."""
        self._disturb()
        runs = zip(self._calls, self.noisy, strict=True)
        noisy = [call.run(layer, index, state) for call, state in runs]
        measured = [states[place] for place in self._probe.measured]
        with computed_in(self._dtype), router_seen(layer) as self._routed:
            precise = [
                call.run(layer, index, state.to(self._dtype))
                for call, state in zip(self._precise, measured, strict=True)
            ]
        self.noisy = noisy
        self._give(precise)

    def decide(self, routed: Sequence[torch.Tensor]) -> None:
        """Which tokens go to the same experts whatever the rounding.

        Its probabilities [tokens experts] are those of each sequence, none where it has no experts.
        """
        self._probe.decided = None
        if routed:
            chosen = self._chosen
            measured = [routed[place] for place in self._probe.measured]
            pairs = zip(measured, self._routed, strict=True)
            apart = max(moved(exact, other, chosen) for exact, other in pairs)
            self._probe.decided = [decided(one, chosen, ROUTER_FACTOR * apart) for one in routed]

    def norm(self, norm: Any, states: Sequence[torch.Tensor]) -> None:
        """The final norm; what is left are the states [length embed] that the head is given."""
        self._disturb()
        self.noisy = [norm(state)[0] for state in self.noisy]
        with computed_in(self._dtype):
            self._give([norm(states[place].to(self._dtype)) for place in self._probe.measured])

    def _disturb(self) -> None:
        """Noise of the size of the errors that the last stage had, in any direction."""
        import torch

        for place, errors in enumerate(self._probe.errors):
            state = self.noisy[place]
            size = torch.from_numpy(np.nan_to_num(errors)).to(state)[None, :, None]
            noise = torch.randn(state.shape, generator=self._random).to(state)
            length = state.norm(dim=-1, keepdim=True) / state.shape[-1] ** 0.5
            self.noisy[place] = state + noise * length * size

    def _give(self, precise: Sequence[torch.Tensor]) -> None:
        self._probe.other = [state[0].double().cpu().numpy() for state in precise]
