"""Convert Gemma 4 checkpoints between Hugging Face and native layouts, and prove it.

    import gemma_convert

    report = gemma_convert.to_native("gemma-4-E2B-it", "out", layout="maxtext")
    check = gemma_convert.logit_check("gemma-4-E2B-it", "out")

Names are imported on first use, so that `import gemma_convert` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from gemma_convert.errors import (
    CheckFailedError,
    GemmaConvertError,
    SourceError,
    TargetError,
    UsageError,
)
from gemma_convert.version import __version__

if TYPE_CHECKING:
    from gemma_convert.convert import to_native
    from gemma_convert.export import ToHFReport, to_hf
    from gemma_convert.inspection import InspectReport, inspect
    from gemma_convert.listings import MappingsReport, list_mappings
    from gemma_convert.logits.check import logit_check
    from gemma_convert.logits.golden import save_golden
    from gemma_convert.logits.report import LogitReport
    from gemma_convert.reports import ToNativeReport
    from gemma_convert.tiny import make_tiny
    from gemma_convert.verification import VerifyReport, verify

_HOMES = {
    "ToNativeReport": "gemma_convert.reports",
    "to_native": "gemma_convert.convert",
    "ToHFReport": "gemma_convert.export",
    "to_hf": "gemma_convert.export",
    "InspectReport": "gemma_convert.inspection",
    "inspect": "gemma_convert.inspection",
    "MappingsReport": "gemma_convert.listings",
    "list_mappings": "gemma_convert.listings",
    "LogitReport": "gemma_convert.logits.report",
    "logit_check": "gemma_convert.logits.check",
    "save_golden": "gemma_convert.logits.golden",
    "make_tiny": "gemma_convert.tiny",
    "VerifyReport": "gemma_convert.verification",
    "verify": "gemma_convert.verification",
}

__all__ = [
    "CheckFailedError",
    "GemmaConvertError",
    "InspectReport",
    "LogitReport",
    "MappingsReport",
    "SourceError",
    "TargetError",
    "ToHFReport",
    "ToNativeReport",
    "UsageError",
    "VerifyReport",
    "__version__",
    "inspect",
    "list_mappings",
    "logit_check",
    "make_tiny",
    "save_golden",
    "to_hf",
    "to_native",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
