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
    from gemma_convert.logits.check import logit_check
    from gemma_convert.logits.comparison import ReportComparison, compare_reports
    from gemma_convert.logits.golden_writing import save_golden
    from gemma_convert.logits.report import LogitReport
    from gemma_convert.progress import ProgressEvent
    from gemma_convert.tasks.inspect import InspectReport, inspect
    from gemma_convert.tasks.mappings import MappingsReport, list_mappings
    from gemma_convert.tasks.reports import ToNativeReport
    from gemma_convert.tasks.to_hf import ToHFReport, to_hf
    from gemma_convert.tasks.to_native import to_native
    from gemma_convert.tasks.verify import VerifyReport, verify
    from gemma_convert.tiny import make_tiny

_HOMES = {
    "ToNativeReport": "gemma_convert.tasks.reports",
    "to_native": "gemma_convert.tasks.to_native",
    "ToHFReport": "gemma_convert.tasks.to_hf",
    "to_hf": "gemma_convert.tasks.to_hf",
    "InspectReport": "gemma_convert.tasks.inspect",
    "inspect": "gemma_convert.tasks.inspect",
    "MappingsReport": "gemma_convert.tasks.mappings",
    "list_mappings": "gemma_convert.tasks.mappings",
    "LogitReport": "gemma_convert.logits.report",
    "logit_check": "gemma_convert.logits.check",
    "ReportComparison": "gemma_convert.logits.comparison",
    "compare_reports": "gemma_convert.logits.comparison",
    "save_golden": "gemma_convert.logits.golden_writing",
    "make_tiny": "gemma_convert.tiny",
    "ProgressEvent": "gemma_convert.progress",
    "VerifyReport": "gemma_convert.tasks.verify",
    "verify": "gemma_convert.tasks.verify",
}

__all__ = [
    "CheckFailedError",
    "GemmaConvertError",
    "InspectReport",
    "LogitReport",
    "MappingsReport",
    "ProgressEvent",
    "ReportComparison",
    "SourceError",
    "TargetError",
    "ToHFReport",
    "ToNativeReport",
    "UsageError",
    "VerifyReport",
    "__version__",
    "compare_reports",
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


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
