"""A Fast-LLM checkpoint and token ids → logits: the Gemma 4 language model in PyTorch.

Weights are used as Fast-LLM lays them out, never through a mapping table, and all else comes from
the checkpoint's own metadata.yaml: nothing is asked of Hugging Face's config.json, so that neither
a mistake of a table nor one of the metadata can cancel itself here. Layout: Fast-LLM 0.4.0.
Arithmetic: `transformers/models/gemma4/modeling_gemma4.py` (5.23). Activations are of `dtype`;
norms, rotary angles, softmax, routing and logits are float32, and so are float32 products on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from gemma_convert.errors import SourceError
from gemma_convert.forward.native_model import Batched, Dtype
from gemma_convert.forward.parts import Part, Taps
from gemma_convert.layouts.fast_llm.forward_config import (
    Attention,
    Block,
    HybridMoe,
    Mlp,
    Rotary,
    Routed,
    read_fast_llm_config,
)
from gemma_convert.layouts.fast_llm.stored import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    StoredTensors,
    layer_shapes,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Weights: TypeAlias = Mapping[str, torch.Tensor]
Shape: TypeAlias = tuple[int, ...]
Tokens: TypeAlias = npt.NDArray[np.integer[Any]]

_VOCAB_SLICE = 1 << 15


class FastLLM:
    """One checkpoint, opened and checked; weights are read layer by layer when they are needed.

    Raises SourceError where the metadata is not that of a Gemma 4, or where a tensor is missing,
    superfluous or of another shape than the metadata says. Values are not looked at.
    """

    def __init__(self, folder: Path, dtype: Dtype = "float32") -> None:
        torch.set_float32_matmul_precision("highest")
        self.config = read_fast_llm_config(folder)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = torch.float32 if dtype == "float32" else torch.bfloat16
        self._stored = StoredTensors(folder, self.config)
        self.stored_dtypes = self._stored.dtypes

    @property
    def device_name(self) -> str:
        """Name of the device that the model runs on."""
        if self.device.type == "cuda":
            return str(torch.cuda.get_device_name(self.device))
        return "cpu"

    def forward(self, tokens: Tokens) -> Float[torch.Tensor, "batch length vocab"]:
        """Logits [batch length vocab] in float32 of all positions of `tokens` [batch length]."""
        (hidden,) = self.final_hidden([tokens])
        return self.head(hidden)

    def final_hidden(
        self, batches: Sequence[Tokens]
    ) -> list[Float[torch.Tensor, "batch length embed"]]:
        """What the head is given [batch length embed], for each of `batches` [batch length]."""
        states: list[torch.Tensor] = []
        for states in self.stages(batches):  # noqa: B007
            pass
        return states

    def stages(
        self, batches: Sequence[Tokens], handed: Batched[torch.Tensor] | None = None
    ) -> Iterator[list[Float[torch.Tensor, "batch length embed"]]]:
        """The states of `batches` [batch length embed]: embedded, behind each layer, and the norm.

        Every layer's weights are loaded once, for all batches, and dropped before its states are
        given. Each part is run on what is `handed` as well. Raises SourceError for token ids
        outside the vocabulary.
        """
        states = [self._embed(tokens) for tokens in batches]
        if handed is not None:
            handed.give_back([{"embedding": state} for state in states])
        yield states
        for index, block in enumerate(self.config.layers):
            weights = self._layer(index)
            run = partial(layer, weights, block=block)
            if handed is not None:
                handed.give_back(
                    [
                        run(self._placed(state), given=parts)[1]
                        for state, parts in zip(handed.inputs, handed.parts, strict=True)
                    ]
                )
            states = [run(state)[0] for state in states]
            del weights, run
            self._stored.release()
            yield states
        norm = partial(rms_norm, epsilon=self.config.final_epsilon, weight=self._tensor(FINAL_NORM))
        if handed is not None:
            handed.give_back([{"final norm": norm(self._placed(state))} for state in handed.inputs])
        yield [norm(state) for state in states]

    def _placed(self, state: torch.Tensor) -> torch.Tensor:
        return state.to(self.device, self._dtype)

    def head(
        self, hidden: Float[torch.Tensor, "*places embed"], vocab: slice = slice(None)
    ) -> Float[torch.Tensor, "*places vocab"]:
        """Logits [*places vocab] in float32, soft-capped; a tied output table is the embedding.

        `vocab` are the tokens whose logits are wanted. The table stays in the file: a slice of its
        rows at a time is moved to the device.
        """
        table = self._read(EMBEDDING if self.config.tied_embedding_weight else OUTPUT)[vocab]
        slices = (
            rows.to(self.device).to(self._dtype).float() for rows in table.split(_VOCAB_SLICE)
        )
        states = hidden.to(self.device).float()
        logits = torch.cat([functional.linear(states, rows) for rows in slices], dim=-1)
        softcap = self.config.final_logit_softcap
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    def _embed(self, tokens: Tokens) -> Float[torch.Tensor, "batch length embed"]:
        """Rows of the embedding times its scale [batch length embed]."""
        ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise SourceError(
                "The token ids do not fit this checkpoint's vocabulary.",
                expected=f"ids from 0 to {self.config.vocab_size - 1}",
                found=f"ids from {int(ids.min())} to {int(ids.max())}",
            )
        rows = self._read(EMBEDDING)[ids].to(self.device).float()
        return (rows * self.config.embedding_scale).to(self._dtype)

    def _layer(self, index: int) -> Weights:
        """Weights of one layer on the device, by their names within it.

        Matrices are cast once for all batches, except those of the experts, which are large: each
        expert's slice is cast when it is used.
        """
        names = layer_shapes(self.config.layers[index], self.config.hidden_size)
        weights = {name: self._tensor(f"decoder.{index}.{name}") for name in names}
        return {
            name: weight.to(self._dtype)
            if weight.ndim == 2 and not name.startswith("mlp.routed.layer_")
            else weight
            for name, weight in weights.items()
        }

    def _tensor(self, name: str) -> torch.Tensor:
        return self._read(name).to(self.device)

    def _read(self, name: str) -> torch.Tensor:
        return self._stored.read(name)


def layer(
    weights: Weights,
    hidden: Float[torch.Tensor, "batch length embed"],
    block: Block,
    given: Mapping[Part, Float[torch.Tensor, "batch length features"]] | None = None,
) -> tuple[Float[torch.Tensor, "batch length embed"], Mapping[Part, torch.Tensor]]:
    """The output [batch length embed] of one decoder layer, and what its parts made.

    Each part goes on from what is `given` for the one before, where anything is.
    """
    tap = Taps(given, lambda value, made: value.to(made).view(made.shape))
    norm = partial(_named_norm, weights)
    normed = tap("norm before attention", norm("norm_1", hidden, block.pre_mixer_epsilon))
    mixed = attend(weights, normed, block.attention, tap)
    mixed = norm("post_mixer_norm", mixed, block.post_mixer_epsilon)
    hidden = tap("sum behind attention", hidden + tap("norm behind attention", mixed))
    if isinstance(block.mlp, Mlp):
        normed = tap("norm before the MLP", norm("norm_2", hidden, block.mlp.pre_epsilon))
        fed = tap("dense MLP", mlp(weights, "mlp", normed))
    else:
        fed = mixture(weights, hidden, block.mlp, tap)
    hidden = hidden + tap("norm behind the MLP", norm("post_mlp_norm", fed, block.post_mlp_epsilon))
    out = hidden * weights["output_scale"].to(hidden.dtype)
    tap("output", out)
    return out, tap.made


def attend(
    weights: Weights,
    hidden: Float[torch.Tensor, "batch length embed"],
    facts: Attention,
    tap: Taps[torch.Tensor],
) -> Float[torch.Tensor, "batch length embed"]:
    """Attention's output [batch length embed]; scores are not scaled.

    key_value holds all keys, then all values; shared, the keys before their norm are the values.
    Neighbouring heads share one group's key and value.
    """
    batch, length, _ = hidden.shape
    query = functional.linear(hidden, weights["mixer.query.weight"])
    both = functional.linear(hidden, weights["mixer.key_value.weight"])
    key, value = (both, both) if facts.shared_key_value else both.chunk(2, dim=-1)
    grouped = (batch, length, facts.head_groups, -1, facts.head_size)
    query, key, value = query.view(grouped), key.reshape(grouped), value.reshape(grouped)
    query = tap("queries", _named_norm(weights, "mixer.query_norm", query, facts.query_epsilon))
    key = tap("keys", _named_norm(weights, "mixer.key_norm", key, facts.key_epsilon))
    value = tap("values", rms_norm(value, facts.value_epsilon))
    query, key = rotate(query, facts.rotary), rotate(key, facts.rotary)
    scores = torch.einsum("bqghd,bkgsd->bghqk", query.float(), key.float())
    seen = visible(length, facts.window, hidden.device)
    shares = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1).to(value.dtype)
    mixed = tap("attention", torch.einsum("bghqk,bkgsd->bqghd", shares, value))
    out = functional.linear(mixed.reshape(batch, length, -1), weights["mixer.dense.weight"])
    return tap("output projection", out)


def rotate(
    x: Float[torch.Tensor, "batch length groups heads head_size"], rotary: Rotary
) -> Float[torch.Tensor, "batch length groups heads head_size"]:
    """`x` turned by its positions in float32; pairs are (i, i + head_size / 2).

    The first pairs turn, with frequencies spread over the whole head, and the others do not:
    `transformers/modeling_rope_utils.py`, "proportional", which is the default one at fraction 1.
    """
    head_size = x.shape[-1]
    turning = int(rotary.fraction * head_size // 2)
    exponent = torch.arange(0, 2 * turning, 2, device=x.device).float() / head_size
    frequency = torch.zeros(head_size // 2, device=x.device)
    frequency[:turning] = 1.0 / rotary.theta**exponent
    position = torch.arange(x.shape[1], device=x.device).float()
    angle = (position[:, None] * frequency)[:, None, None]
    cosine, sine = angle.cos(), angle.sin()
    first, second = x.float().chunk(2, dim=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat(turned, dim=-1).to(x.dtype)


def visible(
    length: int, window: int | None, device: torch.device
) -> Bool[torch.Tensor, "query key"]:
    """Which keys [query key] a query sees: itself and those before it, at most `window` in all."""
    position = torch.arange(length, device=device)
    back = position[:, None] - position[None, :]
    return back >= 0 if window is None else (back >= 0) & (back < window)


def mlp(
    weights: Weights, prefix: str, hidden: Float[torch.Tensor, "*places embed"]
) -> Float[torch.Tensor, "*places embed"]:
    """The gated feed-forward [*places embed] of the two matrices below `prefix`."""
    return _gated(hidden, weights[f"{prefix}.layer_1.weight"], weights[f"{prefix}.layer_2.weight"])


def _gated(
    hidden: Float[torch.Tensor, "*places embed"],
    layer_1: Float[torch.Tensor, "gate_up_mlp embed"],
    layer_2: Float[torch.Tensor, "mlp embed"],
) -> Float[torch.Tensor, "*places embed"]:
    """layer_1 holds the gate's rows, then the up projection's; layer_2 is stored [in out]."""
    gate, up = functional.linear(hidden, layer_1).chunk(2, dim=-1)
    return (functional.gelu(gate, approximate="tanh") * up) @ layer_2


def mixture(
    weights: Weights,
    hidden: Float[torch.Tensor, "batch length embed"],
    facts: HybridMoe,
    tap: Taps[torch.Tensor],
) -> Float[torch.Tensor, "batch length embed"]:
    """Dense branch plus experts [batch length embed]; both, and the router, see `hidden` itself."""
    norm = partial(_named_norm, weights)
    routed = facts.routed
    normed = norm("mlp.dense.pre_norm", hidden, facts.dense.pre_epsilon)
    dense = tap("dense MLP", mlp(weights, "mlp.dense", tap("norm before the MLP", normed)))
    dense = norm("mlp.dense.post_norm", dense, facts.dense_post_epsilon)
    shares = tap("router", router(weights, hidden, routed))
    feed = norm("mlp.routed.pre_norm", hidden, routed.pre_epsilon)
    feed = tap("norm before the experts", feed)
    sparse = experts(weights, feed.flatten(0, 1), shares.flatten(0, 1), routed).view_as(hidden)
    sparse = norm("mlp.routed.post_norm", tap("experts", sparse), routed.post_epsilon)
    both = tap("norm behind the dense MLP", dense) + tap("norm behind the experts", sparse)
    return tap("sum of both branches", both)


def router(
    weights: Weights, hidden: Float[torch.Tensor, "batch length embed"], facts: Routed
) -> Float[torch.Tensor, "batch length experts"]:
    """Each expert's share [batch length experts] in float32, zero for all but the best.

    The chosen experts' probabilities are made to sum to one, then multiplied by their own scales.
    """
    normed = rms_norm(hidden.float(), facts.router_epsilon)
    scaled = normed * weights["mlp.routed.router_scale"].float() * facts.router_input_scale
    scores = functional.linear(scaled, weights["mlp.routed.router.weight"].float())
    best, chosen = torch.softmax(scores, dim=-1).topk(facts.experts_per_token, dim=-1)
    best = best / best.sum(dim=-1, keepdim=True)
    best = best * weights["mlp.routed.router_per_expert_scale"].float()[chosen]
    return torch.zeros_like(scores).scatter(-1, chosen, best)


def experts(
    weights: Weights,
    hidden: Float[torch.Tensor, "tokens embed"],
    shares: Float[torch.Tensor, "tokens experts"],
    facts: Routed,
) -> Float[torch.Tensor, "tokens embed"]:
    """Sum of the experts' outputs by `shares` [tokens embed], one expert after the other.

    An expert sees only tokens that have a share of it, and one that no token chose is not read.
    """
    layer_1, layer_2 = weights["mlp.routed.layer_1.weight"], weights["mlp.routed.layer_2.weight"]
    total = torch.zeros_like(hidden, dtype=torch.float32)
    for expert, (first, second) in enumerate(
        zip(layer_1.split(2 * facts.width), layer_2.split(facts.width), strict=True)
    ):
        (token,) = torch.where(shares[:, expert] != 0)
        if token.numel():
            out = _gated(hidden[token], first.to(hidden.dtype), second.to(hidden.dtype))
            total.index_add_(0, token, out.float() * shares[token, expert, None])
    return total.to(hidden.dtype)


def rms_norm(
    x: Float[torch.Tensor, "*places size"],
    epsilon: float,
    weight: Float[torch.Tensor, " size"] | None = None,
) -> Float[torch.Tensor, "*places size"]:
    """`x` over its root mean square, times `weight` itself (no + 1), computed in float32."""
    precise = x.float()
    normed = precise * (precise.square().mean(dim=-1, keepdim=True) + epsilon).pow(-0.5)
    if weight is not None:
        normed = normed * weight.float()
    return normed.to(x.dtype)


def _named_norm(weights: Weights, name: str, x: torch.Tensor, epsilon: float) -> torch.Tensor:
    return rms_norm(x, epsilon, weights[f"{name}.weight"])
