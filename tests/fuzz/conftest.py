"""The profile of a soak, and how many cases were run in all."""

from __future__ import annotations

import pytest
from hypothesis import settings
from outcome import SOAK, Count

if SOAK:
    settings.register_profile("soak", deadline=None, print_blob=True, max_examples=SOAK)
    settings.load_profile("soak")

_others: list[int] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["fuzz cases"] = Count.cases


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    _others.append(getattr(node, "workeroutput", {}).get("fuzz cases", 0))


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"fuzz cases run: {Count.cases + sum(_others)}")
