"""Fast-LLM's own format on disk: safetensors files, and `metadata.yaml` that says what they are.

Facts: Fast-LLM 0.4.0 writes and loads it. A file is closed when it has taken 2^32 parameters; a
tensor is never split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.checkpoint.native import NativeSource
from gemma_convert.checkpoint.native_folder import NativeFolder
from gemma_convert.checkpoint.safetensors_layout import SafetensorsStore, safetensors_source
from gemma_convert.errors import SourceError, UsageError, short
from gemma_convert.files.given_settings import GivenSettings
from gemma_convert.files.unfinished import refuse_unfinished
from gemma_convert.layouts.fast_llm.metadata import (
    METADATA,
    differences,
    fast_llm_metadata,
    flat,
    read_metadata,
    write_metadata,
)
from gemma_convert.mapping.native_facts import Settings
from gemma_convert.mapping.plan import Plan
from gemma_convert.model.architecture import Architecture
from gemma_convert.output import counted
from gemma_convert.stores.orbax.writer import OrbaxFormat
from gemma_convert.stores.safetensors.reader import SafetensorsFolder, plain_name
from gemma_convert.version import CONVERTER

if TYPE_CHECKING:
    from gemma_convert.forward.native_model import NativeModel
    from gemma_convert.layouts.registry import RunnableLayout

FILE_PARAMETERS = 1 << 32


class FastLLM:
    name = "fast-llm"
    framework = "Fast-LLM"
    divisible = False
    streams = False

    def find(self, folder: NativeFolder) -> Path | None:
        return folder.path if (folder.path / METADATA).is_file() else None

    def open(self, where: Path) -> NativeSource:
        reader = _reader(where)
        converted = CONVERTER in read_metadata(where)["metadata"]
        return safetensors_source(self.name, reader, converted=converted)

    def open_model(self, where: Path, architecture: Architecture) -> NativeModel:
        from gemma_convert.layouts.fast_llm.model import FastLLMModel

        return FastLLMModel(where, architecture)

    def create(self, folder: Path, plan: Plan, form: OrbaxFormat, part: int = 0) -> FastLLMStore:
        del form, part
        return FastLLMStore(folder, plan)

    def settings(self, plan: Plan, target: Path) -> dict[str, str]:
        del plan
        return {
            "pretrained.path": str(target.absolute()),
            "pretrained.format": "fast_llm",
            "pretrained.model_weights": "true",
        }

    def settings_files(self, plan: Plan, target: Path) -> dict[str, str]:
        del plan, target
        return {}

    def read_settings(
        self, where: Path, given: GivenSettings, architecture: Architecture | None
    ) -> Settings:
        """What metadata.yaml says, below `config.base_model`, which is the whole model.

        It is the only file that may be given.
        """
        del architecture
        if given.pairs or any(not file.samefile(where / METADATA) for file in given.files):
            raise UsageError(
                "A Fast-LLM checkpoint runs with its own metadata, so it takes no settings.",
                where=where / METADATA,
                do=f"leave out --settings, or name its {METADATA}",
            )
        config = read_metadata(where).get("config")
        model = config.get("base_model") if isinstance(config, dict) else None
        return Settings(dict(flat(model)), str(where / METADATA))

    def check_metadata(self, folder: Path, plan: Plan) -> dict[str, str]:
        found = read_metadata(folder)
        expected = fast_llm_metadata(plan.architecture, {})
        if isinstance(config := found.get("config"), dict):
            config.pop("distributed", None)
        for part in (found, expected):
            part.pop("fast_llm_version", None)
            part.pop("metadata", None)
        return {f"{METADATA}: {path}": how for path, how in differences(expected, found)}


class FastLLMStore(SafetensorsStore):
    """The files of a checkpoint, and the metadata that says which array is in which of them."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        specs = {name: target.spec for name, target in plan.targets.items()}
        groups = enumerate(_groups(specs))
        super().__init__(folder, {f"model_{at}.safetensors": group for at, group in groups})
        self._architecture = plan.architecture

    def complete(self, started_ns: int, parts: int = 1) -> None:
        super().complete(started_ns, parts)
        state_index = {name: file for file, group in self.files.items() for name in group}
        write_metadata(self.folder, fast_llm_metadata(self._architecture, state_index))


def _reader(folder: Path) -> SafetensorsFolder:
    """The files of the checkpoint in `folder`; raises SourceError where they cannot be read."""
    refuse_unfinished(folder)
    metadata = read_metadata(folder)
    index = metadata.get("metadata", {})
    index = index.get("state_index") if isinstance(index, dict) else None
    if not isinstance(index, dict) or not index:
        raise SourceError("metadata.yaml has no state_index.", where=folder / METADATA)
    for name, file in index.items():
        if not isinstance(name, str) or not isinstance(file, str) or not plain_name(file):
            raise SourceError(
                "The state_index names a file that is not a plain file name.",
                where=f"{folder / METADATA}, tensor {short(name)}",
                found=short(file),
            )
    reader = SafetensorsFolder(folder, sorted(set(index.values())))
    astray = [
        name
        for name in {*index, *reader.tensors}
        if name not in reader.tensors or index.get(name) != reader.tensors[name].file
    ]
    if astray:
        reader.close()
        raise SourceError(
            "The files do not hold the tensors that the state_index says.",
            where=folder,
            found=f"{counted(len(astray), 'tensor')}, such as {min(astray)}",
        )
    return reader


def _groups(specs: Mapping[str, TensorSpec]) -> Iterator[dict[str, TensorSpec]]:
    group: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        group[name] = spec
        if sum(spec.size for spec in group.values()) >= FILE_PARAMETERS:
            yield group
            group = {}
    if group:
        yield group


if TYPE_CHECKING:
    _: RunnableLayout = FastLLM()
