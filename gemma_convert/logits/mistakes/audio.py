"""Mistakes in the audio tower: its layers, and what stands before and behind them.

Modules: `Gemma4AudioModel` in `transformers/models/gemma4/modeling_gemma4.py` (5.23).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import e, log
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from gemma_convert.forward.parts import Part
from gemma_convert.logits.mistakes.kernels import (
    NAMES,
    matrix_edits,
    of_exchange,
    of_kernel,
    of_modules,
    of_norm,
)
from gemma_convert.logits.mistakes.trial import (
    Edit,
    Subject,
    Trial,
    identity,
    neighbours,
    regrouped,
)
from gemma_convert.logits.mistakes.vision import of_projection

if TYPE_CHECKING:
    import torch

_FEED_FORWARD = ("pre_layer_norm", "ffw_layer_1", "ffw_layer_2", "post_layer_norm")
_NORMS: Mapping[Part, str] = {
    "norm before attention": "norm_pre_attn",
    "norm behind attention": "norm_post_attn",
    "output": "norm_out",
}
_WEIGHTS: Mapping[Part, tuple[str, ...]] = {
    "queries": ("self_attn.q_proj",),
    "keys": ("self_attn.k_proj",),
    "values": ("self_attn.v_proj",),
    "output projection": ("self_attn.post",),
    "light convolution": (
        "lconv1d.pre_layer_norm",
        "lconv1d.linear_start",
        "lconv1d.depthwise_conv1d",
        "lconv1d.conv_norm",
        "lconv1d.linear_end",
    ),
    "first feed-forward": tuple(f"feed_forward1.{name}" for name in _FEED_FORWARD),
    "second feed-forward": tuple(f"feed_forward2.{name}" for name in _FEED_FORWARD),
}
_NAMES: Mapping[str, str] = {
    **{path: NAMES[path] for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    "self_attn.post": "the output kernel",
    **{path: part for part, path in _NORMS.items() if part != "output"},
    "norm_out": "last norm",
    "lconv1d.pre_layer_norm": "norm before the convolution",
    "lconv1d.linear_start": "the kernel before the convolution",
    "lconv1d.depthwise_conv1d": "the convolution's kernel",
    "lconv1d.conv_norm": "norm behind the convolution",
    "lconv1d.linear_end": "the kernel behind the convolution",
    **{
        f"feed_forward{number}.{path}": f"{words} of the {ordinal} feed-forward"
        for number, ordinal in ((1, "first"), (2, "second"))
        for path, words in zip(
            _FEED_FORWARD,
            ("norm before", "the first kernel", "the second kernel", "norm behind"),
            strict=True,
        )
    },
}
_FRAMES = "audio_tower.subsample_conv_projection"


def of_layer(subject: Subject, part: Part, exact: Mapping[Part, Any]) -> Iterator[Trial]:
    """In a part of a layer, whose parts rightly make `exact`."""
    if part == "attention":
        yield from _of_attention(subject, exact["queries"].shape[1])
    elif part in _NORMS:
        yield from of_norm(subject, _NORMS[part], _NAMES)
    elif part in _WEIGHTS:
        yield from of_exchange(subject, part)
        if part == "light convolution":
            yield from _of_convolution(subject)
        if part in ("first feed-forward", "second feed-forward"):
            yield from _of_feed_forward(subject, part)
        yield from of_modules(subject, _WEIGHTS[part], _NAMES)


def of_ends(subject: Subject, part: Part, exact: Mapping[Part, Any]) -> Iterator[Trial]:
    """In a part before or behind the layers; the subject is the model."""
    if part == "subsampled frames":
        yield from _of_frames(subject)
    elif part == "projected frames":
        path = "audio_tower.output_proj"
        bias = subject.weight(f"{path}.bias")
        if bias is not None:
            yield Trial("its bias is lost", {f"{path}.bias": bias * 0})
            yield Trial("its bias is subtracted", {f"{path}.bias": -bias})
            yield Trial("its bias is added twice", {f"{path}.bias": bias * 2})
        yield from of_kernel(subject, path, "its kernel", matrix_edits())
    else:
        yield from of_projection(subject, part, "embed_audio")


def _of_attention(subject: Subject, frames: int) -> Iterator[Trial]:
    import torch

    attention, path = subject.layer.self_attn, "self_attn"
    yield from _of_mask(subject, frames)
    root = attention.head_dim**-0.5
    yield Trial("scores are not divided by the root of head_dim", {f"{path}.q_scale": 1 / log(2)})
    yield Trial("queries are not divided by ln 2", {f"{path}.q_scale": root})
    yield Trial("queries have no scale", {f"{path}.q_scale": 1.0})
    yield Trial("keys have no scale", {f"{path}.k_scale": 1.0})
    yield Trial("keys are not divided by ln 2", {f"{path}.k_scale": log(1 + e)})
    yield Trial("the soft-cap is lost", {f"{path}.softcap": attention.softcap * 1e9})
    scale = attention.per_dim_scale
    yield Trial("the scale of each feature is lost", {f"{path}.per_dim_scale": scale * 0})
    words = "the scale of each feature is not made positive by softplus"
    plain = SimpleNamespace(**{**vars(torch.nn.functional), "softplus": identity})
    yield Trial(words, functions={"F": plain})
    for number in neighbours(subject, subject.layers):
        other = subject.other(number, f"{path}.per_dim_scale")
        words = f"the scale of each feature is that of layer {number}"
        yield Trial(words, {f"{path}.per_dim_scale": other})
    yield from of_modules(
        subject, [f"{path}.relative_k_proj"], {f"{path}.relative_k_proj": "the positions' kernel"}
    )
    waves = subject.named["position_embeddings"]
    for words, changed in (
        ("distances are counted from the other end", waves.flip(-2)),
        ("distances are shifted by one", waves.roll(1, -2)),
        ("distances are shifted by one", waves.roll(-1, -2)),
        ("sine and cosine of distances are exchanged", waves.roll(waves.shape[-1] // 2, -1)),
        (
            "sine and cosine of distances are interleaved",
            waves.unflatten(-1, (2, -1)).swapaxes(-1, -2).flatten(-2),
        ),
        ("positions are lost", waves * 0),
    ):
        yield Trial(words, called={"position_embeddings": changed})


def _of_mask(subject: Subject, frames: int) -> Iterator[Trial]:
    """In which frames of a block see which around it: a mask [1 1 blocks frames context]."""
    import torch

    mask, past = subject.named.get("attention_mask"), subject.layer.self_attn.max_past_horizon
    if mask is None:
        return
    blocks, chunk, context = mask.shape[-3:]
    first = chunk * torch.arange(blocks, device=mask.device)[:, None, None]
    query = torch.arange(chunk, device=mask.device)[:, None]
    key = torch.arange(context, device=mask.device) - past
    back, there = query - key, (first + key >= 0) & (first + torch.maximum(query, key) < frames)
    seen = mask if mask.dtype == torch.bool else mask == 0

    def trial(words: str, sees: torch.Tensor) -> Trial:
        changed = sees if mask.dtype == torch.bool else torch.where(sees, 0.0, mask.min())
        return Trial(words, called={"attention_mask": changed.to(mask.dtype)})

    yield trial("its window is one frame too long", seen | ((back == past) & there))
    yield trial("its window is one frame too short", seen & (back != past - 1))
    yield trial("frames that are not there are seen", seen | ~there)
    yield trial("frames before and behind the window are seen", torch.ones_like(seen))
    yield trial("its mask is inverted", ~seen)


def _of_feed_forward(subject: Subject, part: Part) -> Iterator[Trial]:
    here, there = ("feed_forward1", "feed_forward2")
    other = "second"
    if part == "second feed-forward":
        here, there, other = there, here, "first"
    places = [subject.kernel(path) for path in _WEIGHTS[part]]
    theirs = {place: subject.weight(place.replace(here, there)) for place in places}
    words = f"is that of the {other} feed-forward"
    yield Trial(f"its weights are those of the {other} feed-forward", theirs)
    for path in (f"{here}.ffw_layer_1", f"{here}.ffw_layer_2"):
        place, (name, _, _) = subject.kernel(path), _NAMES[path].partition(" of ")
        yield Trial(f"{name} {words}", {place: theirs[place]})
    yield Trial("its half is lost", {f"{here}.post_layer_scale": 1.0})
    yield Trial("it is halved twice", {f"{here}.post_layer_scale": 0.25})
    down = f"{here}.post_layer_norm.weight"
    yield Trial("what it adds is lost", {down: subject.layer.get_parameter(down) * 0})
    yield from _of_activation(f"{here}.act_fn.forward")


def _of_convolution(subject: Subject) -> Iterator[Trial]:
    import torch

    start, path = subject.kernel("lconv1d.linear_start"), "lconv1d.depthwise_conv1d"
    doubled = subject.weight(start)
    if doubled is not None:
        signal, gate = doubled.chunk(2)
        yield Trial("signal and gate are exchanged", {start: torch.cat([gate, signal])})
        for outer in (2, len(gate)):
            yield Trial("signal and gate are interleaved", {start: regrouped(doubled, outer, 0)})
    yield from of_kernel(subject, path, "the convolution's kernel", _edits_of_taps())
    centred = {f"{path}.forward": _centred(subject.layer.get_submodule(path))}
    yield Trial("the convolution sees frames that follow", centred)
    yield from _of_activation("lconv1d.act_fn.forward")


def _edits_of_taps() -> Iterator[tuple[str, Edit]]:
    """Of the kernel of a convolution of each channel by itself [channels 1 taps]."""
    yield "its taps are in reverse order", lambda values: values.flip(-1)
    yield "its taps are shifted by one", lambda values: values.roll(1, -1)
    yield "its taps are shifted by one", lambda values: values.roll(-1, -1)
    words = "taps and channels are exchanged"
    yield words, lambda values: values.movedim(0, -1).reshape(values.shape)
    yield words, lambda values: values.reshape(values.shape[-1], -1).T.reshape(values.shape)
    yield "its channels are in reverse order", lambda values: values.flip(0)
    yield "its channels are shifted by one", lambda values: values.roll(1, 0)
    yield "its channels are shifted by one", lambda values: values.roll(-1, 0)


def _centred(convolution: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a causal convolution makes where it sees as many frames behind as before."""
    import torch

    def forward(states: torch.Tensor) -> torch.Tensor:
        left = convolution.left_pad // 2
        padded = torch.nn.functional.pad(states, (left, convolution.left_pad - left))
        return torch.conv1d(padded, convolution.weight, groups=convolution.groups)

    return forward


def _of_activation(path: str) -> Iterator[Trial]:
    import torch

    yield Trial("its activation is lost", {path: identity})
    yield Trial("its activation is the exact GELU", {path: torch.nn.functional.gelu})
    tanh = torch.nn.GELU(approximate="tanh").forward
    yield Trial("its activation is GELU", {path: tanh})
    yield Trial("its activation is ReLU", {path: torch.nn.functional.relu})


def _of_frames(subject: Subject) -> Iterator[Trial]:
    both = {f"{_FRAMES}.layer{number}.act.forward": identity for number in range(2)}
    yield Trial("the activations of both convolutions are lost", both)
    channels = 1
    for number, ordinal in ((0, "first"), (1, "second")):
        layer = f"{_FRAMES}.layer{number}"
        convolution, norm, act = f"{layer}.conv", f"{layer}.norm", f"{layer}.act.forward"
        name = f"the {ordinal} convolution's kernel"
        yield from of_kernel(subject, convolution, name, _edits())
        names = {f"{_FRAMES}.layer{one}.norm": "other convolution" for one in range(2)}
        for trial in of_norm(subject, norm, names):
            yield Trial(f"the {ordinal} convolution's norm: {trial.mistake}", trial.set)
        yield Trial(f"the {ordinal} convolution's activation is lost", {act: identity})
        channels = subject.layer.get_submodule(convolution).out_channels
    path, words = f"{_FRAMES}.input_proj_linear", "its bands and channels are exchanged"
    weight = subject.weight(f"{path}.weight")
    bands = 1 if weight is None else weight.shape[1] // channels
    crossed: list[tuple[str, Edit]] = [
        (words, lambda values: regrouped(values, channels, 1)),
        (words, lambda values: regrouped(values, bands, 1)),
    ]
    yield from of_kernel(subject, path, "the frames' kernel", [*crossed, *matrix_edits()])


def _edits() -> Iterator[tuple[str, Edit]]:
    """Of the kernel of a convolution [out in time bands]."""
    yield "time and bands are exchanged", lambda values: values.swapaxes(2, 3)
    yield "its taps are in reverse order", lambda values: values.flip(2, 3)
    yield "its taps are in reverse order in time", lambda values: values.flip(2)
    yield "its taps are in reverse order in bands", lambda values: values.flip(3)
    words = "its axes are taken for those of a kernel (time bands in out)"
    yield words, lambda values: values.permute(2, 3, 1, 0).reshape(values.shape)
    words = "its axes (time bands in out) are not put in order"
    yield (
        words,
        lambda values: values.reshape(*values.shape[2:], *values.shape[1::-1]).permute(3, 2, 0, 1),
    )
    yield "its outputs are in reverse order", lambda values: values.flip(0)
    yield "its inputs are in reverse order", lambda values: values.flip(1)
    yield "its outputs are shifted by one", lambda values: values.roll(1, 0)
    yield "its outputs are shifted by one", lambda values: values.roll(-1, 0)
    yield "it is zero", lambda values: values * 0
