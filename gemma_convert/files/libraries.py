"""What other libraries raise about the files of a checkpoint, as one message of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gemma_convert.errors import GemmaConvertError, SourceError

_CHARACTERS = 500
_PANIC = "PanicException"
_OF_THE_MACHINE = ("OutOfMemoryError", "AcceleratorError")


@contextmanager
def told_by_library(what: str, where: object, do: str | None = None) -> Iterator[None]:
    """Within it stands a call of transformers, tokenizers, safetensors or PIL, and nothing of ours.

    What it raises about the content it was given becomes a SourceError that says `what` and `do`:
    which exceptions these are is not part of any library's promise. Memory that ran out, a missing
    package and an interruption stay what they are.
    """
    try:
        yield
    except (GemmaConvertError, MemoryError, ImportError):
        raise
    except Exception as error:
        if type(error).__name__ in _OF_THE_MACHINE:
            raise
        raise _told(what, where, do, error) from error
    except BaseException as error:  # a library in Rust panics beside Exception
        if type(error).__name__ != _PANIC:
            raise
        raise _told(what, where, do, error) from error


def _told(what: str, where: object, do: str | None, error: BaseException) -> SourceError:
    text = " ".join(str(error).split())[:_CHARACTERS]
    found = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return SourceError(what, where=where, found=found, do=do)
