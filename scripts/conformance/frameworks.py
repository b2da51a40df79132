"""The frameworks: what each is called, which models it knows, where it saves, what it differs in.

A framework NAME has besides its row here the file NAME.py, which runs in its own environment, and
the lists NAME.txt and NAME.in of what is installed there. NAME.py has two commands:

    logits SETTINGS INPUT OUTPUT   INPUT: .npz with `ids`, int64 [batch, length]; into OUTPUT, .npz,
                                   go `logits`, float32 [batch, length, vocab]
    train SETTINGS FOLDER          three steps on made-up tokens, from what SETTINGS load; the
                                   framework saves below FOLDER, at the row's `trained`

SETTINGS is a JSON object, what `to-native --json` calls `settings`: every value as it is printed. For
a trained checkpoint the judge puts its path in the place of the converted one's. Everything is
computed in float32, at full precision, on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

UNSCANNED, EITHER = (False,), (False, True)


@dataclass(frozen=True)
class Framework:
    """A framework that judges.

    `models` has the forms of each model that it knows: scanned or not. `converted` and `trained`
    are the paths that its settings name, below a conversion and below the folder of `train`.
    `limit` bounds the KL divergence of every token, in nats. `computes` says by model what its
    release computes otherwise than transformers (`reference.DEVIATIONS`); what was mended later
    stands in `mended` with the first release that is right.
    """

    name: str
    title: str
    package: str
    layout: str
    models: Mapping[str, tuple[bool, ...]]
    trained: str
    converted: str = "."
    limit: float = 1e-5
    companions: tuple[str, ...] = ("jax", "flax", "orbax-checkpoint")
    computes: Mapping[str, str] = field(default_factory=dict)
    mended: Mapping[str, str] = field(default_factory=dict)

    def deviation(self, model: str, version: str) -> str | None:
        """The name of what this release computes otherwise for a model."""
        name = self.computes.get(model)
        if name is None or _numbers(version) >= _numbers(self.mended.get(name, "9999")):
            return None
        return name


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(one) for one in version.split(".") if one.isdigit())


ALL = ("e2b", "e4b", "12b", "26b-a4b", "31b")

FRAMEWORKS = {
    one.name: one
    for one in (
        Framework(
            name="maxtext",
            title="MaxText",
            package="maxtext",
            layout="maxtext",
            models={"e2b": UNSCANNED, "e4b": UNSCANNED}
            | dict.fromkeys(("12b", "26b-a4b", "31b"), EITHER),
            converted="0/items",
            trained="run/checkpoints/2/items",
            computes=dict.fromkeys(ALL, "output table in bfloat16"),
        ),
        Framework(
            name="gemma",
            title="gemma",
            package="gemma",
            layout="gemma-jax",
            models=dict.fromkeys(ALL, UNSCANNED),
            trained="params",
            computes={"26b-a4b": "router normalised twice"},
            mended={"router normalised twice": "4.1.0"},
        ),
    )
}
