"""The page of the verification cards, docs/cards/index.md, made from docs/cards/cards.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def page(data: Mapping[str, Any]) -> str:
    """The text of docs/cards/index.md."""
    versions = ", ".join(f"{name} {one}" for name, one in data["versions"].items())
    done = [card for card in data["cards"] if card["refused"] is None]
    lines = [
        "# Verification cards",
        "",
        "What was verified of each model in each layout, by which command, when, with which",
        "figure. Written by `scripts/cards.py`, which runs the commands; no figure is typed. All",
        "of it is in [cards.json](cards.json).",
        "",
        *_overview(data["cards"]),
        "",
        "*Published*: tensors of the published checkpoint → arrays, from the list of its tensors:",
        "each has one fate, each element of each array is covered once. *Back*: files of a tiny",
        "checkpoint that came back with their old bytes. *KL*: the worst token, converted against",
        "original, in nats. *Framework*: our forward pass on a checkpoint that the framework wrote",
        "or loaded, against transformers.",
        "",
        f"Versions: {versions}.",
        "",
        *(line for card in done for line in _section(card)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _overview(cards: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| card | published | back | KL text | image | sound | framework |"
    yield "|---|---|---|---|---|---|---|"
    for card in cards:
        if card["refused"] is not None:
            yield f"| {card['name']} | refused: {card['refused']} | | | | | |"
            continue
        published, tiny, framework = card["published"], card["tiny"], card["framework"]
        figures = [_figure(tiny["kl"].get(one)) for one in ("text", "image", "sound")]
        figures.append(_figure(None if framework is None else framework["kl"]))
        counts = f"{published['tensors']} → {published['arrays']}"
        back = f"{tiny['identical']} of {tiny['files']}"
        yield f"| [{card['name']}](#{card['name']}) | {counts} | {back} | {' | '.join(figures)} |"


def _section(card: Mapping[str, Any]) -> Iterator[str]:
    published, tiny, framework = card["published"], card["tiny"], card["framework"]
    yield from (f"## {card['name']}", "", "| what | figure |", "|---|---|")
    parts = [f"{published['converted']} converted", f"{published['carried']} carried"]
    parts += [f"{published[one]} {one}" for one in ("shared", "filled") if published[one]]
    yield (
        f"| published {published['model']} | {published['tensors']} tensors: {', '.join(parts)}; "
        f"{published['arrays']} arrays |"
    )
    yield f"| tiny, `verify` | {tiny['arrays']} tensors, none different |"
    back = f"{tiny['identical']} of {tiny['files']}"
    yield f"| tiny, there and back | {back} files have their sha256 |"
    for sense, value in tiny["kl"].items():
        yield f"| tiny, `logit-check`, {sense} | {_figure(value)} |"
    if framework is not None:
        yield f"| the framework's checkpoint, `verify` | {framework['arrays']} tensors |"
        yield f"| the framework's checkpoint, `logit-check` | {_figure(framework['kl'])} |"
        yield f"| the framework's own logits | {_figure(framework['own_kl'])} |"
        yield f"| our pass against its logits | `{framework['test']}` |"
    yield from ("", f"Measured on {card['date']} by:", "", "```text", *card["commands"], "```", "")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
