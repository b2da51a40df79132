"""How a summary names the files that were copied beside the weights."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_convert.errors import some

SHOWN = 5

_KINDS = (
    ("config.json", "config.json"),
    ("tokenizer", "tokenizer"),
    ("chat template", "chat_template"),
    ("generation config", "generation_config"),
    ("processor", "processor"),
    ("processor", "preprocessor"),
    ("tokenizer", "special_tokens_map"),
)
"""What a file is called, and what its name begins with, as transformers writes it."""


def copied(files: Sequence[str]) -> str:
    """Such as `8 copied: config.json, tokenizer, chat template`; other files by their names."""
    if not files:
        return "none"
    kinds = dict.fromkeys(
        kind for kind, begin in _KINDS if any(name.startswith(begin) for name in files)
    )
    others = [name for name in sorted(files) if not _kind(name)]
    return f"{len(files)} copied: {some([*kinds, *others], SHOWN)}"


def _kind(name: str) -> bool:
    return any(name.startswith(begin) for _, begin in _KINDS)
