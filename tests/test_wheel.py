"""The wheel holds the tables and works from any folder, with the plain dependencies alone."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_wheel_has_its_tables_and_finds_them(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    for table in (ROOT / "mappings").glob("*.toml"):
        assert f"gemma_convert/mappings/{table.name}" in names
    assert "gemma_convert/py.typed" in names
    assert "gemma_convert/logits/html_report.css" in names
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import gemma_convert, pathlib\n"
        f"assert gemma_convert.__file__.startswith({str(tmp_path)!r})\n"
        "from gemma_convert.mapping.table import load_table, mappings_folder\n"
        "assert 'site' in str(mappings_folder()), mappings_folder()\n"
        "from gemma_convert.tiny import make_tiny\n"
        "make_tiny('e2b', pathlib.Path('hf'))\n"
        "gemma_convert.to_native('hf', 'out')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "out" / "0" / "items" / "_METADATA").exists()
