"""What a conversion to a native layout did, as data for people and for `--json`."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gemma_convert.mapping.plan import Plan


@dataclass(frozen=True)
class LossyRow:
    """A row whose values were rounded: `values` of them do not come back bit for bit."""

    row: str
    tensor: str
    reason: str
    values: int


@dataclass(frozen=True)
class ToNativeReport:
    """What a conversion did; with `dry_run`, what it would do."""

    source: str
    target: str
    layout: str
    scanned: bool
    family: str
    dry_run: bool
    tensors_converted: int
    bytes_read: int
    arrays_written: int
    bytes_written: int
    tensors_carried: int
    bytes_carried: int
    carried_why: dict[str, int]
    tied: tuple[str, ...]
    shared: int
    filled: tuple[str, ...]
    lossy_rows: tuple[LossyRow, ...]
    exceptions: int
    files_carried: tuple[str, ...]
    not_carried: tuple[str, ...]
    framework: str
    settings: dict[str, str]
    seconds: float
    bytes_per_second: float
    peak_memory_bytes: int
    sealed: bool = False
    """Whether the source is a native checkpoint with a manifest, whose checksums were compared."""
    changed_arrays: tuple[str, ...] = ()
    """Arrays of such a source that differ from their checksums: trained since, or damaged."""
    adapter: dict[str, object] | None = None
    """For an adapter: its `rank`, `alpha` and `base`, how many `weights`, and whether `merged`."""
    already_complete: bool = False
    """With `resume`: the target existed already, and equals what this run would have written."""
    plan: Plan | None = None

    def as_json(self) -> dict[str, object]:
        """The report as `--json` prints it; on a dry run it lists the arrays."""
        values = asdict(replace(self, plan=None))
        del values["plan"]
        if self.plan is not None and self.dry_run:
            values["arrays"] = {
                name: {
                    "dtype": target.spec.dtype,
                    "shape": target.spec.shape,
                    "chunk": target.chunk,
                }
                for name, target in self.plan.targets.items()
            }
        return {"schema": "gemma-convert/to-native/3", **values}


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes.

    On Linux that is VmHWM: ru_maxrss keeps what the process was before it was replaced by exec.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
