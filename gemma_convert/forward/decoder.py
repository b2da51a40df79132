"""Prompts → hidden states: the Gemma 4 language model in JAX, whatever tree its weights come from.

Where a tree keeps its arrays, and over which axes, is its own module's: `DecoderWeights` and
`LayerWeights` are what such a module gives. Arithmetic:
`transformers/models/gemma4/modeling_gemma4.py` (5.23). A layer is embed → layer → head: layers may
be fed one at a time. Weights and activations are of `dtype`; norms, rotary angles, softmax, router
and logits are float32, and float32 products are float32 on every accelerator.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_convert.forward.arithmetic import rms_norm
from gemma_convert.forward.decoder_layer import KeysAndValues, Kind, kind_of, layer
from gemma_convert.forward.decoder_weights import DecoderWeights, LayerWeights
from gemma_convert.forward.native_model import Batched, Dtype
from gemma_convert.forward.parts import Part
from gemma_convert.forward.prompt import Prompt
from gemma_convert.forward.sharding import place, place_all, replicated
from gemma_convert.model.architecture import Layer, TextArchitecture

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def final_hidden(
    weights: DecoderWeights, text: TextArchitecture, prompts: Sequence[Prompt], dtype: Dtype
) -> list[Float[Array, "batch length embed"]]:
    """What the head is given [batch length embed], for each of `prompts`."""
    states: list[jax.Array] = []
    for states in stages(weights, text, prompts, dtype):  # noqa: B007
        pass
    return states


def stages(
    weights: DecoderWeights,
    text: TextArchitecture,
    prompts: Sequence[Prompt],
    dtype: Dtype,
    handed: Batched[jax.Array] | None = None,
) -> Iterator[list[Float[Array, "batch length embed"]]]:
    """The states of `prompts` [batch length embed]: embedded, behind each layer, behind the norm.

    Every layer's weights are read and put on the devices once, for all prompts, and dropped before
    its states are given, which are whole on every device. Each part is run on what is `handed` too,
    which is asked for before each stage; layers that share keys and values then attend to handed
    ones.
    """
    states = [embed(weights, text, prompt, dtype) for prompt in prompts]
    inputs = _all_per_layer_inputs(weights, text, prompts, states)
    sources = {facts.kv_source for facts in text.layers if not facts.owns_kv}
    images = [
        place(prompt.images) if text.bidirectional_images and prompt.images is not None else None
        for prompt in prompts
    ]
    kept: dict[tuple[int, int], KeysAndValues] = {}
    kept_of_handed: dict[tuple[int, int], KeysAndValues] = {}
    handed_inputs = inputs
    if handed is not None:
        handed_inputs = _hand_embedding(weights, text, prompts, states, inputs, handed)
    yield list(states)
    for facts in text.layers:
        mine = place_all(weights.layer(facts.index), weights.layer_axes(facts.index))
        kind = kind_of(text, facts, type(mine))
        run = partial(_run_layer, mine, facts, kind, images, sources)
        parts: Sequence[Mapping[Part, jax.Array] | None] = [None] * len(prompts)
        if handed is not None:
            parts = handed.parts
            given = [state.astype(dtype) for state in handed.inputs]
            handed.give_back(run(handed_inputs, given, kept_of_handed, parts, True)[1])
        states, _ = run(inputs, states, kept, parts, False)
        del mine, run, parts
        yield list(states)
    norm = partial(rms_norm, scale=weights.final_scale(), epsilon=text.norm_epsilon)
    if handed is not None:
        handed.give_back([{"final norm": norm(state.astype(dtype))} for state in handed.inputs])
    yield [norm(state) for state in states]


def _hand_embedding(
    weights: DecoderWeights,
    text: TextArchitecture,
    prompts: Sequence[Prompt],
    embedded: Sequence[jax.Array],
    inputs: Sequence[Any],
    handed: Batched[jax.Array],
) -> list[Any]:
    """Gives back what is made before the layers; the per-layer inputs that were handed.

    `embedded` and `inputs` are this side's own.
    """
    made: list[dict[Part, jax.Array]] = [{"embedding": state} for state in embedded]
    found = list(inputs)
    if text.ple:
        parts = handed.parts
        theirs = [
            part["embedding"].astype(state.dtype)
            for part, state in zip(parts, embedded, strict=True)
        ]
        ours = _all_per_layer_inputs(weights, text, prompts, theirs)
        for one, value in zip(made, ours, strict=True):
            one["per-layer inputs"] = value
        found = [
            part["per-layer inputs"].reshape(value.shape).astype(value.dtype)
            for part, value in zip(parts, inputs, strict=True)
        ]
    handed.give_back(made)
    return found


def _all_per_layer_inputs(
    weights: DecoderWeights,
    text: TextArchitecture,
    prompts: Sequence[Prompt],
    embedded: Sequence[jax.Array],
) -> list[Any]:
    """The per-layer inputs of each prompt, None of a model without."""
    if not text.ple:
        return [None] * len(prompts)
    pairs = zip(prompts, embedded, strict=True)
    return [per_layer_inputs(weights, text, prompt, state) for prompt, state in pairs]


def _run_layer(
    weights: LayerWeights,
    facts: Layer,
    kind: Kind,
    images: Sequence[jax.Array | None],
    sources: Collection[int],
    per_layer: Sequence[jax.Array | None],
    states: Sequence[jax.Array],
    kept: dict[tuple[int, int], KeysAndValues],
    given: Sequence[Mapping[Part, jax.Array] | None],
    instead: bool,
) -> tuple[list[jax.Array], list[Mapping[Part, jax.Array]]]:
    """The states of all prompts behind one layer, and what its parts made.

    `kept` are keys and values that are shared; for `given` and `instead` see `layer`.
    """
    after, made = [], []
    for number, (state, ple) in enumerate(zip(states, per_layer, strict=True)):
        out, keys_values, parts = layer(
            weights,
            state,
            None if ple is None else ple[:, :, facts.index],
            None if facts.owns_kv else kept[number, facts.kv_source],
            images[number] if facts.sliding or kind.whole_images else None,
            given[number],
            instead,
            kind,
        )
        if facts.index in sources:
            kept[number, facts.index] = keys_values
        after.append(out)
        made.append(parts)
    return after, made


def embed(
    weights: DecoderWeights, text: TextArchitecture, prompt: Prompt, dtype: Dtype
) -> Float[Array, "batch length embed"]:
    """Embedded tokens [batch length embed]; soft tokens stand in for them as they are."""
    rows = weights.embedding(prompt.ids(text.pad_token)).astype(dtype)
    if prompt.soft is None or prompt.images is None:
        return rows
    soft = place(prompt.soft).astype(dtype)
    return jnp.where(place(prompt.images)[..., None] != 0, soft, rows)


def per_layer_inputs(
    weights: DecoderWeights,
    text: TextArchitecture,
    prompt: Prompt,
    embedded: Float[Array, "batch length embed"],
) -> Float[Array, "batch length layers ple"]:
    """Per-layer embeddings [batch length layers ple]: what the token is, and what the context says.

    Both parts of transformers' `get_per_layer_inputs` and `project_per_layer_inputs`.
    """
    rows = weights.per_layer_rows(prompt.ids(text.pad_token))
    token = rows.astype(embedded.dtype) * np.sqrt(text.ple).astype(np.float32)
    context = replicated(weights.per_layer_context(embedded)) * np.float32(text.embed**-0.5)
    context = rms_norm(context, weights.per_layer_scale(), text.norm_epsilon)
    both: jax.Array = (context + token) * np.float32(2**-0.5)
    return both.astype(embedded.dtype)
