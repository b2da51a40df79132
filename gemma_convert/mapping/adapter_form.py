"""`[adapter]` of a mapping table → how a layout has an adapter.

```toml
[adapter]
array = "params/{array}"               # what {array} stands for, of the path of an array
a = "{array}_lora_a [(in) rank]"       # (in): all input axes of the weight in one dimension
b = "{array}_lora_b [rank (out)]"
targets = ["model.layers.{layer}.self_attn.q_proj.weight"]
unread = "why matrices of arrays that nothing reads, which are filled in, are carried"
scanned = "why scanned layers take none"
experts = "why batched experts take none"
```
"""

from __future__ import annotations

from collections.abc import Iterable

from gemma_convert.mapping.record import Record
from gemma_convert.mapping.rows import AdapterForm, MatrixForm, NativeRow

ARRAY = "{array}"


def adapter_form(record: Record, rows: Iterable[NativeRow]) -> AdapterForm:
    """The form in the table `record` of a layout that has these `rows`.

    Raises MappingError for targets that no row converts, or of which an array lacks an axis.
    """
    rows = list(rows)
    record.only("array", "a", "b", "targets", "unread", "scanned", "experts")
    before, array, behind = record.text("array", ARRAY).partition(ARRAY)
    if not array or ARRAY in behind:
        raise record.error("`array` is a path with {array}.", found=record.text("array"))
    targets = record.texts("targets")
    for name in targets:
        found = [row for row in rows if row.hf.view.pattern.text == name]
        if not found:
            raise record.error("`targets` names no weight that a row converts.", found=name)
        for row in found:
            weight = {axis for dim in row.hf.view.dims for axis in dim}
            array_axes = {axis for dim in row.native.dims for axis in dim}
            more = array_axes - weight
            if len(row.hf.view.dims) != 2 or not weight <= array_axes or len(more) > 1:
                raise record.error(
                    "An adapted weight is a matrix, and its array has its axes and at most one "
                    "more, along which it has several.",
                    expected=str(row.hf.view),
                    found=str(row.native),
                )
            if row.fill is not None and not record.has("unread"):
                raise record.error("`unread` says why matrices of arrays filled in are carried.")
    return AdapterForm(
        around=(before, behind),
        a=_matrix_form(record, "a"),
        b=_matrix_form(record, "b"),
        targets=targets,
        unread=record.text("unread") if record.has("unread") else None,
        scanned=record.text("scanned") if record.has("scanned") else None,
        experts=record.text("experts") if record.has("experts") else None,
    )


def _matrix_form(record: Record, key: str) -> MatrixForm:
    text = record.text(key)
    name, bracket, shape = text.partition(" [")
    words = tuple(shape.removesuffix("]").split())
    axes = "in" if key == "a" else "out"
    wanted = {(axes, "rank"), ("rank", axes), (f"({axes})", "rank"), ("rank", f"({axes})")}
    if ARRAY not in name or not bracket or words not in wanted:
        raise record.error(
            "A matrix of an adapter is a path with {array}, and its dimensions.",
            expected=f"{{array}}_lora_{key} [({axes}) rank], with or without parentheses",
            found=text,
        )
    return MatrixForm(name, words)
