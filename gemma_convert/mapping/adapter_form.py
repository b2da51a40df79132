"""`[adapter]` of a mapping table → how a layout has an adapter.

```toml
[adapter]
root = "params/"                       # of the arrays, and not of the matrices
a = "{array}_lora_a [(in) rank]"       # (in): all input axes of the weight in one dimension
b = "{array}_lora_b [rank (out)]"
targets = ["model.layers.{layer}.self_attn.q_proj.weight"]
scanned = "why scanned layers take none"
experts = "why batched experts take none"
```
"""

from __future__ import annotations

from collections.abc import Iterable

from gemma_convert.mapping.record import Record
from gemma_convert.mapping.rows import AdapterForm, MatrixForm, NativeRow


def adapter_form(record: Record, rows: Iterable[NativeRow]) -> AdapterForm:
    """The form in the table `record` of a layout that has these `rows`.

    Raises MappingError for targets that no row converts, or of which an array has other axes.
    """
    rows = list(rows)
    record.only("root", "a", "b", "targets", "scanned", "experts")
    targets = record.texts("targets")
    for name in targets:
        found = [row for row in rows if row.hf.view.pattern.text == name]
        if not found:
            raise record.error("`targets` names no weight that a row converts.", found=name)
        for row in found:
            whole = {axis for dim in row.hf.view.dims for axis in dim}
            if whole != {axis for dim in row.native.dims for axis in dim}:
                raise record.error(
                    "The array of an adapted weight has the axes of that weight, and no others.",
                    expected=str(row.hf.view),
                    found=str(row.native),
                )
    return AdapterForm(
        root=record.text("root", ""),
        a=_matrix_form(record, "a"),
        b=_matrix_form(record, "b"),
        targets=targets,
        scanned=record.text("scanned") if record.has("scanned") else None,
        experts=record.text("experts") if record.has("experts") else None,
    )


def _matrix_form(record: Record, key: str) -> MatrixForm:
    text = record.text(key)
    name, bracket, shape = text.partition(" [")
    words = tuple(shape.removesuffix("]").split())
    axes = "in" if key == "a" else "out"
    wanted = {(axes, "rank"), ("rank", axes), (f"({axes})", "rank"), ("rank", f"({axes})")}
    if "{array}" not in name or not bracket or words not in wanted:
        raise record.error(
            "A matrix of an adapter is a path with {array}, and its dimensions.",
            expected=f"{{array}}_lora_{key} [({axes}) rank], with or without parentheses",
            found=text,
        )
    return MatrixForm(name, words)
