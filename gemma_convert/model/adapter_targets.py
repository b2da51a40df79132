"""Which modules an adapter_config.json names: PEFT drops the matrices of all others in silence.

Rules: `check_target_module_exists` in `peft/tuners/tuners_utils.py`, PEFT 0.21. A module is named
by a regular expression for its whole name, or by the end of its name; `layers_to_transform` then
keeps some layers alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError, short, some
from gemma_convert.files.patterns import groups

_ALL, _HEAD = "all-linear", "lm_head"
_ANY_LAYER = r".*?\.[^.]*\.(\d+)\."
_WHOLE_TEXT, _TEXT_ALONE = "model.language_model.", "model."

_Names = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Targets:
    """What a config says of modules.

    Without `modules` it says nothing or, if `only_parameters`, that none is changed by a pair.
    """

    modules: _Names
    excluded: _Names
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    only_parameters: bool
    where: Path

    def missing(self, modules: Sequence[str]) -> list[str]:
        """Those of `modules` that are not named, however the text model in them is spelled."""
        spelled = {module: _spellings(module) for module in modules}
        every = sorted({name for names in spelled.values() for name in names})
        named = self._named(every)
        return [module for module, names in spelled.items() if named.isdisjoint(names)]

    def _named(self, modules: Sequence[str]) -> set[str]:
        if self.modules is None:
            return set() if self.only_parameters else set(modules)
        excluded = self._found(self.excluded, modules)
        left = [module for module in modules if module not in excluded]
        if isinstance(self.modules, str) and self.modules.lower() == _ALL:
            return {module for module in left if module.rpartition(".")[2] != _HEAD}
        named = self._found(self.modules, left)
        if isinstance(self.modules, str) or not self.layers:
            return named
        return {*self._of_layers(sorted(named)), *named.intersection(self.modules)}

    def _found(self, names: _Names, modules: Sequence[str]) -> set[str]:
        if isinstance(names, str):
            found = groups(names, "fullmatch", modules, self.where)
            return {one for one, match in zip(modules, found, strict=True) if match is not None}
        ends = tuple(f".{name}" for name in names or ())
        return {one for one in modules if f".{one}".endswith(ends)}

    def _of_layers(self, modules: Sequence[str]) -> set[str]:
        """Those in one of `layers`: the first number behind a name, or behind a pattern's."""
        patterns = [rf"(?:^|.*?\.){one}\.(?P<idx>\d+)\." for one in self.layers_pattern]
        numbers: dict[str, str] = {}
        for pattern in patterns or [_ANY_LAYER]:
            found = groups(pattern, "match", modules, self.where)
            for module, match in zip(modules, found, strict=True):
                if match is not None and match[-1] is not None:
                    numbers.setdefault(module, match[-1].lstrip("0") or "0")
        layers = {str(layer) for layer in self.layers}
        return {module for module, number in numbers.items() if number in layers}


def read_targets(config: Mapping[str, Any], where: Path) -> Targets:
    """What adapter_config.json at `where` says of modules; SourceError for another type."""
    layers = config.get("layers_to_transform")
    numbers = [layers] if isinstance(layers, int) else layers or []
    if not isinstance(numbers, list) or any(
        not isinstance(one, int) or isinstance(one, bool) for one in numbers
    ):
        raise unlike(where, "layers_to_transform", "whole numbers", layers)
    patterns = _names(config, "layers_pattern", where) or ()
    modules = _names(config, "target_modules", where)
    return Targets(
        modules=modules,
        excluded=_names(config, "exclude_modules", where) or None,
        layers=tuple(numbers),
        layers_pattern=(patterns,) if isinstance(patterns, str) else patterns,
        only_parameters=modules is None and bool(config.get("target_parameters")),
        where=where,
    )


def refuse_untargeted(targets: Targets, modules: Sequence[str]) -> None:
    """Raises SourceError where an adapter has matrices of modules that its config does not name."""
    missing = targets.missing(modules)
    if missing:
        raise SourceError(
            "The adapter has matrices of modules that its config does not name. PEFT loads it "
            "without them.",
            where=targets.where,
            expected="every module with matrices in target_modules, layers_to_transform and not "
            "in exclude_modules",
            found=some(missing, 3),
            do="correct the config if these modules were trained, or else save the adapter again "
            "with save_pretrained() of PEFT",
        )


def unlike(where: Path, key: str, expected: str, found: object) -> SourceError:
    """A key of adapter_config.json has a value that no adapter has which is converted."""
    return SourceError(
        "This adapter is not one that is converted.",
        where=f"{where}, key {key}",
        expected=expected,
        found=short(found),
        do="merge it into its base model with merge_and_unload() of PEFT, and convert that",
    )


def _names(config: Mapping[str, Any], key: str, where: Path) -> _Names:
    value = config.get(key)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise unlike(where, key, "names, or one regular expression", value)
    return tuple(value)


def _spellings(module: str) -> set[str]:
    """A module where the text model is named as a whole, or as a part of a model with towers."""
    return {
        module,
        module.replace(_WHOLE_TEXT, _TEXT_ALONE, 1),
        module.replace(_TEXT_ALONE, _WHOLE_TEXT, 1),
    }
