"""The frameworks: what each is called, which models it knows, where it saves, what it differs in.

A framework NAME has besides its row here the file NAME.py (`_` for `-`), which runs in its own
environment, and the lists NAME.txt and NAME.in of what is installed there. NAME.py has two
commands:

    logits SETTINGS INPUT OUTPUT   INPUT: .npz with `ids`, int64 [batch, length]; into OUTPUT, .npz,
                                   go `logits`, float32 [batch, length, vocab]
    train SETTINGS FOLDER          three steps on made-up tokens, from what SETTINGS load; the
                                   framework saves below FOLDER, at the row's `trained`

A framework with `adapters` has two commands more; ADAPTER is what to-native printed of an adapter:

    adapted SETTINGS ADAPTER INPUT OUTPUT     logits of the model with the adapter
    train_adapter SETTINGS ADAPTER FOLDER     three steps of the adapter alone; the framework saves
                                              below FOLDER, at the row's `tuned`

Several commands, set apart by `+`, run one after the other; a failed one does not stop the others:
asked.py does that. It is run by `python -P`, so that `import NAME` finds the framework.
SETTINGS is a JSON object, what `to-native --json` calls `settings`: every value as it is printed.
For a trained checkpoint the judge puts its path in the place of the converted one's. Everything is
computed in float32, at full precision, on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

UNSCANNED, EITHER = (False,), (False, True)
ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PER_LAYER = ("per_layer_input_gate", "per_layer_projection")


@dataclass(frozen=True)
class Framework:
    """A framework that judges.

    `models` has the forms of each model that it knows: scanned or not. `converted` and `trained`
    are the paths that its settings name, below a conversion and below the folder of `train`.
    `towers` has the forms that are converted with their towers; others are the text model alone.
    `limit` bounds the KL divergence of every token, in nats. `computes` says by model what its
    release computes otherwise than transformers (`reference.DEVIATIONS`); what was mended later
    stands in `mended` with the first release that is right. `adapters` are the models of which
    adapters are tried, unscanned, of the modules `adapted`; `tuned` is where `train_adapter` saves
    one, and `one_a` says that keys and values have one matrix A. `note` stands on the page.
    """

    name: str
    title: str
    package: str
    layout: str
    models: Mapping[str, tuple[bool, ...]]
    trained: str
    converted: str = "."
    limit: float = 1e-5
    towers: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    companions: tuple[str, ...] = ("jax", "flax", "orbax-checkpoint")
    computes: Mapping[str, str] = field(default_factory=dict)
    mended: Mapping[str, str] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ATTENTION_AND_MLP
    tuned: str = ""
    one_a: bool = False
    note: str = ""

    def sees(self, model: str, scanned: bool) -> bool:
        """Whether towers are converted too."""
        return scanned in self.towers.get(model, ())

    def deviation(self, model: str, version: str) -> str | None:
        """The name of what this release computes otherwise for a model."""
        name = self.computes.get(model)
        if name is None or _numbers(version) >= _numbers(self.mended.get(name, "9999")):
            return None
        return name


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(one) for one in version.split(".") if one.isdigit())


ALL = ("e2b", "e4b", "12b", "26b-a4b", "31b")

MAXTEXT = """\
Unscanned checkpoints of 26B-A4B and 31B are converted without the vision tower, scanned ones with
it. MaxText has no name for 12B yet, so `to-native` prints the name of 31B with the sizes of 12B.
MaxText casts the output table to bfloat16, whatever `dtype` is: its logits are compared with
transformers as it is, and with a transformers model whose output table is cast likewise. In its
vision tower the dimension of a head is hidden / heads, and an image always has 2,520 patches of
16 × 16 pixels, so the towers of the tiny models have these sizes. Its two converters take the sizes
of a model from a table of the published ones; here they are given the tiny sizes, and they read
safetensors files with numpy instead of torch. Adapters are trained by its `train_sft` with the
config of pre-training: with the config of `train_sft` itself, which cannot be hashed, MaxText finds
no synthetic data. Its converter of adapters fails with two errors of its own: it passes JAX arrays
to safetensors, which needs numpy arrays, and it takes the list of names of 26B-A4B's experts for
one name. Here it is given numpy arrays, and the experts, which are in no adapter, are left out."""

GEMMA = """\
Only the language model is run; the towers are converted and loaded with it. In version 4.0.1, the
newest on the package index, the router of 26B-A4B normalises an input that is already normalised,
which 4.1.0 corrects: its logits are compared with transformers as it is, and with a transformers
model whose router does the same. `gm.ckpts.save_params` returns before the checkpoint is complete,
unless it is called with `wait_until_finished=True`."""

TUNIX = """\
Version 0.1.7 has the language model only. It has no config for 12B yet, so `to-native` prints the
config of 31B with the sizes of 12B. `PeftTrainer` trains all parameters, or an adapter alone, which
qwix adds to the model: keys and values are one array in Tunix, so an adapter has one matrix A for
both. In 0.1.7 the router of 26B-A4B normalises an input that is already normalised, which has been
corrected in the repository since: its logits are compared with transformers as it is, and with a
transformers model whose router does the same."""

FAST_LLM = """\
Fast-LLM is on no package index, so a commit of its repository is installed. Its own
`fast-llm train gpt` trains on random tokens on the CPU. Its export needs `optimizer_state: false`:
with the state of the optimizer, Fast-LLM fails at the layer scalars of Gemma 4."""

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
            towers=dict.fromkeys(("26b-a4b", "31b"), (True,)),
            converted="0/items",
            trained="run/checkpoints/2/items",
            adapters=ALL,
            tuned="tuned/run/checkpoints/3/model_params",
            note=MAXTEXT,
            computes=dict.fromkeys(ALL, "output table in bfloat16"),
        ),
        Framework(
            name="gemma",
            title="gemma",
            package="gemma",
            layout="gemma-jax",
            models=dict.fromkeys(ALL, UNSCANNED),
            towers=dict.fromkeys(("e2b", "e4b", "26b-a4b", "31b"), UNSCANNED),
            trained="params",
            note=GEMMA,
            computes={"26b-a4b": "router normalised twice"},
            mended={"router normalised twice": "4.1.0"},
        ),
        Framework(
            name="tunix",
            title="Tunix",
            package="google-tunix",
            layout="tunix",
            models=dict.fromkeys(ALL, UNSCANNED),
            trained="checkpoints",
            adapters=ALL,
            tuned="tuned/checkpoints",
            adapted=(*ATTENTION_AND_MLP, *PER_LAYER),
            one_a=True,
            note=TUNIX,
            computes={"26b-a4b": "router normalised twice"},
        ),
        Framework(
            name="fast-llm",
            title="Fast-LLM",
            package="fast-llm",
            layout="fast-llm",
            models=dict.fromkeys(("12b", "26b-a4b", "31b"), UNSCANNED),
            trained="run/export/fast_llm/3",
            companions=("torch", "safetensors"),
            note=FAST_LLM,
        ),
    )
}
