"""What `to-native` prints of its report: summary, settings, and with `--dry-run` the arrays."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from gemma_convert.cli.copied import copied
from gemma_convert.errors import some

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gemma_convert.output import Facts
    from gemma_convert.tasks.reports import LossyRow, ToNativeReport


def summary(report: ToNativeReport) -> Facts:
    """What was converted, carried and copied, a line each."""
    from gemma_convert.output import Facts, counted, human_bytes

    table = Facts()
    form = ", scanned" if report.scanned else ""
    words = "would convert" if report.dry_run else "converted"
    before = ", by an earlier run" if report.already_complete else ""
    table.add_row(words, f"{report.family} to {report.layout}{form}{before}")
    table.add_row(
        "tensors",
        f"{report.tensors_converted} ({human_bytes(report.bytes_read)}) into "
        f"{counted(report.arrays_written, 'array')} ({human_bytes(report.bytes_written)})",
    )
    for label, text in _adapter(report):
        table.add_row(label, text)
    table.add_row("carried", _carried(report))
    for why, count in report.carried_why.items():
        table.add_row("", f"{counted(count, 'tensor')}: {why}")
    if report.tied:
        table.add_row("tied", f"{', '.join(report.tied)}: equal to the embedding, not stored twice")
    if report.shared:
        shared = counted(report.shared, "tensor")
        table.add_row("shared", f"{shared}: equal to another, not stored twice")
    if report.filled:
        filled = counted(len(report.filled), "array")
        table.add_row("filled in", f"{filled} that the source does not have")
    table.add_row("other files", copied(report.files_carried))
    if report.not_carried:
        table.add_row("not copied", ", ".join(report.not_carried))
    if report.exceptions:
        exceptions = counted(report.exceptions, "value")
        table.add_row("exceptions", f"{exceptions}, whose original bits are kept")
    for names, reason, values in _rounded(report):
        table.add_row("rounded", f"{some(names, 3)}: {reason}, {counted(values, 'value')}")
    done = not report.dry_run and not report.already_complete
    if report.sealed and done:
        count = len(report.changed_arrays)
        intact = "unchanged since it was converted"
        arrays = counted(count, "array has", "arrays have")
        changed = f"{arrays} changed since it was converted (trained, or damaged)"
        table.add_row("source", changed if count else intact)
    if done:
        table.add_row(
            "time",
            f"{report.seconds:.1f} s, {human_bytes(report.bytes_per_second)}/s, "
            f"peak memory {human_bytes(report.peak_memory_bytes)}",
        )
    return table


def lossy_warnings(report: ToNativeReport) -> list[str]:
    """One sentence for each reason for which values are rounded."""
    from gemma_convert.output import counted, printable

    return [
        printable(f"{some(names, 3)} {'is' if len(names) == 1 else 'are'} {reason}")
        + f"; {counted(values, 'value')} cannot be restored exactly"
        for names, reason, values in _rounded(report)
    ]


def _rounded(report: ToNativeReport) -> Iterator[tuple[list[str], str, int]]:
    """The tensors that were rounded for each reason, and how many of their values."""
    rows: dict[str, list[LossyRow]] = {}
    for row in report.lossy_rows:
        rows.setdefault(row.reason, []).append(row)
    for reason, of_reason in rows.items():
        yield [row.tensor for row in of_reason], reason, sum(row.values for row in of_reason)


def _carried(report: ToNativeReport) -> str:
    """How many tensors are kept in the sidecar, for the reasons that the next lines give."""
    from gemma_convert.output import counted, human_bytes

    if not report.tensors_carried:
        return "nothing: every tensor has its place in the layout"
    size = human_bytes(report.bytes_carried)
    return (
        f"{counted(report.tensors_carried, 'tensor')} ({size}), kept bit for bit in the sidecar hf/"
    )


def _adapter(report: ToNativeReport) -> Iterator[tuple[str, str]]:
    from gemma_convert.output import counted

    adapter = report.adapter
    if adapter is None:
        return
    words = "merged, rank {rank}, alpha {alpha:g}: {changed} changed"
    if not adapter["merged"]:
        words = "rank {rank}, alpha {alpha:g}, for {changed}"
    yield (
        "adapter",
        words.format(**adapter, changed=counted(int(str(adapter["weights"])), "weight")),
    )
    if adapter["base"] is not None:
        yield "base model", str(adapter["base"])


def arrays(report: ToNativeReport) -> Iterator[str]:
    """One line an array: where it goes, how it is stored, what it is made of."""
    if report.plan is None:
        return
    sources: dict[str, list[str]] = {}
    for copy in report.plan.copies:
        sources.setdefault(copy.target.tensor, []).append(copy.source.tensor)
    for name, target in report.plan.targets.items():
        shape, chunk = list(target.spec.shape), list(target.chunk)
        cut = "" if chunk == shape else f" in chunks of {chunk}"
        if target.fill is not None:
            yield f"{name} {target.spec.dtype} {shape}{cut} filled with {target.fill}"
            continue
        first, *more = sources[name]
        others = f" and {len(more)} more" if more else ""
        yield f"{name} {target.spec.dtype} {shape}{cut} <- {first}{others}"


def settings_lines(report: ToNativeReport) -> Iterator[str]:
    """The settings, to be pasted: into the framework's command line, or into a Python program.

    They are lines of Python where the layout has `imports` (name → the line that imports it).
    """
    from gemma_convert.layouts.registry import load_layout

    imports = getattr(load_layout(report.layout), "imports", None)
    if imports is None:
        for key, value in report.settings.items():
            yield f"  {shlex.quote(f'{key}={value}')}"
        return
    program = [f"{key} = {value}" for key, value in report.settings.items()]
    for name, line in imports.items():
        if re.search(rf"\b{name}\b", "\n".join(program)):
            yield line
    yield from program
