"""The folder that transformers is handed, once none of its files sends it elsewhere.

transformers takes names of further files, of code and of other checkpoints from the JSON files of a
folder: `configuration_files` and `fast_tokenizer_files`, `tokenizer_file` and the like of older
versions, `transformers_weights`, `auto_map`, and PEFT's `base_model_name_or_path`. A tokenizer
class of another model takes options of its own, paths among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError, short
from gemma_convert.files.confined import NEVER_READ, check_confined
from gemma_convert.files.json_file import read_object
from gemma_convert.files.library_path import library_path
from gemma_convert.model.config import MAX_CONFIG_BYTES

_READ = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_ADAPTER = "adapter_config.json"
_NEVER = ("auto_map", "transformers_weights", "custom_pipelines")
_TOKENIZERS = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
_REMOVE = "remove the key, or use the files as they were published"


def handed(hf: Path) -> str:
    """The path of the folder `hf` for transformers' `from_pretrained`.

    Raises SourceError where a link or a file in it would lead transformers out of the folder.
    """
    check_confined(hf, passed_over=NEVER_READ)
    if (hf / _ADAPTER).exists():
        raise SourceError(
            "There is an adapter beside the weights, which transformers would load too.",
            where=hf / _ADAPTER,
            do="move it away, or merge it into the weights and convert those",
        )
    for name in _READ:
        try:
            values = read_object(hf / name, name, MAX_CONFIG_BYTES)
        except FileNotFoundError:
            continue
        _check(values, hf / name)
    return str(library_path(hf.resolve()))


def _check(values: dict[str, Any], where: Path) -> None:
    for key, value in _entries(values):
        if key in _NEVER and value is not None:
            raise _elsewhere(where, key, value)
        if key.endswith(("_file", "_files")) and not all(map(_plain, _texts(value))):
            raise _elsewhere(where, key, value)
    tokenizer = values.get("tokenizer_class")
    if isinstance(tokenizer, str) and not (
        tokenizer.startswith("Gemma") or tokenizer in _TOKENIZERS
    ):
        raise SourceError(
            "The tokenizer class is not one of Gemma 4.",
            where=f"{where}, key tokenizer_class",
            expected="GemmaTokenizer or " + ", ".join(_TOKENIZERS),
            found=short(tokenizer),
            do="use the tokenizer's files as they were published",
        )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a JSON value and of what is nested in it."""
    waiting = [value]
    while waiting:
        level = waiting.pop()
        if isinstance(level, dict):
            yield from level.items()
        waiting += level.values() if isinstance(level, dict) else level
        waiting = [inner for inner in waiting if isinstance(inner, dict | list)]


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    waiting = [value]
    while waiting:
        level = waiting.pop()
        if isinstance(level, str):
            yield level
        elif isinstance(level, dict | list):
            waiting += level.values() if isinstance(level, dict) else level


def _plain(name: str) -> bool:
    """Whether a text names a file that lies in the folder itself."""
    return name == Path(name).name and "\\" not in name and name != ".."


def _elsewhere(where: Path, key: str, value: Any) -> SourceError:
    return SourceError(
        "A file of the checkpoint would make transformers load something from elsewhere.",
        where=f"{where}, key {key}",
        expected="nothing, or the name of a file in the folder" if key not in _NEVER else "nothing",
        found=short(value),
        do=_REMOVE,
    )
