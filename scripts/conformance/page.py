"""The page of what was measured with the real frameworks, docs/conformance.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from frameworks import FRAMEWORKS, Framework

TITLES = {"e2b": "E2B", "e4b": "E4B", "12b": "12B", "26b-a4b": "26B-A4B", "31b": "31B"}

Records = Sequence[Mapping[str, Any]]

HEAD = """\
# Tried with the real frameworks

What the released frameworks themselves make of conversions. Written by `scripts/conformance.sh`,
which installs them and runs everything here; no figure is typed. All of it is in
[conformance.json](conformance.json).

<!-- not run: needs the frameworks, gigabytes of packages -->
```bash
scripts/conformance.sh                          # versions as pinned in scripts/conformance/*.txt
scripts/conformance.sh --latest maxtext         # the newest releases, of one framework
scripts/conformance.sh --models "e2b 31b" --out build/report gemma
```

Of each model that a framework knows a tiny random checkpoint is converted, with `--dtype float32`,
and the framework

1. loads it with the settings that `to-native` printed, and computes logits of 80 made-up tokens;
2. trains three steps from it on made-up data, by its own trainer where it has one, and saves;
3. loads what it saved, and computes the logits again. `to-hf` exports the same to Hugging Face,
   `verify` compares the two, and transformers computes the logits of the export;
4. where it has adapters: loads one that PEFT made and `to-native` converted, beside the
   converted model, trains three steps of that alone and saves it. `to-hf` makes an adapter of PEFT
   of what was saved. PEFT, beside transformers, computes the logits of both, and its merge is
   compared with that of `to-native --merge`.

All in float32 on the CPU, compiled by XLA without optimising, with the fewest layers that have
every kind of them. Limits of logits bound the largest Kullback-Leibler divergence of a token, in
nats; a mistake in the mapping costs 2e-3 to 15. `.github/workflows/conformance.yml` runs `--latest`
every week.
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
    yield "| | limit | " + " | ".join(map(_column, own)) + " |"
    yield "|---|---|" + "---|" * len(own)
    checks = list(dict.fromkeys(row["check"] for one in own for row in one["rows"]))
    for check in checks:
        rows = [next((r for r in one["rows"] if r["check"] == check), None) for one in own]
        limit = next(_limit(row) for row in rows if row is not None)
        yield f"| {check} | {limit} | " + " | ".join(map(_cell, rows)) + " |"
    yield ""
    installed = {
        name: number
        for one in own
        for name, number in one["versions"].items()
        if name != framework.package
    }
    yield "Beside it: " + ", ".join(f"{name} {number}" for name, number in installed.items()) + "."
    yield ""
    for row in (row for one in own for row in one["rows"] if row["note"]):
        yield f"* {row['check']}: {row['note']}"


def _column(record: Mapping[str, Any]) -> str:
    return TITLES[record["model"]] + " scanned" * record["scanned"]


def _limit(row: Mapping[str, Any]) -> str:
    if row["limit"] is None:
        return "told only"
    return f"{'≥' if row['least'] else '≤'} {_number(row['limit'])}"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    figure = "none" if row["figure"] is None else _number(row["figure"])
    return figure if row["passed"] else f"**{figure}: failed**"


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1e}"
