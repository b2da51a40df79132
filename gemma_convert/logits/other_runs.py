"""The reference beside itself: in another precision on its own states, and with noise.

What the first says of a layer is how far rounding alone may take it; what the second says of the
logits is what rounding of that size amounts to in this network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gemma_convert.forward.parts import Part
from gemma_convert.logits.local import Probe
from gemma_convert.logits.precision import computed_in
from gemma_convert.logits.tapped import Values, cast, features, first, tapped
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

    def embedded(self) -> Values:
        """The embedded tokens, and the per-layer inputs of all layers where there are any."""
        import torch

        inputs = [others[0] for others, _ in self.layers if others and others[0] is not None]
        made: Values = {"embedding": self.hidden}
        if inputs:
            made["per-layer inputs"] = torch.stack(inputs, dim=2)
        return made

    def run(self, layer: Any, index: int, state: torch.Tensor) -> torch.Tensor:
        """What a layer makes of a state with what the model calls it with."""
        others, named = self.layers[index]
        after: torch.Tensor = layer(state, *others, **named)
        return after


def aside(calls: Calls, state: torch.Tensor | None = None) -> Any:
    """A module in the place of a layer, which notes what it is called with.

    It makes `state` of it, or leaves it as it is.
    """
    import torch

    class Aside(torch.nn.Module):  # type: ignore[misc]
        def forward(self, hidden: Any, *others: Any, **named: Any) -> Any:
            calls.hidden = hidden
            calls.layers.append((others, named))
            return hidden if state is None else state

    return Aside()


def disturbed(
    value: torch.Tensor, errors: npt.NDArray[np.float64], random: torch.Generator
) -> torch.Tensor:
    """`value` [1 length …] or [length …] with noise of `errors` [length], in any direction."""
    import torch

    flat = value.reshape(len(errors), -1)
    size = torch.from_numpy(np.nan_to_num(errors)).to(flat)[:, None]
    noise = torch.rand(flat.shape, generator=random).to(flat).sub_(0.5).mul_(12**0.5)
    length = flat.norm(dim=-1, keepdim=True) / flat.shape[-1] ** 0.5
    return (flat + noise * length * size).reshape(value.shape)


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


def beginning(sequence: TokenSequence, length: int) -> TokenSequence:
    """The first tokens of a sequence; itself where that is all of it."""
    if length == len(sequence.ids):
        return sequence
    return TokenSequence(sequence.name, sequence.ids[:length])


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
            self._precise = [
                noted(beginning(sequences[place], length))
                for place, length in probe.measured.items()
            ]
        self._calls = [noted(sequence) for sequence in sequences]
        self._chosen = chosen
        self.noisy: list[torch.Tensor] = []

    def begin(self, calls: Sequence[Calls]) -> None:
        """The embedded sequences, which lead to the first layer."""
        self._probe.parts = [_on_host(call.embedded()) for call in calls]
        self._probe.other = [_on_host(call.embedded(), wide=True) for call in self._precise]
        self.noisy = [call.hidden for call in calls]

    def measure(
        self, layer: Any, index: int, states: Sequence[torch.Tensor], made: Sequence[Values]
    ) -> None:
        """A layer's parts in another precision, each on what the parts before it `made`.

        `states` lead to the layer, whose weights are there.
        """
        self._probe.parts = [_on_host(one) for one in made]
        other = []
        for (place, length), call in zip(self._probe.measured.items(), self._precise, strict=True):
            found: Values = {}
            exact = {part: first(part, value, length) for part, value in made[place].items()}

            def use(part: Part, value: Any, found: Values = found, given: Values = exact) -> Any:
                found[part] = value
                return cast(part, given[part], self._dtype)

            with computed_in(self._dtype), tapped(layer, use):
                call.run(layer, index, states[place][:, :length].to(self._dtype))
            other.append(found)
        self._decide(made, other)
        self._probe.other = [_on_host(one, wide=True) for one in other]

    def disturb_embedding(self) -> None:
        """Noise of the size of the errors of embedded tokens."""
        pairs = zip(self.noisy, self._probe.errors, strict=True)
        self.noisy = [self._disturbed(state, errors["embedding"]) for state, errors in pairs]

    def disturb(self, layer: Any, index: int) -> None:
        """The layer on states with noise; each part's own errors are the size of more noise."""
        after = []
        for call, state, errors in zip(self._calls, self.noisy, self._probe.errors, strict=True):

            def use(part: Part, value: Any, errors: Mapping[Part, Any] = errors) -> Any:
                if part == "router":
                    probabilities, shares, experts = value
                    return probabilities, self._disturbed(shares, errors[part]), experts
                return self._disturbed(value, errors[part])

            with tapped(layer, use):
                after.append(call.run(layer, index, state))
        self.noisy = after

    def norm(self, norm: Any, states: Sequence[torch.Tensor]) -> None:
        """The final norm of `states`; noise is disturbed no more, its errors count in the head."""
        self._probe.decided = None
        self._probe.parts = [_on_host({"final norm": norm(state)}) for state in states]
        self.noisy = [norm(state)[0] for state in self.noisy]
        with computed_in(self._dtype):
            self._probe.other = [
                _on_host({"final norm": norm(states[place][:, :length].to(self._dtype))}, wide=True)
                for place, length in self._probe.measured.items()
            ]

    def _decide(self, made: Sequence[Values], other: Sequence[Values]) -> None:
        """Which tokens go to the same experts whatever the rounding; None where there are none."""
        self._probe.decided = None
        if "router" in made[0]:
            chosen = self._chosen
            measured = [
                made[place]["router"][0][:length] for place, length in self._probe.measured.items()
            ]
            pairs = zip(measured, other, strict=True)
            apart = max(moved(exact, one["router"][0], chosen) for exact, one in pairs)
            self._probe.decided = [
                decided(one["router"][0], chosen, ROUTER_FACTOR * apart) for one in made
            ]

    def _disturbed(self, value: torch.Tensor, errors: npt.NDArray[np.float64]) -> torch.Tensor:
        return disturbed(value, errors, self._random)


def _on_host(made: Values, wide: bool = False) -> dict[Part, npt.NDArray[Any]]:
    """What parts made, [length features] each, in float64 if `wide`."""
    rows = {part: features(part, value) for part, value in made.items()}
    return {part: (row.double() if wide else row).cpu().numpy() for part, row in rows.items()}
