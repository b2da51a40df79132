"""Which models the two sides of a check are, where one of them is given as an adapter."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from gemma_convert.checkpoint.adapter_base import named_folder
from gemma_convert.errors import SourceError, UsageError
from gemma_convert.layouts.opening import check_seal
from gemma_convert.layouts.registry import is_native, native_layout, open_native
from gemma_convert.logits.changes import Changes, adapter_changes
from gemma_convert.model.adapter import is_adapter
from gemma_convert.output import shown
from gemma_convert.stores.remote.locations import local
from gemma_convert.stores.weights import is_huggingface

MERGED = (
    "The checkpoint is compared with its original, the adapter merged into that and each weight "
    "rounded once to its dtype."
)


@dataclass(frozen=True)
class AdapterOptions:
    """What is asked of adapters: their base model, its native checkpoint, and alpha."""

    base: str | Path | None = None
    native_base: str | Path | None = None
    alpha: float | None = None

    @property
    def given(self) -> str | None:
        """The first option that is given."""
        named = {"--base": self.base, "--native-base": self.native_base, "--alpha": self.alpha}
        return next((name for name, value in named.items() if value is not None), None)


@dataclass(frozen=True)
class Sides:
    """The folders of the models that are compared, and of what adapters change of them.

    `adapter` is that of PEFT, and `native_adapter` the same in a native layout, with its `alpha` if
    it does not say that itself. `names` are those of both sides, for people.
    """

    hf: Path
    native: Path
    names: tuple[str, str]
    adapter: Path | None = None
    changes: Changes | None = None
    native_adapter: Path | None = None
    alpha: float | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of the verdict should know of them."""
        merged = self.adapter is not None and self.native_adapter is None
        return (MERGED,) if merged else ()


def sides_of(hf: Path, native: Path, options: AdapterOptions, stack: ExitStack) -> Sides:
    """The models of both sides; adapters of PEFT are open until `stack` is closed.

    Raises UsageError where only the native side is an adapter, or an option is for none, and
    SourceError where the sides are swapped, an adapter or its model is not named or cannot be read,
    or a native one is damaged.
    """
    _check_order(hf, native)
    adapted = _native_adapter(native)
    if not is_adapter(hf):
        if adapted is not None:
            raise UsageError(
                "A native adapter is compared with the adapter of PEFT that it is.",
                where=native,
                found=hf,
                do="name that adapter instead; to-hf makes one of an adapter that was trained",
            )
        if options.given is not None:
            raise UsageError(f"{options.given} is for adapters.", found=hf)
        return Sides(hf, native, (shown(hf), shown(native)))
    base = named_folder(hf) if options.base is None else local(options.base, stack, whole=True)
    original = f"{shown(hf)} on {shown(base)}"
    changes = stack.enter_context(adapter_changes(base, hf, merged=adapted is None))
    if adapted is None:
        if options.native_base is not None or options.alpha is not None:
            raise UsageError("--native-base and --alpha are for a native adapter.", found=native)
        return Sides(base, native, (original, shown(native)), hf, changes)
    if options.native_base is None:
        raise SourceError(
            "A native adapter is run on the native checkpoint of its base model.",
            where=native,
            do="convert the base model to the same layout, and name that with --native-base",
        )
    model = local(options.native_base, stack, whole=True)
    if is_huggingface(model):
        raise UsageError(
            "A native adapter is put on a native checkpoint, and this one is Hugging Face's.",
            where=model,
            do="convert it to the layout of the adapter, and name that with --native-base",
        )
    check_seal(model)
    names = original, f"{shown(native)} on {shown(model)}"
    return Sides(base, model, names, hf, changes, adapted, options.alpha)


def _check_order(hf: Path, native: Path) -> None:
    """Raises SourceError where the first checkpoint is a native one."""
    layout = native_layout(hf)
    if layout is None:
        return
    second = shown(native) if is_huggingface(native) else "HF"
    raise SourceError(
        f"The first checkpoint is a {layout} checkpoint; the Hugging Face one comes first.",
        where=hf,
        do=f"gemma-convert logit-check {shlex.quote(second)} {shlex.quote(shown(hf))}",
    )


def _native_adapter(path: Path) -> Path | None:
    """The folder of the native adapter at `path`; None where that is a model."""
    if is_huggingface(path) or not is_native(path):
        return None
    check_seal(path)
    with open_native(path) as native:
        return None if native.adapter is None else native.folder
