"""The FLOPs of one step: forward, backward, and what is computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from gemma_convert.errors import UsageError
from gemma_convert.flops.layers import decoder
from gemma_convert.flops.model import Model
from gemma_convert.flops.operations import BLOCKS, Block, Operation, Part
from gemma_convert.flops.towers import images, sounds
from gemma_convert.flops.workload import Workload

Key = TypeVar("Key")


@dataclass(frozen=True)
class Counted:
    """One operation with the FLOPs of its backward pass and of its recomputation."""

    operation: Operation
    backward: int = 0
    recomputed: int = 0

    @property
    def flops(self) -> int:
        """Model FLOPs: forward and backward."""
        return self.operation.flops + self.backward


@dataclass(frozen=True)
class Count:
    """All operations of one step of a model."""

    model: Model
    work: Workload
    operations: tuple[Counted, ...]

    @cached_property
    def total(self) -> int:
        """Model FLOPs: what the step needs, whatever is computed again."""
        return sum(one.flops for one in self.operations)

    @cached_property
    def hardware(self) -> int:
        """Hardware FLOPs: with what is computed again in the backward pass."""
        return self.total + sum(one.recomputed for one in self.operations)

    @cached_property
    def forward(self) -> int:
        """FLOPs of the forward pass."""
        return sum(one.operation.flops for one in self.operations)

    @property
    def components(self) -> dict[tuple[Part, str], int]:
        """Model FLOPs by part and component, in the order of the forward pass."""
        return _sums(self.operations, lambda one: (one.part, one.component))

    @property
    def layers(self) -> list[dict[str, int]]:
        """Model FLOPs by component, of each layer of the decoder."""
        return [
            _sums(
                (one for one in self.operations if _place(one) == ("text", index)),
                lambda one: one.component,
            )
            for index in range(len(self.model.layers))
        ]

    def block(self, block: Block) -> int:
        """Model FLOPs of one kind of block in the layers of the decoder."""
        return sum(
            one.flops
            for one in self.operations
            if one.operation.part == "text" and BLOCKS[one.operation.component] == block
        )


def count(model: Model, work: Workload) -> Count:
    """The FLOPs of the step `work` of `model`.

    Frozen parts have no gradients of weights, and none at all where nothing below them is trained.
    With full recomputation each layer that has a backward pass is run forward once more; what
    stands outside the layers is not. Raises UsageError where nothing is trained, or where the model
    has no tower for images or sounds.
    """
    operations = tuple(_forward(model, work))
    if work.mode != "train":
        return Count(model, work, tuple(Counted(one) for one in operations))
    trained = {one.part for one in operations} - work.frozen
    if not trained:
        raise UsageError("Nothing is trained: every part is frozen.", do="freeze fewer parts")
    return Count(model, work, tuple(_trained(one, trained, work) for one in operations))


def check_towers(model: Model, images: int, sounds: int) -> None:
    """Raises UsageError where there are images or sounds, and the model has no tower for them."""
    for what, count, tower in (("images", images, model.vision), ("sounds", sounds, model.audio)):
        if count and tower is None:
            raise UsageError(
                f"No tower for {what} is counted for this model.",
                found=model.family,
                do=f"leave out --{what}",
            )


def _trained(operation: Operation, trained: set[Part], work: Workload) -> Counted:
    backward = operation.backward(trained)
    again = work.recomputation == "full" and operation.layer is not None and backward
    return Counted(operation, backward, operation.flops if again else 0)


def _forward(model: Model, work: Workload) -> Iterable[Operation]:
    check_towers(model, work.images, work.sounds)
    if model.vision is not None and work.images:
        yield from images(model.vision, model.embed, work)
    if model.audio is not None and work.sounds:
        yield from sounds(model.audio, model.embed, work)
    yield from decoder(model, work)


def _place(one: Counted) -> tuple[Part, int | None]:
    return one.operation.part, one.operation.layer


def _sums(operations: Iterable[Counted], key: Callable[[Operation], Key]) -> dict[Key, int]:
    found: dict[Key, int] = {}
    for one in operations:
        found[key(one.operation)] = found.get(key(one.operation), 0) + one.flops
    return found
