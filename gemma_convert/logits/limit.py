"""How large a divergence may be, and whether staying below it proves anything."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_convert.checkpoint.manifest import MAX_BYTES as MAX_MANIFEST_BYTES
from gemma_convert.checkpoint.sidecar import sidecar_root
from gemma_convert.errors import SourceError, UsageError, some
from gemma_convert.files.json_file import read_object
from gemma_convert.forward.native_model import Dtype
from gemma_convert.logits.divergence import Divergence
from gemma_convert.model.architecture import Architecture
from gemma_convert.output import printable

PROOF_LIMIT = 1e-5
NOISE_FACTOR = 10.0
"""How many times the noise floor the KL of all but one token in a hundred may be."""

SINGLE_NOISE_FACTOR = 100.0
"""How many times that of any one may be: what a network amplifies in one direction alone differs by
so much from one draw of noise to the next."""

INDICATION_LIMIT = 0.03
"""The limit of MaxText's own conversion scripts, per token."""

SHOWN = 3

_MANIFEST = "hf/gemma-convert/manifest.json"


@dataclass(frozen=True)
class Limit:
    """The largest KL a token may have, and whether a pass is then a proof.

    `kl_p99` is what all but one token in a hundred may have, None where that is `kl`.
    """

    kl: float
    proof: bool
    reason: str
    warnings: tuple[str, ...]
    kl_p99: float | None = None

    def above(self, noise_floor: float | None) -> Limit:
        """The limit where noise alone moves the reference so far; it is never less than it was.

        Noise is then what binds, and no pass is a proof of more than each part by itself is.
        """
        if noise_floor is None or not self.kl < SINGLE_NOISE_FACTOR * noise_floor:
            return self
        most = max(self.kl, NOISE_FACTOR * noise_floor)
        reason = (
            f"{SINGLE_NOISE_FACTOR:g} × the effect of rounding in this network; {most:.0e} for "
            "all but one token in a hundred"
        )
        return replace(self, kl=SINGLE_NOISE_FACTOR * noise_floor, kl_p99=most, reason=reason)

    def allows(self, found: Divergence) -> bool:
        """Whether the worst token, and all but one in a hundred, are within; NaN never is."""
        return found.within(self.kl) and (self.kl_p99 is None or found.kl_p99 <= self.kl_p99)


def choose_limit(max_kl: float | None, dtype: Dtype, lossy_rows: Sequence[str]) -> Limit:
    """The limit for one run, and why. Raises UsageError for a `max_kl` that is no number."""
    if max_kl is not None and not 0 <= max_kl < math.inf:
        raise UsageError("--max-kl must not be negative.", found=max_kl)
    warnings = []
    if dtype != "float32":
        warnings.append(
            f"The native model ran in {dtype}: rounding changes the logits, so passing is an "
            "indication, not proof. Run it in float32 for a proof."
        )
    if lossy_rows:
        rounded = some([*map(printable, lossy_rows)], SHOWN, "; ")
        warnings.append(
            f"The checkpoint has rounded values ({rounded}), so passing is an indication, not "
            "proof. For a proof convert with --dtype keep --scaled-dtype float32."
        )
    exact = not warnings
    default = PROOF_LIMIT if exact else INDICATION_LIMIT
    kl = default if max_kl is None else max_kl
    if exact and kl > PROOF_LIMIT:
        warnings.append(
            f"The limit {kl:g} is larger than float32 needs ({PROOF_LIMIT:g}), so passing is an "
            "indication, not proof."
        )
    reason = "float32, nothing rounded" if exact else "rounding"
    return Limit(
        kl=kl,
        proof=exact and kl <= PROOF_LIMIT,
        reason=reason if max_kl is None else "as asked for",
        warnings=tuple(warnings),
    )


def find_lossy_rows(
    folder: Path, dtypes: Collection[str], scaled_dtype: str | None, architecture: Architecture
) -> tuple[str, ...]:
    """What the native checkpoint in `folder` holds rounded: by its manifest, or by its dtypes.

    `scaled_dtype` is that of an embedding stored × √embed, None where it is stored as it is.
    """
    rows = recorded_lossy_rows(folder)
    if rows is not None:
        return rows
    if architecture.dtype == "float32" and "bfloat16" in dtypes:
        return ("weights: float32 in the original, bfloat16 here",)
    embed = architecture.text.embed
    exact = embed & (embed - 1) == 0 and embed.bit_length() % 2 == 1  # √embed is a power of two
    if scaled_dtype == "bfloat16" and not exact:
        return ("the embedding: scaled, in bfloat16",)
    return ()


def recorded_lossy_rows(folder: Path | None) -> tuple[str, ...] | None:
    """What the manifest of the native checkpoint in `folder` says is rounded; None without one."""
    root = None if folder is None else sidecar_root(folder)
    if root is None:
        return None
    try:
        rows = read_object(root / _MANIFEST, "The manifest", MAX_MANIFEST_BYTES).get("lossy_rows")
    except (FileNotFoundError, SourceError):
        return None
    if not isinstance(rows, list):
        return None
    return tuple(
        f"{row.get('tensor') or row.get('row', '?')}: {row.get('reason', 'rounded')}"
        if isinstance(row, dict)
        else str(row)
        for row in rows
    )
