"""What `mappings` lists: the formats, one format's table, or every tensor of a model in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from gemma_convert.api.arguments import public
from gemma_convert.arrays.dtypes import DTypePolicy, TensorSpec
from gemma_convert.errors import UsageError
from gemma_convert.layouts.registry import usable_layouts
from gemma_convert.mapping.fact_listing import FactEntry, list_facts
from gemma_convert.mapping.facts import load_facts
from gemma_convert.mapping.listing import Entry, TableEntry, list_table, list_tensors
from gemma_convert.mapping.planning import plan_to_native
from gemma_convert.mapping.table import load_table
from gemma_convert.model.architecture import Architecture
from gemma_convert.output import note
from gemma_convert.published.models import named_model


@dataclass(frozen=True)
class ModelSizes:
    """What one model is in one format: tensors that are converted, equal to another, or carried."""

    tensors: int
    equal: int
    carried: int
    arrays: int
    filled: int
    bytes: int


@dataclass(frozen=True)
class FormatSummary:
    """One format. `refused` says which models it cannot hold, or with a model, why it cannot."""

    format: str
    framework: str
    rows: int
    scans: bool
    refused: tuple[str, ...]
    model: ModelSizes | None


@dataclass(frozen=True)
class MappingsReport:
    """A list of all layouts, of the rows or config keys of one layout, or of a model's tensors."""

    format: str | None
    model: str | None
    family: str | None
    scanned: bool
    formats: tuple[FormatSummary, ...] = ()
    rows: tuple[TableEntry, ...] = ()
    tensors: tuple[Entry, ...] = ()
    facts: tuple[FactEntry, ...] = ()

    def as_json(self) -> dict[str, object]:
        """The listing for `--json`."""
        return {"schema": "gemma-convert/mappings/2", **asdict(self)}


@public
def list_mappings(
    layout: str | None = None,
    model: str | None = None,
    *,
    framework_version: str | None = None,
    scan_layers: bool = False,
    facts: bool = False,
) -> MappingsReport:
    """Returns the mapping of the layout `layout` for `model`, a published name or a path.

    Without `layout` there is one entry for each layout; without `model` the table is listed as it
    is written. With `facts` the keys of config.json are listed instead of tensors.
    `framework_version` is one that the layout supports, by default its first. Raises UsageError for
    an unknown layout, for a model that it has no place for and for scanned layers that it does not
    have; SourceError if there is no such model.
    """
    if scan_layers and (layout is None or model is None):
        raise UsageError(
            "--scan-layers needs a layout and a model.",
            do="add --format and --model, or drop --scan-layers",
        )
    if facts and (layout is None or scan_layers):
        raise UsageError(
            "--facts needs a layout, and does not depend on --scan-layers.",
            do="add --format, and drop --scan-layers",
        )
    if framework_version is not None and layout is None:
        raise UsageError("--framework-version needs a layout.", do="add --format")
    found = None if model is None else named_model(model)
    family = None if found is None else found[0].family
    if facts and layout is not None:
        entries = _facts(layout, framework_version, found)
        return MappingsReport(layout, model, family, False, facts=entries)
    if layout is None:
        return MappingsReport(None, model, family, False, formats=_summaries(found))
    table = load_table(layout, framework_version)
    if model is None or found is None:
        return MappingsReport(layout, None, None, False, rows=list_table(table))
    architecture, source = found
    plan = plan_to_native(
        architecture, table, source, DTypePolicy(), scanned=scan_layers, where=model
    )
    return MappingsReport(
        layout, model, family, scan_layers, tensors=list_tensors(plan, table, source)
    )


def _facts(
    layout: str,
    version: str | None,
    found: tuple[Architecture, Mapping[str, TensorSpec]] | None,
) -> tuple[FactEntry, ...]:
    table = load_facts(layout, version)
    if table is None:
        raise UsageError(
            f"The layout {layout} lists no keys of config.json.", do="leave out --facts"
        )
    return list_facts(table, None if found is None else found[0])


def _summaries(
    found: tuple[Architecture, Mapping[str, TensorSpec]] | None,
) -> tuple[FormatSummary, ...]:
    unusable: list[UsageError] = []
    summaries = list(_usable_summaries(found, unusable))
    for error in unusable:
        note(error.message, "warning")
    return tuple(summaries)


def _usable_summaries(
    found: tuple[Architecture, Mapping[str, TensorSpec]] | None, unusable: list[UsageError]
) -> Iterator[FormatSummary]:
    for layout in usable_layouts(unusable):
        try:
            table = load_table(layout.name)
        except UsageError as error:
            unusable.append(error)
            continue
        refused: tuple[str, ...] = tuple(entry.why for entry in table.refused)
        sizes = None
        if found is not None:
            architecture, source = found
            refused = tuple(e.why for e in table.refused if e.when.holds(architecture, {}))
            sizes = None if refused else _sizes(layout.name, architecture, source)
        rows, scans = len(table.rows), bool(table.placements)
        yield FormatSummary(layout.name, layout.framework, rows, scans, refused, sizes)


def _sizes(layout: str, architecture: Architecture, source: Mapping[str, TensorSpec]) -> ModelSizes:
    plan = plan_to_native(architecture, load_table(layout), source, DTypePolicy())
    return ModelSizes(
        tensors=len(plan.sources),
        equal=len(plan.equal),
        carried=len(plan.carried),
        arrays=len(plan.targets),
        filled=len(plan.filled),
        bytes=plan.target_bytes,
    )
