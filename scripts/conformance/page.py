"""The page of what was measured with the real frameworks, docs/conformance.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from frameworks import FRAMEWORKS, Framework

TITLES = {"e2b": "E2B", "e4b": "E4B", "12b": "12B", "26b-a4b": "26B-A4B", "31b": "31B"}

Records = Sequence[Mapping[str, Any]]

HEAD = """\
# Tried with the real frameworks

The released frameworks load, run, train and save checkpoints that gemma-convert converted for
them. `scripts/conformance.sh` installs them, runs everything that is described here, and writes
this page; all results are also in [conformance.json](conformance.json).

<!-- not run: needs the frameworks, gigabytes of packages -->
```bash
scripts/conformance.sh                          # versions as pinned in scripts/conformance/*.txt
scripts/conformance.sh --latest maxtext         # the newest releases, of one framework
scripts/conformance.sh --models "e2b 31b" --out build/report gemma
```

For each model that a framework supports, a tiny checkpoint with random weights is converted, with
`--dtype float32`. Then

1. the framework loads it with the settings that `to-native` printed, and computes the logits of 80
   random tokens;
2. it trains three steps on random data, with its own trainer where it has one, and saves a
   checkpoint;
3. it loads that checkpoint and computes the logits again. `to-hf` exports the same checkpoint to
   Hugging Face, `verify` compares the two, and transformers computes the logits of the export;
4. if it supports adapters, it loads an adapter that PEFT made and `to-native` converted, together
   with the converted model, trains three steps of the adapter alone and saves it. `to-hf` makes a
   PEFT adapter of what was saved. PEFT and transformers compute the logits with both adapters, and
   PEFT's merge of the adapter into the model is compared with that of `to-native --merge`.

Everything is computed in float32 on the CPU, compiled by XLA without optimisations, with the
smallest number of layers that has every kind of layer. The limits of logits are for the largest
Kullback–Leibler divergence (KL) of a token, in nats; a mistake in the mapping causes 2e-3 to 15.
`.github/workflows/conformance.yml` runs `--latest` every week.
"""


def page(records: Records) -> str:
    """The text of docs/conformance.md."""
    lines = [HEAD, *_overview(records)]
    for framework in FRAMEWORKS.values():
        lines += _section(framework, [one for one in records if one["framework"] == framework.name])
    return "\n".join(lines).rstrip() + "\n"


def _overview(records: Records) -> Iterator[str]:
    yield "| framework | version | measured | comparisons | failed |"
    yield "|---|---|---|---|---|"
    for framework in FRAMEWORKS.values():
        own = [one for one in records if one["framework"] == framework.name]
        releases = " and ".join(sorted({one["versions"][framework.package] for one in own}))
        dates = " to ".join(sorted({min(d := [one["date"] for one in own]), max(d)})) if own else ""
        rows = [row for one in own for row in one["rows"] if row["limit"] is not None]
        failed = sum(not row["passed"] for row in rows)
        counts = f"{len(rows)} | {failed}" if own else "not run | "
        yield f"| {framework.title} | {releases} | {dates} | {counts} |"
    yield ""


def _section(framework: Framework, own: Records) -> Iterator[str]:
    yield from (f"## {framework.title}", "")
    if framework.note:
        yield from (framework.note, "")
    measured = {(one["model"], one["scanned"]) for one in own}
    missing = [
        _column({"model": model, "scanned": scanned})
        for model, forms in framework.models.items()
        for scanned in forms
        if (model, scanned) not in measured
    ]
    if missing:
        yield from (f"Not measured yet: {', '.join(missing)}.", "")
    if not own:
        return
    yield "| comparison | limit | " + " | ".join(map(_column, own)) + " |"
    yield "|---|---|" + "---|" * len(own)
    checks = list(dict.fromkeys(row["check"] for one in own for row in one["rows"]))
    for check in checks:
        rows = [next((r for r in one["rows"] if r["check"] == check), None) for one in own]
        limit = next(_limit(row) for row in rows if row is not None)
        yield f"| {check} | {limit} | " + " | ".join(map(_cell, rows)) + " |"
    yield ""
    installed: dict[str, list[str]] = {}
    for name, number in (each for one in own for each in one["versions"].items()):
        if name != framework.package and number not in installed.setdefault(name, []):
            installed[name].append(number)
    named = (f"{name} {' and '.join(sorted(all))}" for name, all in installed.items())
    yield f"Measured with {', '.join(named)}."
    yield ""
    for row in (row for one in own for row in one["rows"] if row["note"]):
        yield f"* {row['check']}: {row['note']}"


def _column(record: Mapping[str, Any]) -> str:
    return TITLES[record["model"]] + " scanned" * record["scanned"]


def _limit(row: Mapping[str, Any]) -> str:
    if row["limit"] is None:
        return "no limit"
    return f"{'≥' if row['least'] else '≤'} {_number(row['limit'])}"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    figure = "none" if row["figure"] is None else _number(row["figure"])
    return figure if row["passed"] else f"**{figure}: failed**"


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1e}"
