"""A side that is run layer by layer, whose progress is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gemma_convert.forward.native_model import Given, Logits, Staged, States
from gemma_convert.progress import Listener, steps


class Watched:
    """The stages and the logits of `side`, a model of `layers` layers, told to a listener."""

    def __init__(self, side: Staged, layers: int, listener: Listener | None) -> None:
        self._side, self._listener = side, listener
        between = (f"layer {index}" for index in range(layers))
        self._names = ["embedding", *between, "final norm"]

    @property
    def device(self) -> str:
        """Name of the device that the side runs on."""
        return self._side.device

    def stages(self, given: Given | None = None) -> Iterator[States]:
        """As the side has them; `given` is for one that takes it."""
        run: Callable[..., Iterator[States]] = self._side.stages
        stages = run() if given is None else run(given)
        return steps(self._listener, "layers", "stages", stages, self._names)

    def logits(self, vocab: Sequence[slice]) -> Iterator[Logits]:
        """As the side has them."""
        names = [f"vocabulary to {part.stop}" for part in vocab]
        return steps(self._listener, "logits", "slices", self._side.logits(vocab), names)
