"""One model in one form, with one framework: what it is asked to do, and what is compared."""

from __future__ import annotations

import json
import os
import subprocess
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from frameworks import Framework

import gemma_convert

FEWEST = {"e2b": 10, "e4b": 12, "12b": 6, "26b-a4b": 6, "31b": 6}
"""The fewest layers that have every kind: sliding, full, and those that share keys and values."""


@dataclass(frozen=True)
class Row:
    """One comparison: `figure` is at most `limit`, or, where `least`, at least that."""

    check: str
    figure: float | None
    limit: float | None
    least: bool = False
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure is within its limit; one without a limit is only told."""
        if self.figure is None:
            return False
        if self.limit is None:
            return True
        return self.figure >= self.limit if self.least else self.figure <= self.limit


@dataclass
class Case:
    """One model in one form: its folder, what the framework is told, what it was asked to do."""

    framework: Framework
    environment: Path
    folder: Path
    model: str
    scanned: bool
    deviation: str | None
    sees: bool
    rows: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The model and its form."""
        return f"{self.model}{', scanned' * self.scanned}{', with its tower' * self.sees}"

    @property
    def exported(self) -> Path:
        """The Hugging Face checkpoint of the trained weights, in float32."""
        return self.folder / "exported"

    @property
    def original(self) -> Path:
        """The tiny Hugging Face checkpoint."""
        return self.folder / "original"

    def convert(self) -> None:
        """Makes the tiny checkpoint and its conversion, and writes what the framework is told."""
        layers = FEWEST[self.model] * (1 + self.scanned)
        gemma_convert.make_tiny(self.model, self.original, layers=layers)
        converted = self.folder / "converted"
        report = gemma_convert.to_native(
            self.original,
            converted,
            layout=self.framework.layout,
            scan_layers=self.scanned,
            dtype="float32",
            text_only=not self.sees,
        )
        self.tell("settings", report.settings, converted, self.folder / self.framework.trained)

    def tell(self, name: str, settings: Mapping[str, str], converted: Path, trained: Path) -> None:
        """Writes NAME.json, and NAME-trained.json with another path for that of the conversion."""
        old = str((converted / self.framework.converted).resolve())
        after = {key: value.replace(old, str(trained.resolve())) for key, value in settings.items()}
        assert after != settings, f"{old} is nowhere in {settings}"
        for file, told in ((name, settings), (f"{name}-trained", after)):
            (self.folder / f"{file}.json").write_text(json.dumps(told), encoding="utf-8")

    def ask(self, *commands: Iterable[object]) -> None:
        """Runs commands of the framework's script, one after the other, in one process."""
        words: list[str] = []
        for command in commands:
            words += ["+"] * bool(words) + [str(word) for word in command]
        script = Path(__file__).with_name(f"{self.framework.name.replace('-', '_')}.py")
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with (self.folder / "log.txt").open("ab") as log:
            subprocess.run(
                [self.environment / "bin" / "python", "-P", script, *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
                cwd=self.folder,
                env=own,
            )

    def compare(
        self, check: str, limit: float | None, figure: Callable[[], float], least: bool = False
    ) -> None:
        """Adds a row; what goes wrong on the way is a failed row that says so."""
        try:
            found, note = figure(), ""
        except Exception as error:
            traceback.print_exc()
            found, note = None, f"{type(error).__name__}: {error}"
        row = Row(check, found, limit, least, note)
        self.rows.append(row)
        told = "none" if found is None else f"{found:.3g}"
        print(f"  {'ok    ' if row.passed else 'FAILED'} {check}: {told} {note}", flush=True)
        if not row.passed and found is None:
            log = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
            print("\n".join(log.splitlines()[-25:]), flush=True)

    def array(self, file: str, name: str = "logits") -> np.ndarray:
        """An array that the framework's script has written."""
        return np.load(self.folder / file)[name]
