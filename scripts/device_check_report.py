"""What a device check found: a line at once, the table, and JSON after every line."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PASSED, FAILED, UNAVAILABLE, LATE = "passed", "failed", "unavailable", "not run"
"""States; what is unavailable counts neither as passed nor as failed, what is late as failed."""

SCHEMA = "gemma-convert/device-check/1"
LIBRARIES = (
    "jax",
    "jaxlib",
    "torch",
    "transformers",
    "orbax-checkpoint",
    "tensorstore",
    "safetensors",
    "numpy",
    "pillow",
)
HEAD = (
    "device",
    "model",
    "layout",
    "dtype",
    "what",
    "KL max",
    "s",
    "JAX GB",
    "torch GB",
    "verdict",
)


@dataclass(frozen=True)
class Finding:
    """What one step came to; `kl_max` in nats, None where there are no logits."""

    state: str
    verdict: str
    kl_max: float | None = None
    device: str = ""


def versions() -> dict[str, str | None]:
    """Library → its version, None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def device_memory() -> tuple[int | None, int | None]:
    """Largest bytes on the device: JAX's so far, PyTorch's since the last call; None on a CPU."""
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    stats = jax.local_devices()[0].memory_stats() if jax else None
    peak = (stats or {}).get("peak_bytes_in_use")
    if torch is None or not torch.cuda.is_available():
        return peak, None
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak, most


class Report:
    """The findings so far, in a file that is written anew with each of them."""

    def __init__(self, path: Path, libraries: dict[str, str | None]) -> None:
        self._path, self._libraries, self._started = path, libraries, time.monotonic()
        self._rows: list[dict[str, Any]] = []
        words = [f"{name} {number or 'not installed'}" for name, number in libraries.items()]
        print(", ".join(words), flush=True)

    @property
    def passed(self) -> bool:
        """Whether something passed and nothing failed or was left out for want of time."""
        states = {row["state"] for row in self._rows[1:]}
        failures = {row["state"] for row in self._rows} & {FAILED, LATE}
        return PASSED in states and not failures

    def add(self, step: Any, finding: Finding, seconds: float) -> None:
        """Takes in the finding of a step: one line, and the file."""
        jax, torch = device_memory()
        row = {
            "check": step.name,
            "model": step.model,
            "layout": step.layout,
            "dtype": step.dtype,
            "what": step.what,
            **asdict(finding),
            "seconds": round(seconds, 2),
            "jax_peak_bytes": jax,
            "torch_peak_bytes": torch,
        }
        self._rows.append(row)
        kl = "" if row["kl_max"] is None else f", KL {row['kl_max']:.2e}"
        at = time.monotonic() - self._started
        words = " ".join(filter(None, dict.fromkeys((step.name, step.what, step.dtype))))
        print(f"[{at:5.0f} s] {words}{kl}: {finding.verdict} ({seconds:.1f} s)", flush=True)
        self._write()

    def show(self) -> None:
        """Prints the table and how many steps came to what."""
        lines = [HEAD, *map(_cells, self._rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print()
        for line in lines:
            cells = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
            print("  ".join(cells).rstrip())
        states = [row["state"] for row in self._rows]
        counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
        seconds = time.monotonic() - self._started
        print(f"\n{', '.join(counts)} in {seconds:.0f} s; {self._path}", flush=True)

    def _write(self) -> None:
        values = {
            "schema": SCHEMA,
            "passed": self.passed,
            "seconds": round(time.monotonic() - self._started, 1),
            "versions": self._libraries,
            "checks": [row | {"kl_max": _finite(row["kl_max"])} for row in self._rows],
        }
        unfinished = self._path.with_suffix(".partial")
        unfinished.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self._path)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    kl = row["kl_max"]
    memory = [
        "—" if size is None else f"{size / 1e9:.2f}"
        for size in (row["jax_peak_bytes"], row["torch_peak_bytes"])
    ]
    return (
        row["device"] or "—",
        row["model"] or "—",
        row["layout"] or "—",
        row["dtype"] or "—",
        row["what"],
        "—" if kl is None else f"{kl:.2e}",
        f"{row['seconds']:.1f}",
        *memory,
        row["verdict"],
    )
