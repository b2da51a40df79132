"""Layouts that other packages bring: found without an import, and named where they are broken."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import invalidate_caches

import pytest
from cases import LAYOUTS
from test_cli import fails, run

from gemma_convert import to_native
from gemma_convert.checkpoint.accounted import beside_native
from gemma_convert.errors import UsageError
from gemma_convert.layouts import registry
from gemma_convert.layouts.registry import is_native, load_layout, open_native
from gemma_convert.mapping import declared
from gemma_convert.mapping.table import load_table, table_file

WHOLE = """
from gemma_convert.checkpoint.safetensors_layout import SafetensorsLayout

class Other(SafetensorsLayout):
    name, framework, file = "other", "Other", "other.safetensors"

    def settings(self, plan, target):
        return {}
"""


def forget():
    """Everything that is looked up once in a process."""
    for once in (declared.declarations, load_table, registry.load_layout):
        once.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0].startswith("brings_")]:
        del sys.modules[name]
    invalidate_caches()


@pytest.fixture
def brings(tmp_path, monkeypatch):
    """brings(code, package, table): a package is installed whose module is the layout `other`."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(site)

    def install(code, package="brings_other", table=None):
        (site / package).mkdir(parents=True)
        (site / package / "__init__.py").write_text(code)
        text = table_file("fast-llm").read_text().replace('"fast-llm"', '"other"')
        text = text.replace("metadata\\.yaml', 'model_\\d+\\.safetensors", "other\\.safetensors")
        (site / package / "other.toml").write_text(text if table is None else table)
        facts = site / f"{package}-2.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.0\n")
        declares = f"[gemma_convert.layouts]\nother = {package}:Other\n"
        (facts / "entry_points.txt").write_text(declares)
        forget()

    yield install
    forget()


def test_a_layout_is_listed_and_its_table_read_without_importing_it(brings):
    brings("raise RuntimeError('imported')")
    assert declared.layout_names() == (*LAYOUTS, "other")
    assert load_table("other").layout == "other"
    assert "brings_other" not in sys.modules


def test_what_a_safetensors_layout_writes_is_known_and_may_be_replaced(brings, shallow, tmp_path):
    brings(WHOLE)
    source, out = shallow("31b", text_only=True), tmp_path / "out"
    for overwrite in (False, True):
        to_native(source, out, layout="other", overwrite=overwrite)
        assert is_native(out) and not beside_native(out)
    with open_native(out) as native:
        assert native.layout == "other" and "other.safetensors" in {p.name for p in out.iterdir()}
    (out / "thesis.tex").touch()
    assert beside_native(out) == ["thesis.tex"]


def test_without_a_forward_pass_logits_are_not_checked(brings, shallow, tmp_path):
    brings(WHOLE)
    source = shallow("31b", text_only=True)
    to_native(source, tmp_path / "out", layout="other")
    message = fails(2, "logit-check", source, tmp_path / "out")
    assert "The layout other has no forward pass" in message and "gemma-convert verify" in message


BROKEN = {
    "cannot be imported": ("import nothing_of_this_name", "ModuleNotFoundError"),
    "fails": ("raise RuntimeError('in vain')", "RuntimeError: in vain"),
    "lacks the class": ("", "AttributeError"),
    "cannot be made": ("class Other:\n    def __init__(self, more): pass", "TypeError"),
    "is none": ("Other = object()", "no name, no framework, no divisible, no streams, no find"),
    "lacks a method": (WHOLE + "\n    find = None", "a layout with no find"),
    "is called otherwise": (WHOLE.replace('"other", "Other"', '"mine", "Other"'), "the name mine"),
}


@pytest.mark.parametrize(("code", "found"), BROKEN.values(), ids=BROKEN)
def test_a_layout_that_cannot_be_used_is_named(brings, shallow, tmp_path, code, found):
    brings(code)
    source = shallow("31b", text_only=True)
    message = fails(2, "to-native", source, tmp_path / "out", "--format", "other")
    assert "The layout `other` cannot be used." in message and found in message
    assert "package brings_other 2.0" in message and not (tmp_path / "out").exists()


def test_it_keeps_no_other_from_its_work(brings, shallow, converted, tmp_path):
    brings("raise RuntimeError('in vain')")
    native = converted(shallow("31b", text_only=True), "gemma-jax")
    assert json.loads(run("inspect", native, "--json").stdout)["layout"] == "gemma-jax"
    listed = run("mappings")
    assert [line.split("\t")[0] for line in listed.stdout.splitlines()[1:]] == list(LAYOUTS)
    assert "warning: The layout `other` cannot be used." in listed.stderr
    shutil.copytree(native, tmp_path / "odd")
    facts = tmp_path / "odd" / "_METADATA"
    facts.write_text(facts.read_text().replace('"embedder"', '"unknown"'))
    message = fails(3, "inspect", tmp_path / "odd")
    assert "no parameters in a supported layout" in message
    assert "remove the package brings_other 2.0: The layout `other` cannot be used." in message


@pytest.mark.parametrize("table", ["layout = ", 'layout = "mine"', 'layout = "other"\nfiles = {}'])
def test_a_table_that_is_wrong_is_its_packages_fault(brings, table):
    brings(WHOLE, table=table)
    for command in (("mappings",), ("to-native", "a", "b")):
        message = fails(2, *command, "--format", "other")
        assert "The table of the layout `other` cannot be used." in message
        assert "package brings_other 2.0, other.toml" in message
    assert "warning: The table of the layout `other`" in run("mappings").stderr


def test_a_module_that_is_not_there_is_told(brings, tmp_path):
    brings(WHOLE)
    shutil.rmtree(tmp_path / "site" / "brings_other")
    forget()
    message = fails(2, "mappings", "--format", "other")
    assert "The layout `other` has no module." in message and "brings_other 2.0" in message


def test_two_packages_with_one_name_are_both_named(brings):
    brings(WHOLE)
    brings(WHOLE, package="brings_more")
    with pytest.raises(
        UsageError, match=r"Several installed packages define a layout `other`"
    ) as caught:
        load_layout("other")
    assert "brings_other 2.0" in str(caught.value) and "brings_more 2.0" in str(caught.value)
