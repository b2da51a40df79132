"""What a release is made of: sdist and wheel, notes, the page, and a tag that says what it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile

import pytest
import yaml
from documents import ROOT

from gemma_convert.version import __version__

sys.path.insert(0, str(ROOT / "scripts"))

from release_notes import notes

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOWS = ROOT / ".github" / "workflows"


def test_one_version():
    assert re.search(r'^version = "(.*)"$', PROJECT, re.MULTILINE)[1] == __version__


def test_notes_are_those_of_the_version():
    text = notes(f"v{__version__}")
    assert text in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "\n## " not in text
    for tag in (__version__, "v9.9.9", f"v{__version__}.post1"):
        with pytest.raises(ValueError, match="The tag is"):
            notes(tag)


def test_the_sdist_holds_what_its_tests_need(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (file,) = tmp_path.iterdir()
    with tarfile.open(file) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)  # noqa: PLW1510
    known = set(listed.stdout.splitlines()) or held
    left_out = {name for name in known - held if not name.startswith(".ci/")}
    assert left_out <= {".gitignore"}


@pytest.mark.large
def test_both_convert_in_bare_environments(tmp_path):
    """With this Python and with those of 3.11 to 3.13 that the system has. Needs the network."""
    own = f"3.{sys.version_info.minor}"
    others = [one for one in re.findall(r"Python :: (3\.\d+)", PROJECT) if one != own]
    pythons = [sys.executable, *(f"python{one}" for one in others if _runs(f"python{one}"))]
    done = subprocess.run(
        [ROOT / "scripts" / "try_release.sh", tmp_path / "dist", *pythons],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("every file came back") == 2 * len(pythons)


def _runs(program: str) -> bool:
    try:
        return not subprocess.run(
            [program, "--version"], capture_output=True, check=False
        ).returncode
    except OSError:
        return False


@pytest.mark.parametrize(("tag", "moves"), [("v1.0.0rc1", False), ("v1.0.0", True)])
def test_the_page(tmp_path, tag, moves):
    """Stand-ins for gh, git and the notes write down how they are called."""
    for name in ("gh", "git", "python3"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n')
        program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    script = ROOT / "scripts" / "release_page.sh"
    subprocess.run([script, tag, "a.whl"], env=os.environ | {"PATH": path}, check=True)
    made, created, *moved = (tmp_path / "calls").read_text().splitlines()
    assert made == f"python3 scripts/release_notes.py {tag}"
    assert created.startswith(f"gh release create {tag} --verify-tag --notes-file ")
    assert created.endswith(" a.whl")
    assert ("--prerelease" in created) != moves
    expected = [f"git push --force origin {tag}^{{commit}}:refs/tags/v1"]
    assert moved == (expected if moves else [])


def test_only_publishing_may_sign_in_and_it_waits_for_the_checks():
    jobs = yaml.safe_load((WORKFLOWS / "release.yml").read_text(encoding="utf-8"))["jobs"]
    allowed = {name: job["permissions"] for name, job in jobs.items() if "permissions" in job}
    assert allowed == {"publish": {"id-token": "write"}, "page": {"contents": "write"}}
    assert jobs["publish"]["needs"] == ["build", "audit"]
    assert [step["uses"].partition("@")[0] for step in jobs["publish"]["steps"]] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]
