"""`gemma-convert to-native`: Hugging Face → a native layout."""

from __future__ import annotations

from contextlib import ExitStack
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_convert.cli.options import (
    ADAPTERS,
    LAYOUTS,
    RUNNING,
    AcceptDamage,
    AsJson,
    Coordinator,
    Distributed,
    DType,
    FrameworkVersion,
    JsonLines,
    Level,
    LogLevel,
    Memory,
    Overwrite,
    ProcessCount,
    ProcessNumber,
    Quiet,
    Resume,
    Settings,
    parse_size,
)
from gemma_convert.cli.to_native_summary import arrays, lossy_warnings, settings_lines, summary
from gemma_convert.mapping.declared import layout_names

if TYPE_CHECKING:
    from gemma_convert.progress import Listener
    from gemma_convert.tasks.verify import VerifyReport


class ScaledDType(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Compression(StrEnum):
    NONE = "none"
    ZSTD = "zstd"


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A Hugging Face checkpoint (safetensors or .distcp files), a PEFT adapter, or "
            "a native checkpoint: a folder, owner/name on the hub, or a URL.",
        ),
    ],
    target: Annotated[str, typer.Argument(metavar="OUT", help="The folder or URL to create.")],
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            metavar=LAYOUTS,
            help="Native layout to convert to.",
            autocompletion=layout_names,
        ),
    ],
    framework_version: FrameworkVersion = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="The Hugging Face original, for a native SRC without a sidecar or for .distcp "
            "files."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model of an adapter, if it is not where adapter_config.json says.",
            rich_help_panel=ADAPTERS,
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="Merge an adapter into its base model.", rich_help_panel=ADAPTERS
        ),
    ] = False,
    scan_layers: Annotated[
        bool,
        typer.Option(
            "--scan-layers/--no-scan-layers",
            help="Stack the layers, as MaxText does with scan_layers=true.",
            rich_help_panel="Storage",
        ),
    ] = False,
    dtype: Annotated[
        DType, typer.Option(help="Dtype of the arrays; keep is that of the source.")
    ] = DType.KEEP,
    scaled_dtype: Annotated[
        ScaledDType,
        typer.Option(
            help="Dtype of arrays that MaxText stores scaled (the embedding); bfloat16 rounds them."
        ),
    ] = ScaledDType.FLOAT32,
    text_only: Annotated[
        bool,
        typer.Option(
            "--text-only",
            help="Convert the language model only; vision and audio tower are kept in the sidecar.",
        ),
    ] = False,
    ocdbt: Annotated[
        bool,
        typer.Option(
            "--ocdbt/--no-ocdbt",
            help="Write one OCDBT database, or one zarr folder for each array.",
            rich_help_panel="Storage",
        ),
    ] = True,
    compression: Annotated[
        Compression, typer.Option(help="Compression of the arrays.", rich_help_panel="Storage")
    ] = Compression.NONE,
    memory: Memory = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what would be written and stop; only headers are read.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    settings: Settings = None,
    accept_damage: AcceptDamage = None,
    ignore_fact: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore-fact",
            metavar="KEY",
            help="Ignore this key of config.json, which gemma-convert does not know or the "
            "framework has no setting for; may be given several times.",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Run `verify` at the end.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    coordinator: Coordinator = None,
    processes: ProcessCount = None,
    process: ProcessNumber = None,
    distributed: Distributed = False,
    quiet: Quiet = False,
    log_level: LogLevel = Level.INFO,
    json_lines: JsonLines = False,
    as_json: AsJson = False,
) -> None:
    """Convert a Hugging Face or native checkpoint to a native layout.

    With --coordinator several hosts that share SRC and OUT divide the work: run the same command on
    each of them.

    \b
    Examples:
      gemma-convert to-native gemma-4-E2B-it out --format maxtext
      gemma-convert to-native gemma-4-31B-it out --format maxtext --scan-layers --verify
    """
    from gemma_convert.cli.allocator import reuse_large_blocks
    from gemma_convert.engine.joined import joined
    from gemma_convert.output import chatter, counted, note, show, show_json
    from gemma_convert.tasks.to_native import to_native

    progress = chatter("error" if quiet else log_level.value, json_lines)
    reuse_large_blocks()
    with joined(coordinator, processes, process, distributed) as together:
        report = to_native(
            source,
            target,
            layout=layout,
            framework_version=framework_version,
            like=like,
            base=base,
            merge=merge,
            scan_layers=scan_layers,
            dtype=dtype.value,
            scaled_dtype=scaled_dtype.value,
            text_only=text_only,
            ocdbt=ocdbt,
            compression=compression.value,
            memory=parse_size("--memory", memory),
            dry_run=dry_run,
            accept_damage=accept_damage or (),
            settings=settings or (),
            ignore_facts=ignore_fact or (),
            overwrite=overwrite,
            resume=resume,
            progress=progress,
            processes=together,
        )
        checked = verify and not dry_run and together.leads
        proof = _verified(source, target, base, progress) if checked else None
        together.step()
    if not together.leads:
        return
    if report.already_complete:
        note(f"{target} is already complete, so there is nothing left to do")
    for told in lossy_warnings(report):
        note(told, "warning")
    if as_json:
        show_json(report.as_json())
        return
    if dry_run:
        for line in arrays(report):
            show(line)
    show(summary(report))
    if proof is not None:
        show(
            f"verified: {counted(proof.checked, 'tensor equals', 'tensors equal')} those of "
            f"{proof.against}"
        )
    show(f"{report.framework} loads it with:")
    for line in settings_lines(report):
        show(line)


def _verified(
    source: str, target: str, base: str | None, progress: Listener | None
) -> VerifyReport:
    """A report on what was written; raises CheckFailedError where it is not what was read."""
    from gemma_convert.errors import CheckFailedError
    from gemma_convert.layouts.registry import is_native
    from gemma_convert.output import counted
    from gemma_convert.stores.remote.locations import local
    from gemma_convert.tasks.verify import verify

    with ExitStack() as stack:
        against = None if is_native(local(source, stack)) else source
    report = verify(
        target, against=against, base=None if against is None else base, progress=progress
    )
    if not report.passed:
        name, how = next(iter(report.different.items()))
        raise CheckFailedError(
            f"The checkpoint differs from its source in {counted(len(report.different), 'place')}.",
            where=target,
            found=f"{name} {how}",
            do="convert it again; check the disk if it happens twice",
        )
    return report
