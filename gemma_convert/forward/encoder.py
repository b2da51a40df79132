"""An encoder of images or sounds as the steps that it is made of, each of which runs by itself too.

The first step makes states of pixels or of frames, one step is a layer, and the last one makes soft
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from gemma_convert.forward.parts import Part, Taps

Made: TypeAlias = Mapping[Part, Any]
"""What each part of a step makes, [rows *features]."""

Step: TypeAlias = Callable[[Any, Made | None], tuple[Any, Made]]
"""From the state [rows embed] that leads to it, None to the first, to the one behind it.

Where parts are given, what each makes is returned too, and the next part goes on with the given.
"""

Encoder: TypeAlias = Sequence[Step]


def encoded(encoder: Encoder) -> Any:
    """The soft tokens [tokens embed], all steps run one behind the other."""
    state = None
    for step in encoder:
        state, _ = step(state, None)
    return state


def taps(given: Made | None) -> Taps[Any]:
    """What notes the parts of a step, which goes on with those that are given."""
    return Taps(given, lambda value, made: value.reshape(made.shape).astype(made.dtype))


def noted(state: Any, tap: Taps[Any], given: Made | None) -> tuple[Any, Made]:
    """What a step returns: its state, and its parts where any were given."""
    return state, {} if given is None else tap.made
