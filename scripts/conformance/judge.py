"""Has frameworks load, run, train and save what was converted for them, and compares.

    judge.py --environments FOLDER [--models "e2b 31b-scanned"] [--out FOLDER] [FRAMEWORK]...

Run by scripts/conformance.sh. What was measured goes into OUT/conformance.json, each model of a
framework in the place of its older measurement, and from that OUT/conformance.md is made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import adapter_checks
import maxtext_checks
import numpy as np
import reference
from case import Case, Row
from frameworks import ALL, FRAMEWORKS, Framework
from page import page

import gemma_convert
from gemma_convert.tiny.sizes import SIZES, VisionSizes

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = "gemma-convert/conformance/1"
MOVED = 1e-3
CHECKS = {"maxtext": (maxtext_checks.commands, maxtext_checks.compare)}
"""What a framework has besides a forward pass and a trainer."""


def run(case: Case) -> None:
    """Conversion, forward pass, training, export, and what the framework has besides."""
    case.convert()
    np.savez(case.folder / "input.npz", ids=reference.tokens())
    commands, compare = CHECKS.get(case.framework.name, (lambda _: [], lambda _: None))
    case.ask(
        ("logits", "settings.json", "input.npz", "before.npz"),
        ("train", "settings.json", "."),
        ("logits", "settings-trained.json", "input.npz", "after.npz"),
        *commands(case),
    )
    _forward(case)
    _training(case)
    compare(case)
    if adapter_checks.tried(case):
        adapter_checks.prepare(case)
        case.ask(*adapter_checks.commands(case))
        adapter_checks.compare(case)


def _forward(case: Case) -> None:
    deviation, name = case.deviation, "KL of the framework's logits, against transformers"
    case.compare(
        name if deviation is None else f"{name} with the {deviation}, as in this release",
        case.framework.limit,
        lambda: reference.worst_kl(
            reference.logits(case.original, deviation), case.array("before.npz")
        ),
    )
    if deviation is not None:
        case.compare(
            f"{name} as it is",
            None,
            lambda: reference.worst_kl(reference.logits(case.original), case.array("before.npz")),
        )


def _training(case: Case) -> None:
    case.compare(
        "largest change of a logit by three training steps",
        MOVED,
        lambda: float(abs(case.array("after.npz") - case.array("before.npz")).max()),
        least=True,
    )
    case.compare(
        "KL of the framework's logits after training, against the export in transformers",
        case.framework.limit,
        lambda: reference.worst_kl(
            reference.logits(_exported(case), case.deviation), case.array("after.npz")
        ),
    )


def _exported(case: Case) -> Path:
    """The Hugging Face checkpoint of the trained one, in float32, proven against it."""
    trained = case.folder / case.framework.trained
    gemma_convert.to_hf(trained, case.exported, like=case.original, dtype="float32")
    assert gemma_convert.verify(case.exported, against=trained).passed
    return case.exported


def cases(framework: Framework, environment: Path, work: Path, only: list[str]) -> Iterator[Case]:
    """What is to be run of a framework, each in a new folder below `work`; all, or `only` some."""
    release = versions(framework, environment)[framework.package]
    for model, forms in framework.models.items():
        for scanned in forms:
            name = f"{model}{'-scanned' * scanned}"
            if only and name not in only:
                continue
            folder = work / name
            folder.mkdir()
            deviation, sees = framework.deviation(model, release), framework.sees(model, scanned)
            yield Case(framework, environment, folder, model, scanned, deviation, sees)


def versions(framework: Framework, environment: Path) -> dict[str, str]:
    """The versions of the packages that decide, as they are installed."""
    names = (framework.package, *framework.companions)
    asked = f"import importlib.metadata as m; print(*map(m.version, {names!r}))"
    done = subprocess.run(
        [environment / "bin" / "python", "-c", asked], check=True, capture_output=True, text=True
    )
    return dict(zip(names, done.stdout.split(), strict=True))


def measure(case: Case) -> dict[str, Any]:
    """What was measured of a case."""
    print(f"{case.framework.title}, {case.name}", flush=True)
    try:
        run(case)
    except Exception as error:
        traceback.print_exc()
        case.rows.append(Row("the run itself", None, 0, note=str(error)))
    ours = ("gemma-convert", "transformers", *(["peft"] if adapter_checks.tried(case) else []))
    return {
        "framework": case.framework.name,
        "model": case.model,
        "scanned": case.scanned,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": versions(case.framework, case.environment)
        | {name: version(name) for name in ours},
        "rows": [asdict(row) | {"passed": row.passed} for row in case.rows],
    }


def merged(older: list[dict[str, Any]], newer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with the newer ones in the place of older ones, in the order of FRAMEWORKS."""

    def key(record: dict[str, Any]) -> tuple[int, int, bool]:
        place = list(FRAMEWORKS).index(record["framework"])
        return place, ALL.index(record["model"]), record["scanned"]

    return [one for _, one in sorted({key(one): one for one in older + newer}.items())]


def _fit_vision_towers() -> None:
    """The tiny models' towers as MaxText can have them: heads of hidden / heads, patches of 16."""
    for model, sizes in SIZES.items():
        seen = sizes.vision
        if isinstance(seen, VisionSizes) and sizes.audio is None:
            fitting = replace(seen, embed=seen.heads * seen.head_dim, patch_size=16)
            SIZES[model] = replace(sizes, vision=fitting)


def main() -> int:
    """The exit code: 1 where a comparison failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("frameworks", nargs="*", choices=list(FRAMEWORKS))
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--models", type=str.split, default=[])
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    given = parser.parse_args()
    _fit_vision_towers()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "conformance.json"
    records = json.loads(file.read_text(encoding="utf-8"))["records"] if file.exists() else []
    failed = False
    for name in given.frameworks:
        with tempfile.TemporaryDirectory() as work:
            for case in cases(
                FRAMEWORKS[name], given.environments / name, Path(work), given.models
            ):
                record = measure(case)
                failed |= not all(row["passed"] for row in record["rows"])
                records = merged(records, [record])
                data = {"schema": SCHEMA, "records": records}
                text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
                file.write_text(text, encoding="utf-8")
                (given.out / "conformance.md").write_text(page(records), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
