#!/usr/bin/env python3
"""Measures the verification cards: what was verified of each model in each layout, and how well.

    GEMMA_CONVERT_ORACLE=FOLDER scripts/cards.py [--only CARD]... [--page]

Writes docs/cards/cards.json and, from it, docs/cards/index.md. Every figure is measured here, by
the commands that a card names, on tiny random checkpoints, on the published lists of tensors, and
on checkpoints that the real frameworks wrote (the folder). Takes some minutes. `--only` measures a
few cards again and leaves the others; `--page` writes the page alone.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from cards_page import page
from media import write_picture, write_sound

from gemma_convert import GemmaConvertError
from gemma_convert.arrays.dtypes import SAFETENSORS_NAMES, DTypePolicy, TensorSpec
from gemma_convert.cli.app import main as command_line
from gemma_convert.mapping.plan import Plan
from gemma_convert.mapping.planning import plan_to_native
from gemma_convert.mapping.table import load_table
from gemma_convert.model.architecture import Family
from gemma_convert.model.config import parse_architecture

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "docs" / "cards" / "cards.json"
PAGE = ROOT / "docs" / "cards" / "index.md"
PUBLISHED = ROOT / "tests" / "data" / "models"
SCHEMA = "gemma-convert/cards/1"

MODELS = {
    "e2b": "gemma-4-E2B-it",
    "e4b": "gemma-4-E4B-it",
    "12b": "gemma-4-12B",
    "26b-a4b": "gemma-4-26B-A4B-it",
    "31b": "gemma-4-31B-it",
}
FORMS = (
    ("maxtext", False),
    ("maxtext", True),
    ("gemma-jax", False),
    ("fast-llm", False),
    ("tunix", False),
)
LIBRARIES = (
    "gemma-convert",
    "jax",
    "numpy",
    "orbax-checkpoint",
    "tensorstore",
    "torch",
    "transformers",
)

IMAGE, SOUND = "cat.png", "speech.wav"

LIMITS = {"text": 1e-8, "image": 1e-8, "sound": 1e-8, "framework": 1e-5}
"""The largest KL that a card may show: far below logit-check's own limit, 1e-5, where nothing but
float32 noise stands between the two; the frameworks' own logits have more of it."""

TESTS = {
    "maxtext": "tests/test_native_maxtext.py::test_maxtexts_own_trees_give_maxtexts_own_logits",
    "gemma-jax": "tests/test_native_gemma_jax.py::test_the_librarys_own_trees_give_its_own_logits",
    "fast-llm": "tests/test_native_fast_llm.py::test_fast_llms_own_checkpoints_give_its_own_logits",
}
"""The test that compares our forward pass with the framework's own logits."""


@dataclass(frozen=True)
class Published:
    """The plan of the published list of tensors: each has one fate, each array is covered once."""

    model: str
    tensors: int
    arrays: int
    converted: int
    carried: int
    shared: int
    filled: int


@dataclass(frozen=True)
class Tiny:
    """A tiny checkpoint there and back: arrays compared, files with their old bytes, largest KL."""

    arrays: int
    files: int
    identical: int
    kl: Mapping[str, float]


@dataclass(frozen=True)
class Framework:
    """A checkpoint that the framework itself wrote or loaded, against its original.

    `arrays` were compared, bit for bit or within the rounding that the layout has; `kl` is of our
    forward pass on it, `own_kl` of the logits that the framework computed, both against
    transformers; `test` compares the two passes.
    """

    arrays: int
    kl: float
    own_kl: float
    test: str


@dataclass(frozen=True)
class Card:
    """One model in one layout; `refused` says why where the layout has no place for it."""

    name: str
    family: str
    layout: str
    scanned: bool
    date: str
    refused: str | None = None
    published: Published | None = None
    tiny: Tiny | None = None
    framework: Framework | None = None
    commands: tuple[str, ...] = ()


def families() -> list[str]:
    """The models that can be converted, whose list of tensors lies here."""
    known = get_args(Family)
    return [one for one in MODELS if one in known and _list(one).is_file()]


def card_names() -> list[str]:
    """The name of every card, in order."""
    return [_name(family, layout, scanned) for family in families() for layout, scanned in FORMS]


def published_plan(family: str, layout: str, scanned: bool) -> Plan:
    """The plan of the published list; raises GemmaConvertError where either side is not covered."""
    folder = PUBLISHED / MODELS[family]
    listed = json.loads(gzip.decompress(_list(family).read_bytes()))
    specs = {
        name: TensorSpec(SAFETENSORS_NAMES[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in listed.items()
    }
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = parse_architecture(config, folder / "config.json")
    return plan_to_native(architecture, load_table(layout), specs, DTypePolicy(), scanned=scanned)


def published_counts(family: str, plan: Plan) -> Published:
    """The plan in numbers; every tensor has exactly one fate."""
    fates = [*plan.sources, *plan.carried, *plan.tied, *plan.shared]
    listed = json.loads(gzip.decompress(_list(family).read_bytes()))
    if sorted(fates) != sorted(listed):
        raise SystemExit(f"{family}, {plan.layout}: a tensor has no fate, or two")
    return Published(
        model=MODELS[family],
        tensors=len(listed),
        arrays=len(plan.targets),
        converted=len(plan.sources),
        carried=len(plan.carried),
        shared=len(plan.shared),
        filled=len(plan.filled),
    )


def measure(family: str, layout: str, scanned: bool, oracle: Path) -> Card:
    """One card, everything on it run now."""
    name, today = _name(family, layout, scanned), datetime.now(UTC).date().isoformat()
    try:
        published = published_counts(family, published_plan(family, layout, scanned))
    except GemmaConvertError as error:
        return Card(name, family, layout, scanned, today, refused=error.what.rstrip("."))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        session = _Session()
        tiny = _tiny(session, family, layout, scanned)
        framework = _framework(session, family, layout, scanned, oracle)
    commands = tuple(session.commands)
    return Card(name, family, layout, scanned, today, None, published, tiny, framework, commands)


class _Session:
    """Runs commands in this process, and keeps their lines."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    def run(self, *words: str, shown: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The JSON that a command prints; `shown` replaces paths in the line that is kept."""
        line = shlex.join(["gemma-convert", *words])
        for path, word in (shown or {}).items():
            line = line.replace(path, word)
        self.commands.append(line)
        print(f"  {line}", file=sys.stderr, flush=True)
        sys.argv, out, code = ["gemma-convert", *words, "--json"], io.StringIO(), 0
        try:
            with contextlib.redirect_stdout(out):
                command_line()
        except SystemExit as done:
            code = int(done.code or 0)
        if code:
            raise SystemExit(f"{line}\nended with {code}\n{out.getvalue()}")
        report: dict[str, Any] = json.loads(out.getvalue())
        return report


def _tiny(session: _Session, family: str, layout: str, scanned: bool) -> Tiny:
    form = ("--scan-layers",) if scanned else ()
    session.run("tiny", family, "hf")
    session.run("to-native", "hf", "out", "--format", layout, *form)
    verified = session.run("verify", "out", "--against", "hf")
    session.run("to-hf", "out", "back")
    files = sorted(Path("hf").iterdir())
    same = [file for file in files if (Path("back") / file.name).read_bytes() == file.read_bytes()]
    if len(list(Path("back").iterdir())) != len(files):
        raise SystemExit("the export has other files than the original")
    return Tiny(verified["checked"], len(files), len(same), _kl(session))


def _kl(session: _Session) -> dict[str, float]:
    """Sense → KL of the worst token; of images and sounds where the checkpoint has the tower."""
    towers = session.run("inspect", "out")["towers"]
    session.commands.pop()
    media = []
    if "vision" in towers:
        write_picture(Path(IMAGE))
        media += ["--image", IMAGE]
    if "audio" in towers:
        write_sound(Path(SOUND))
        media += ["--audio", SOUND]
    report = session.run("logit-check", "hf", "out", *media)
    senses = {IMAGE: "image", SOUND: "sound"}
    kl: dict[str, float] = {}
    for one in report["each_sequence"]:
        sense = next((word for file, word in senses.items() if file in one["sequence"]), "text")
        kl[sense] = max(kl.get(sense, 0.0), one["kl_max"])
    if len(kl) != 1 + len(media) // 2:
        raise SystemExit(f"sequences without a sense: {[one['sequence'] for one in report]}")
    return kl


def _framework(
    session: _Session, family: str, layout: str, scanned: bool, oracle: Path
) -> Framework | None:
    """What holds of the framework's own checkpoint; None where there is none of this model."""
    folder, label = oracle / layout.replace("-", "_"), f"{layout.replace('-', '_')}_{family}"
    if layout == "maxtext":
        form = "scanned" if scanned else "unscanned"
        native, label = folder / f"{family}_{form}", f"{label}_{form}"
    else:
        native = folder / family
    hf = oracle / "hf" / family
    if not native.is_dir():
        return None
    shown = {str(oracle): "$GEMMA_CONVERT_ORACLE"}
    verified = session.run("verify", str(native), "--against", str(hf), shown=shown)
    checked = session.run("logit-check", str(hf), str(native), shown=shown)
    return Framework(
        arrays=verified["checked"],
        kl=checked["kl_max"],
        own_kl=_own_kl(oracle / "logits", family, label),
        test=TESTS[layout],
    )


def _own_kl(folder: Path, family: str, label: str) -> float:
    from safetensors.numpy import load_file

    from gemma_convert.logits.divergence import compare

    theirs = load_file(folder / f"transformers_{family}.safetensors")["logits"]
    own = load_file(folder / f"{label}.safetensors")["logits"]
    vocab = theirs.shape[-1]
    return float(compare(theirs.reshape(-1, vocab), own.reshape(-1, vocab)).kl.max())


def _name(family: str, layout: str, scanned: bool) -> str:
    return f"{family}-{layout}{'-scanned' if scanned else ''}"


def _list(family: str) -> Path:
    return PUBLISHED / MODELS[family] / "tensors.json.gz"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the verification cards.")
    parser.add_argument("--only", action="append", choices=card_names(), help="a card, again")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    options = parser.parse_args()
    data = json.loads(CARDS.read_text(encoding="utf-8")) if CARDS.is_file() else {"cards": []}
    oracle = os.environ.get("GEMMA_CONVERT_ORACLE")
    if not oracle and not options.page:
        parser.error("GEMMA_CONVERT_ORACLE names no folder of the frameworks' checkpoints")
    for family in () if options.page else families():
        for layout, scanned in FORMS:
            name = _name(family, layout, scanned)
            if name in (options.only or card_names()):
                print(name, file=sys.stderr, flush=True)
                card = measure(family, layout, scanned, Path(oracle or ""))
                data = _with(data, asdict(card))
                CARDS.parent.mkdir(parents=True, exist_ok=True)
                CARDS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(data), encoding="utf-8")


def _with(data: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    """The cards with a new one in the place of the old one, in order."""
    found = {one["name"]: one for one in (*data["cards"], card)}
    cards = [found[name] for name in card_names() if name in found]
    return {"schema": SCHEMA, "versions": {one: version(one) for one in LIBRARIES}, "cards": cards}


if __name__ == "__main__":
    main()
