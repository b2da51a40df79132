"""Forward passes from the shell: OpenMP's threads sleep, as torch is told before it is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

RECORDING = """
import importlib.abc, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(name, os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
from gemma_convert.cli.app import main
main()
"""


@pytest.mark.each(1)
@pytest.mark.parametrize("command", ["golden", "logit-check"])
@pytest.mark.parametrize(("given", "policy"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_unless_the_user_says_otherwise(
    shallow, converted, tmp_path, command, given, policy
):
    source = shallow("31b")
    other = converted(source, "fast-llm") if command == "logit-check" else tmp_path / "golden"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    words = [sys.executable, "-c", RECORDING, command, str(source), str(other), "--tokens", "3"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == f"torch {policy}\n"
