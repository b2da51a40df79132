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
        "This page has the results of the checks for each model in each layout, with the commands",
        "and the dates. `scripts/cards.py` runs the commands and writes this page; all results are",
        "also in [cards.json](cards.json).",
        "",
        *_overview(data["cards"]),
        "",
        "*Published*: the numbers of tensors of the published checkpoint and of arrays, planned",
        "from the list of its tensors: each tensor is converted or carried exactly once, and each",
        "element of each array is covered exactly once. *Back*: the files of a tiny checkpoint",
        "that `to-hf` wrote again with the same bytes. *KL*: the KL of the worst token, original",
        "against conversion, in nats, for text, an image and a sound. *Framework*: the same for a",
        "checkpoint that the framework itself wrote or loaded.",
        "",
        "*Refused*: the layout has no place for the model.",
        "",
        *(f"* {card['name']}: {card['refused']}" for card in data["cards"] if card["refused"]),
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
            yield f"| {card['name']} | refused | | | | | |"
            continue
        published, tiny, framework = card["published"], card["tiny"], card["framework"]
        figures = [_figure(tiny["kl"].get(one)) for one in ("text", "image", "sound")]
        figures.append(_figure(None if framework is None else framework["kl"]))
        counts = f"{published['tensors']} → {published['arrays']}"
        back = f"{tiny['identical']} of {tiny['files']}"
        yield f"| [{card['name']}](#{card['name']}) | {counts} | {back} | {' | '.join(figures)} |"


def _section(card: Mapping[str, Any]) -> Iterator[str]:
    published, tiny, framework = card["published"], card["tiny"], card["framework"]
    yield from (f"## {card['name']}", "", "| check | result |", "|---|---|")
    parts = [f"{published['converted']} converted", f"{published['carried']} carried"]
    parts += [f"{published[one]} {one}" for one in ("shared", "filled") if published[one]]
    yield (
        f"| published {published['model']} | {published['tensors']} tensors: {', '.join(parts)}; "
        f"{published['arrays']} arrays |"
    )
    yield f"| tiny, `verify` | {tiny['arrays']} tensors, no differences |"
    back = f"{tiny['identical']} of {tiny['files']}"
    yield f"| tiny, `to-hf` | {back} files have the same sha256 as before |"
    for sense, value in tiny["kl"].items():
        yield f"| tiny, `logit-check`, {sense} | KL {_figure(value)} |"
    if framework is not None:
        yield f"| the framework's checkpoint, `verify` | {framework['arrays']} tensors |"
        yield f"| the framework's checkpoint, `logit-check` | KL {_figure(framework['kl'])} |"
        own = _figure(framework["own_kl"])
        yield f"| the framework's own logits, against transformers | KL {own} |"
        yield f"| the framework's own logits, against `logit-check` | `{framework['test']}` |"
    yield from (
        "",
        f"Measured on {card['date']} with:",
        "",
        "```text",
        *card["commands"],
        "```",
        "",
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
