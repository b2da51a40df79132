"""What the documentation says is true: its commands run, its options exist, its pages fit."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import math
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import wave
from pathlib import Path

import numpy as np
import pytest
import yaml
from adapters import matrices, one_a, save
from cases import SHALLOW
from distcp_folders import halves, save_distcp, state_of
from documents import PAGES, ROOT, SHELLS, Block, Command, blocks, code_spans, command, excuses
from filelock import FileLock
from models import load_tensors
from test_cli import run, run_apart

import gemma_convert
from gemma_convert import inspect
from gemma_convert.logits import check
from gemma_convert.prompts import text
from gemma_convert.tasks.mappings import list_mappings
from gemma_convert.version import CONVERTER

sys.path.insert(0, str(ROOT / "scripts"))

import docs_hook
from commands_page import commands, page

OPTIONS = {one.name: one.options | {"--help"} for one in commands()}

FOLDERS = {
    "gemma-4-E2B-it": "e2b",
    "gemma-4-E4B-it": "e4b",
    "gemma-4-12B": "12b",
    "gemma-4-26B-A4B-it": "26b-a4b",
    "gemma-4-31B-it": "31b",
}
"""Names of checkpoints in the documentation, and the tiny model that stands in for each."""

OF_OTHERS = {
    "--check": "scripts/commands_page.py",
    "--build-arg": "docker",
    "--constraint": "pip",
    "--from": "uvx",
    "--rm": "docker",
    "--spec": "pipx",
    "--every": "scripts/test.sh",
    "--full": "scripts/benchmark.py",
    "--gigabytes": "scripts/benchmark.py",
    "--latest": "scripts/conformance.sh",
    "--models": "scripts/conformance.sh",
    "--out": "scripts/conformance.sh",
    "--peer": "scripts/benchmark.py",
    "--phases": "scripts/benchmark.py",
    "--rounds": "scripts/benchmark.py",
    "--strict": "mkdocs",
    "--version": "gemma-convert itself",
    "--weights": "scripts/benchmark.py",
    "--install-completion": "gemma-convert itself",
    "--show-completion": "gemma-convert itself",
}
"""Options that are mentioned and belong to no command."""

REMOTE = re.compile(r"(?:s3|gs)://")
FILE = re.compile(r"# ([\w-]+/[\w/.-]+\.(?:toml|py))\n")
"""The first line of a block that is a file."""

BUILD = ("docker", "build", "-t", "gemma-convert", ".")
RUNNERS = (("pipx", "run"), ("uvx",), ("docker", "run"))

PACKAGES = Path("packages")
"""Where a page installs packages of its own, which processes started later find."""

LEFT_OUT = "…"
"""A line of an output that stands for others."""

REVISION = re.compile(r"(google/gemma-4-[\w-]+)@[\w.]+")

runnable = [
    pytest.param(one, id=one.stem if one.stem != "index" else f"{one.parent.name}-index")
    for one in PAGES
    if any(b.language in (*SHELLS, "python") and b.excuse is None for b in blocks(one))
]
every_page = pytest.mark.parametrize("document", PAGES, ids=lambda one: str(one.relative_to(ROOT)))


@pytest.fixture
def work(shallow, tmp_path, monkeypatch) -> Path:
    """A folder with what the pages take for granted: checkpoints, an adapter, media."""
    for name, family in FOLDERS.items():
        for folder in (tmp_path / name, tmp_path / "google" / name):
            shutil.copytree(shallow(family), folder)
    model = tmp_path / "gemma-4-31B-it"
    save(tmp_path / "adapter", model, matrices(model))
    save(tmp_path / "tunix-adapter", model, one_a(matrices(model)))
    generator = np.random.default_rng(0)
    from PIL import Image

    Image.fromarray(generator.integers(0, 256, (48, 64, 3), np.uint8)).save(tmp_path / "cat.png")
    with wave.open(str(tmp_path / "speech.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16000)
        sound.writeframes(generator.integers(-9999, 9999, 8000, np.int16).tobytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / PACKAGES), prepend=os.pathsep)
    return tmp_path


@pytest.fixture
def checked_once(tmp_path_factory, monkeypatch) -> None:
    """Logit checks of the same two sides with the same options are computed once in a session.

    They run on one of the built-in prompts and on the one that is longer than the window.
    """
    real, root = check.logit_check, tmp_path_factory.getbasetemp()
    root = root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root

    def once(hf, native, **options):
        name = hashlib.sha256(repr(_same(Path(hf), Path(native), options)).encode()).hexdigest()
        file = root / f"check-{name[:32]}"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                file.write_bytes(pickle.dumps(real(hf, native, **options)))
            return pickle.loads(file.read_bytes())

    monkeypatch.setattr(check, "logit_check", once)
    monkeypatch.setattr(text, "PROMPTS", {"english": text.PROMPTS["english"]})


def _same(hf: Path, native: Path, options: dict[str, object]) -> tuple[object, ...]:
    """What decides a check: the config, the sizes and samples of both sides, and the options."""
    found = inspect(native)
    sides = [(found.layout, found.scanned, found.tensors, found.lossy_rows, found.dtypes)]
    for folder in (hf, native):
        for file in sorted(folder.rglob("*")):
            if file.name in ("config.json", "model.safetensors", "model_0.safetensors"):
                sides.append((file.name, hashlib.sha256(file.read_bytes()).hexdigest()))
    return (sides, sorted(options.items()))


@pytest.mark.share(6)
@pytest.mark.parametrize("document", runnable)
@pytest.mark.usefixtures("checked_once")
def test_every_block_runs(document, work):
    names: dict[str, object] = {}
    printed = ""
    for block in blocks(document):
        for line in block.before:
            _prepare(line, block)
        if block.excuse is not None:
            continue
        if file := FILE.match(block.text):
            Path(file[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(file[1]).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, block.where, "exec"), names)
        elif block.language in SHELLS:
            printed = "".join([_run(one, block) for one in block.commands])
        elif block.output:
            said = _without_figures(printed)
            for line in block.text.splitlines():
                assert line == LEFT_OUT or _without_figures(line) in said, f"{block.where}: {line}"


def _without_figures(text: str) -> str:
    """One line of the words of an output: no sizes, times, paths or figures, single spaces."""
    for figures in (r"(?<==)/\S+", r"\d[\d.,]*(?:e[+-]\d+)?", r"\b[KMG]?i?B(?=[/,)\s]|$)"):
        text = re.sub(figures, "0", text)
    return " ".join(text.split())


def _prepare(line: str, block: Block) -> None:
    """A hidden line: a command, `remove OUT`, or what a framework saves.

    That is `trained OUT FOLDER` of a native layout, `sharded HF FOLDER` of torch, and `adapter-run
    OUT FOLDER` of an adapter, whose step does not say how it is scaled.
    """
    words = line.split()
    if words[0] == "remove":
        shutil.rmtree(words[1])
    elif words[0] == "adapter-run":
        shutil.copytree(Path(words[1], "0", "items"), Path(words[2], "model_params"))
    elif words[0] == "trained":
        step = Path(words[1]) / "0"
        source = step if step.is_dir() else Path(words[1])
        shutil.copytree(source, words[2], ignore=shutil.ignore_patterns("hf"))
        _not_converted(Path(words[2]))
    elif words[0] == "sharded":
        save_distcp(Path(words[2]), {"model": state_of(Path(words[1]))}, halves(0))
    else:
        _run(command(line), block)


def _not_converted(folder: Path) -> None:
    """Takes away what says that a conversion wrote the files: a framework writes its own."""
    for file in folder.rglob("_CHECKPOINT_METADATA"):
        metadata = json.loads(file.read_text())
        del metadata["custom_metadata"][CONVERTER]
        file.write_text(json.dumps(metadata))
    for file in folder.rglob("metadata.yaml"):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if not line.strip().startswith(CONVERTER)))


def _run(one: Command, block: Block) -> str:
    """What a command of ours prints; nothing of others."""
    program, *arguments = _unwrapped(one.words)
    if program == "gemma-convert":
        return _run_ours(one, arguments, block)
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        known = extras["optional-dependencies"]
        for package in arguments[1:]:
            if package.startswith("./"):
                _install(Path(package))
                continue
            name, _, chosen = package.partition("[")
            assert name == "gemma-convert", f"{block.where}: {one.text}"
            assert set(chosen.strip("]").split(",")) - {""} <= known.keys(), one.text
    else:
        _exists(one, block)
    return ""


def _unwrapped(words: tuple[str, ...]) -> tuple[str, ...]:
    """The command that pipx, uv or a container runs, as if it were installed here."""
    if words[:2] in RUNNERS or words[:1] in RUNNERS:
        return words[words.index("gemma-convert") :]
    return words


def _install(folder: Path) -> None:
    """A package of the page, without a network and beside the packages of the tests."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        *options,
        str(PACKAGES),
        str(folder.resolve()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _exists(one: Command, block: Block) -> None:
    """A line that names a script or a test of this repository: all of them are there."""
    program, *arguments = one.words
    if one.words == BUILD:
        return
    ours = [word for word in (program, *arguments) if word.startswith(("scripts/", "tests/"))]
    assert ours, f"{block.where}: cannot be run: {one.text}"
    assert program.startswith(("scripts/", ".venv/bin/")), f"{block.where}: {one.text}"
    for word in ours:
        assert (ROOT / word.partition("::")[0]).exists(), f"{block.where}: {one.text}"


def _run_ours(one: Command, arguments: list[str], block: Block) -> str:
    errors = arguments.pop() if arguments[-2:-1] == ["2>"] else None
    arguments, pipe, target = _split(arguments[:-1] if errors else arguments)
    arguments = [REVISION.sub(r"\1", REMOTE.sub("remote/", word)) for word in arguments]
    if arguments[0] == "tiny" and "--layers" not in arguments:
        arguments += ["--layers", str(SHALLOW[arguments[1]])]
    done = (run_apart if PACKAGES.is_dir() else run)(*arguments)
    assert done.returncode == one.code, f"{block.where}: {one.text}\n{done.stderr}{done.stdout}"
    if pipe:
        done = subprocess.run(pipe, input=done.stdout, capture_output=True, text=True, check=True)
        assert done.stdout, f"{block.where}: {one.text}"
    if target:
        Path(target).write_text(done.stdout)
    if errors:
        Path(errors).write_text(done.stderr)
    return done.stdout


def _split(words: list[str]) -> tuple[list[str], list[str], str | None]:
    """(our arguments, the command behind `|`, the file behind `>`)."""
    words, target = (words[: words.index(">")], words[-1]) if ">" in words else (words, None)
    at = words.index("|") if "|" in words else len(words)
    return words[:at], words[at + 1 :], target


@every_page
def test_commands_and_options_exist(document):
    for span in [*code_spans(document), *_lines(document)]:
        words = span.split()
        if words[:1] == ["gemma-convert"] and len(words) > 1 and words[1][0] not in "-C":
            assert words[1] in OPTIONS, f"{document.name}: {span}"
        named = words[1:2] if words[:1] == ["gemma-convert"] else words[:1]
        known = OPTIONS.get(named[0]) if named else None
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span):
            if option in OF_OTHERS and (known is None or named[0] not in OPTIONS):
                continue
            allowed = frozenset().union(*OPTIONS.values()) if known is None else known
            assert option in allowed, f"{document.name}: {option} in {span}"


def _lines(document: Path) -> list[str]:
    shells = [b for b in blocks(document) if b.language in SHELLS and b.excuse is None]
    return [shlex.join(one.words) for block in shells for one in block.commands]


@every_page
def test_what_is_not_run_is_not_ours(document):
    """An excuse belongs to a block, and only other people's commands may have one."""
    excused = [block for block in blocks(document) if block.excuse is not None]
    assert len(excused) == len(excuses(document))
    for block in excused:
        assert block.excuse.startswith("needs "), block.where
        assert not re.search(r"gemma[-_]convert", block.text), block.where


def test_the_reference_of_the_commands_is_current():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert text == page(), "run scripts/commands_page.py"
    for one in commands():
        assert f"\n## {one.name}\n" in text
        assert all(f"`{option}`" in text for option in one.options)


def test_links_lead_to_pages_and_headings():
    for document in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
            if target.startswith(("https://", "mailto:")):
                continue
            file, _, anchor = target.partition("#")
            other = (document.parent / file).resolve() if file else document
            assert other.exists(), f"{document.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in map(_slug, headings), f"{document.name}: {target}"


def _slug(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown makes it."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {str(one.relative_to(ROOT / "docs")) for one in (ROOT / "docs").rglob("*.md")}
    assert _leaves(settings["nav"]) == pages
    assert settings["strict"] is True
    assert settings["theme"]["font"] is False


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    loads = re.compile(r"<(?:script|img|iframe)[^>]+src=[\"']?https?:|<link[^>]+href=[\"']?https?:")
    for built in tmp_path.rglob("*.html"):
        assert not loads.search(built.read_text(encoding="utf-8")), built.name


def _leaves(nav: object) -> set[str]:
    if isinstance(nav, str):
        return {nav}
    parts = nav.values() if isinstance(nav, dict) else nav
    return set().union(*map(_leaves, parts))


def test_the_table_of_what_is_supported_is_that_of_the_layouts():
    """A row for every model in every layout, which says `refused` where the layout refuses it."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## What is supported\n")[1]
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|", section.split("\n## ")[0], re.MULTILINE
    )
    said = {
        (model.lower(), layout.partition(",")[0].lower()): not cell.startswith("refused")
        for models, layouts, cell in rows[1:]
        for model in models.split(", ")
        for layout in layouts.split("; ")
    }
    found = {
        (model, one.format): not one.refused
        for model in FOLDERS.values()
        for one in list_mappings(model=model).formats
    }
    assert said == found


def test_the_sizes_on_the_front_page_are_those_of_the_published_tensors():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    columns = ("maxtext", "gemma-jax", "tunix", "fast-llm")
    for name, model in FOLDERS.items():
        tensors = load_tensors(name).values()
        formats = {one.format: one.model for one in list_mappings(model=model).formats}
        sizes = [None if formats[one] is None else formats[one].bytes for one in columns]
        counted = [sum(spec.nbytes for spec in tensors), *sizes]
        cells = ["refused" if size is None else f"{size / 1e9:.1f}" for size in counted]
        values = f"{sum(math.prod(spec.shape) for spec in tensors):,}"
        label = name.removeprefix("gemma-4-").removesuffix("-it")
        assert f"\n| {label} | {values} | {' | '.join(cells)} |\n" in text


def test_every_public_name_has_its_place_and_an_example():
    """On one page: a heading, what the docstring says, and a block in which the name stands."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))
    sections = {name.replace("\\", ""): body for name, body in sections.items()}
    assert sections.keys() == set(gemma_convert.__all__)
    for name, body in sections.items():
        assert f"::: gemma_convert.{name}\n" in body or name == "__version__"
        (example, *_) = re.findall(r"^```python\n(.*?)^```", body, re.MULTILINE | re.DOTALL)
        used = {
            node.attr if isinstance(node, ast.Attribute) else node.id
            for node in ast.walk(ast.parse(example))
            if isinstance(node, ast.Attribute | ast.Name)
        }
        assert name in used, name


def test_the_names_that_stay_are_all_there():
    text = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| commands \| (.*) \|$", text, re.MULTILINE)
    assert set(re.findall(r"`([\w-]+)`", row)) == OPTIONS.keys()
    for variable in re.findall(r"`([A-Z_]{4,})`", text.split("| environment |")[1].split("\n")[0]):
        package = (ROOT / "gemma_convert").rglob("*.py")
        assert any(variable in file.read_text(encoding="utf-8") for file in package), variable
    own = (ROOT / "docs" / "adding-a-layout.md").read_text(encoding="utf-8")
    needed = set(re.findall(r"\bgemma_convert\.(?:checkpoint|forward)\.\w+", own))
    needed.add("gemma_convert.checkpoint.orbax_layout")
    assert set(re.findall(r"^- `(gemma_convert[\w.]+)`$", text, re.MULTILINE)) == needed
    for module in needed:
        importlib.import_module(module)


def test_each_answer_leads_to_a_test_that_shows_it():
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    for answer in text.split("\n## ")[1:]:
        *_, last = answer.strip().split("\n\n")
        assert last.startswith("Shown by "), answer.partition("\n")[0]
        assert docs_hook.LINK.search(last)
        assert not docs_hook.LINK.sub("", last).replace("Shown by", "").strip(" ,.and")
        for said, name, file in docs_hook.LINK.findall(last):
            assert said == file
            assert name.startswith("test_")
            assert f"def {name}(" in docs_hook.source(file, name)


def test_the_site_has_the_tests_below_the_answers():
    one = "[`test_docs.py::test_the_site_has_the_tests_below_the_answers`](../tests/test_docs.py)"
    page = docs_hook.on_page_markdown(f"Before.\n\nShown by {one}.\n\nBehind.")
    before, below = page.split("\n\n??? example ")
    assert before == "Before."
    assert below.startswith('"Shown by `tests/test_docs.py::test_the_site_has_the_tests_below')
    assert "    def test_the_site_has_the_tests_below_the_answers():\n        one = " in below
    assert below.endswith("\n    ```\n\nBehind.")
    with pytest.raises(KeyError):
        docs_hook.source("test_docs.py", "test_that_there_is_none")


def test_headings_and_options_in_the_site():
    page = '<h5 id="a">as_json</h5><code>--a-b 1</code><pre><span></span><code>--a-b</code></pre>'
    assert docs_hook.on_page_content(page) == (
        '<h4 id="a">as_json</h4><code><span class="word">--a-b</span> '
        '<span class="word">1</span></code>'
        "<pre><span></span><code>--a-b</code></pre>"
    )
