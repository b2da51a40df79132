"""`gemma-convert to-hf`: a native checkpoint → Hugging Face."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_convert.cli.copied import copied
from gemma_convert.cli.options import (
    ADAPTERS,
    RUNNING,
    AcceptDamage,
    AsJson,
    DType,
    JsonLines,
    KVShared,
    Level,
    LogLevel,
    Memory,
    Overwrite,
    Quiet,
    Resume,
    Settings,
    parse_size,
)
from gemma_convert.errors import some

if TYPE_CHECKING:
    from gemma_convert.output import Facts
    from gemma_convert.tasks.to_hf import ToHFReport

SHOWN = 5


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="The native checkpoint: the folder of a run, a step or an item."
        ),
    ],
    target: Annotated[str, typer.Argument(metavar="OUT", help="The folder or URL to create.")],
    like: Annotated[
        str | None,
        typer.Option(
            help="The Hugging Face original, or a conversion of it, for config.json, tokenizer and "
            "what the layout has no place for."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The Hugging Face base model, for an adapter without a sidecar.",
            rich_help_panel=ADAPTERS,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="The LoRA alpha of such an adapter, if its metadata does not have it.",
            rich_help_panel=ADAPTERS,
        ),
    ] = None,
    dtype: Annotated[
        DType, typer.Option(help="Dtype of the weights; keep is that of the original.")
    ] = DType.KEEP,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            help="Largest size of a safetensors file, such as 5GB; by default the files are as in "
            "the original."
        ),
    ] = None,
    kv_shared: Annotated[
        KVShared,
        typer.Option(help="Whether to write the unused K and V weights of KV-shared layers."),
    ] = KVShared.KEEP,
    text_only: Annotated[
        bool,
        typer.Option("--text-only", help="Export the language model only (Gemma4ForCausalLM)."),
    ] = False,
    settings: Settings = None,
    memory: Memory = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what would be written and stop.", rich_help_panel=RUNNING
        ),
    ] = False,
    accept_damage: AcceptDamage = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
    log_level: LogLevel = Level.INFO,
    json_lines: JsonLines = False,
    as_json: AsJson = False,
) -> None:
    """Export a native checkpoint, converted or trained, to Hugging Face.

    \b
    Examples:
      gemma-convert to-hf out back
      gemma-convert to-hf run/checkpoints/1000 exported --like gemma-4-E2B-it
    """
    from gemma_convert.cli.allocator import reuse_large_blocks
    from gemma_convert.output import chatter, counted, note, show, show_json
    from gemma_convert.tasks.to_hf import to_hf

    progress = chatter("error" if quiet else log_level.value, json_lines)
    reuse_large_blocks()
    report = to_hf(
        source,
        target,
        like=like,
        base=base,
        alpha=alpha,
        dtype=dtype.value,
        max_shard_size=parse_size("--max-shard-size", max_shard_size),
        kv_shared=kv_shared.value,
        text_only=text_only,
        memory=parse_size("--memory", memory),
        dry_run=dry_run,
        accept_damage=accept_damage or (),
        settings=settings or (),
        overwrite=overwrite,
        resume=resume,
        progress=progress,
    )
    if report.already_complete:
        note(f"{target} is already complete, so there is nothing left to do")
    if report.rounded:
        count = sum(report.rounded.values())
        rounded = counted(count, "value was", "values were")
        note(f"{rounded} rounded to the target's dtype", "warning")
    if as_json:
        show_json(report.as_json())
    else:
        show(_summary(report))
    if report.unexplained:
        raise typer.Exit(1)


def _summary(report: ToHFReport) -> Facts:
    from gemma_convert.output import Facts, counted, human_bytes

    table = Facts()
    form = ", scanned" if report.scanned else ""
    done = "would export" if report.dry_run else "exported"
    step = "" if report.step is None else f", step {report.step}"
    earlier = ", by an earlier run" if report.already_complete else ""
    table.add_row(done, f"{report.family} from {report.layout}{form}{step}{earlier}")
    shards = counted(len(report.shards), "file", "shards")
    table.add_row("tensors", f"{report.tensors} ({human_bytes(report.bytes_written)}) in {shards}")
    if report.tensors_from_original:
        table.add_row("from the original", counted(report.tensors_from_original, "tensor"))
    table.add_row("other files", copied(report.files))
    for key, how in report.changed_facts.items():
        table.add_row("config.json", f"{key}: {how}; the value of the settings is written")
    table.add_row(
        "largest chunk", f"{human_bytes(report.largest_decode_bytes)}, decoded in one piece"
    )
    if report.dry_run or report.already_complete:
        return table
    if report.rounded:
        count = sum(report.rounded.values())
        tensors = counted(len(report.rounded), "tensor")
        table.add_row("rounded", f"{counted(count, 'value')} in {tensors}")
    if report.sealed:
        table.add_row("checkpoint", _against_seal(report))
    if report.added_files:
        table.add_row(
            "not copied", f"files added since the conversion: {some(report.added_files, SHOWN)}"
        )
    if report.sealed or report.identical or report.different:
        original = "merged model" if report.merged else "original"
        table.add_row(original, _against_original(report))
    else:
        again = shlex.join(["verify", report.target, "--against", report.source])
        table.add_row("checksums", f"it has none; compare the export with: gemma-convert {again}")
    if report.made_from_settings:
        table.add_row(
            "no original", "config.json was made from the settings; add the tokenizer yourself"
        )
    table.add_row(
        "time",
        f"{report.seconds:.1f} s, {human_bytes(report.bytes_per_second)}/s, "
        f"peak memory {human_bytes(report.peak_memory_bytes)}",
    )
    return table


def _against_seal(report: ToHFReport) -> str:
    from gemma_convert.output import counted

    if report.changed_arrays:
        arrays = counted(len(report.changed_arrays), "array has", "arrays have")
        names = some(report.changed_arrays, SHOWN)
        return f"{arrays} changed since the conversion (trained, or damaged): {names}"
    return "unchanged since the conversion"


def _against_original(report: ToHFReport) -> str:
    """The exported tensors and the checksums of what was converted: the original, or merged."""
    from gemma_convert.output import counted

    equal = counted(report.identical, "tensor matches", "tensors match")
    if report.bit_for_bit:
        restored = "restored as it was converted," if report.merged else "restored"
        return f"{restored} bit for bit: all {equal} its checksums"
    if report.different:
        if report.unexplained:
            return (
                f"DIFFERENT: {some(report.unexplained, SHOWN)}: no array has changed, but these "
                "are not what the manifest says of the original: the checkpoint is damaged"
            )
        differ = counted(len(report.different), "differs", "differ")
        return f"{equal} its checksums, {differ}: {some(report.different, SHOWN)}"
    if not report.unchecked:
        return f"all {equal} its checksums, arrays in other dtypes too"
    return f"not compared: there is no checksum of {counted(report.unchecked, 'tensor')}"
