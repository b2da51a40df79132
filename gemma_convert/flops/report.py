"""What a count found: one dataclass, its JSON, and its table for a terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gemma_convert.flops.count import Count
from gemma_convert.flops.hardware import TERA, DType, Hardware, Utilization
from gemma_convert.flops.memory import Memory
from gemma_convert.output import counted, human_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = "gemma-convert/flops/2"

_UNITS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")


@dataclass(frozen=True)
class FlopsReport:
    """FLOPs and bytes of one step, and with a measured time how well it was done.

    `memory` is over all `devices`.
    """

    path: str
    count: Count
    memory: Memory
    devices: int = 1
    utilization: Utilization | None = None
    hardware: Hardware | None = None
    dtype: DType | None = None
    sparse: bool = False

    @property
    def attention_to_ffn(self) -> float | None:
        """FLOPs of the attention blocks over those of the feed-forward blocks, text alone."""
        feed_forward = self.count.block("feed-forward")
        return self.count.block("attention") / feed_forward if feed_forward else None

    @property
    def bytes_per_device(self) -> int:
        """What each device holds where weights and sequences are spread evenly, rounded up."""
        return -(-self.memory.total // self.devices)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader should know of the model's count, or of an impossible utilization."""
        mfu = None if self.utilization is None else self.utilization.mfu
        if mfu is None or mfu <= 1:
            return self.count.model.notes
        above = f"MFU is {mfu:.0%}, above the peak: check --step-time, --batch and --devices."
        return (*self.count.model.notes, above)

    def as_json(self) -> dict[str, Any]:
        """The report as strict JSON."""
        count, work, used = self.count, self.count.work, self.utilization
        layers = zip(count.model.layers, count.layers, strict=True)
        return {
            "schema": SCHEMA,
            "path": self.path,
            "family": count.model.family,
            "mode": work.mode,
            "batch": work.batch,
            "tokens": work.tokens,
            "cached": work.cached,
            "logit_positions": work.logits,
            "attention": work.rule,
            "images": work.images,
            "image_tokens": work.image_tokens,
            "bidirectional_images": work.bidirectional_images,
            "sounds": work.sounds,
            "sound_tokens": work.sound_tokens,
            "frozen": sorted(work.frozen),
            "recomputation": work.recomputation,
            "flops": count.total,
            "forward_flops": count.forward,
            "hardware_flops": count.hardware,
            "components": [
                {"part": part, "component": name, "flops": flops, "share": flops / count.total}
                for (part, name), flops in count.components.items()
            ],
            "layers": [
                {
                    "layer": index,
                    "kind": layer.kind,
                    "flops": sum(parts.values()),
                    "components": parts,
                }
                for index, (layer, parts) in enumerate(layers)
            ],
            "attention_to_ffn": self.attention_to_ffn,
            "query_heads_per_kv_head": count.model.groups,
            "hardware": None if self.hardware is None else self.hardware.name,
            "hardware_source": None if self.hardware is None else self.hardware.source,
            "dtype": self.dtype,
            "sparse": self.sparse,
            "peak_flops_per_second": None if used is None else used.peak,
            "devices": self.devices,
            "step_seconds": None if used is None else used.seconds,
            "flops_per_second_per_device": None if used is None else used.per_device,
            "mfu": None if used is None else used.mfu,
            "hfu": None if used is None else used.hfu,
            "memory": {**asdict(self.memory), "per_device": self.bytes_per_device},
            "warnings": list(self.warnings),
        }


def human_flops(flops: float) -> str:
    """A number of FLOPs in decimal units, such as `1.52 TFLOP`."""
    power = 0
    while flops >= 1000 and power < len(_UNITS) - 1:
        flops, power = flops / 1000, power + 1
    return f"{flops:,.0f} {_UNITS[0]}" if power == 0 else f"{flops:,.2f} {_UNITS[power]}"


def render(report: FlopsReport) -> RenderableType:
    """A table by component, and the figures below it, for rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    count = report.count
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("component")
    table.add_column("FLOPs", justify="right")
    table.add_column("share", justify="right")
    for (part, name), flops in count.components.items():
        label = name if part == "text" else f"{part}: {name}"
        table.add_row(label, human_flops(flops), f"{flops / count.total:.2%}")
    table.add_row("total", human_flops(count.total), "100.00%", style="bold")
    figures = Table.grid(padding=(0, 2))
    figures.add_column(style="dim")
    figures.add_column()
    for name, value in _figures(report):
        figures.add_row(name, Text(value))
    warnings = [Text(f"! {warning}", style="yellow") for warning in report.warnings]
    return Group(Text(_title(report), style="bold"), table, "", figures, *warnings)


def _title(report: FlopsReport) -> str:
    count, work = report.count, report.count.work
    tokens = f"{work.batch} × {counted(work.tokens, 'token')}"
    cache = f" behind a cache of {work.cached:,}" if work.mode == "decode" else ""
    return f"{count.model.family}, {work.mode}, {tokens}{cache}"


def _figures(report: FlopsReport) -> list[tuple[str, str]]:
    count, work, used = report.count, report.count.work, report.utilization
    lines = [("exactly", f"{count.total:,} FLOPs, attention counted {work.rule}")]
    if work.mode == "train":
        lines.append(("forward", human_flops(count.forward)))
    if count.hardware != count.total:
        lines.append(("with recomputation", human_flops(count.hardware)))
    per_token = count.total / (work.batch * work.tokens)
    lines.append(("a token", human_flops(per_token)))
    if report.attention_to_ffn is not None:
        lines.append(("attention to FFN", f"{report.attention_to_ffn:.3f}"))
    groups = ", ".join(f"{size} ({kind})" for kind, size in count.model.groups.items())
    if groups:
        lines.append(("query heads per KV head", groups))
    lines += _bytes(report)
    return lines if used is None else [*lines, *_rates(report, used)]


def _bytes(report: FlopsReport) -> list[tuple[str, str]]:
    held = report.memory
    weights = f"{human_bytes(held.weights)}, {held.parameters:,} parameters in {held.weight_dtype}"
    lines = [("weights", weights)]
    if held.activations is not None:
        masters = "" if held.weight_dtype == "fp32" else " and master weights"
        lines += [
            ("gradients", human_bytes(held.gradients)),
            ("optimizer", f"{human_bytes(held.optimizer)}, Adam's moments{masters} in fp32"),
            ("activations", human_bytes(held.activations)),
        ]
    each = f", {human_bytes(report.bytes_per_device)} on each of {report.devices} devices"
    total = human_bytes(held.total) + (each if report.devices > 1 else "")
    return [*lines, ("memory, estimated", total)]


def _rates(report: FlopsReport, used: Utilization) -> list[tuple[str, str]]:
    devices = counted(used.devices, "device")
    rate = f"{used.per_device / TERA:,.1f} TFLOP/s each, {used.seconds:g} s on {devices}"
    lines = [("achieved", rate)]
    if used.peak is None:
        return lines
    source = "as given"
    if report.hardware is not None:
        kind = "sparse" if report.sparse else "dense"
        source = f"{kind} {report.dtype} ({report.hardware.source})"
    peak = f"{used.peak / TERA:,.1f} TFLOP/s {source}"
    utilization = [("MFU", f"{used.mfu:.2%}"), ("HFU", f"{used.hfu:.2%}")]
    return [*lines, ("peak", peak), *utilization]
