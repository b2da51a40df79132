"""What one command reads of a checkpoint several times is read once, and anew by the next one."""

from __future__ import annotations

import pytest

from gemma_convert import logit_check
from gemma_convert.files.read_once import once, reading_once
from gemma_convert.logits import reference


def test_the_same_arguments_are_read_once_within():
    calls = []

    @once
    def read(name: str, deep: bool = False) -> tuple[str, bool]:
        calls.append(name)
        return name, deep

    with reading_once():
        found = [read("a"), read("a"), read("a", deep=True), read("b")]
    assert found == [("a", False), ("a", False), ("a", True), ("b", False)]
    assert calls == ["a", "a", "b"]
    with reading_once():
        read("a")
    assert read("a") == read("a") and calls == ["a", "a", "b", "a", "a", "a"]


def test_what_fails_is_tried_again_and_leaves_nothing():
    calls = []

    @once
    def read() -> int:
        calls.append(0)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"), reading_once():
        read()
    with reading_once():
        for _ in range(2):
            with pytest.raises(OSError, match="gone"):
                read()
    assert len(calls) == 3


def test_a_check_reads_the_tree_and_the_config_once(shallow, converted, monkeypatch):
    """By the calls of the libraries; a second check reads both anew."""
    import orbax.checkpoint as ocp

    calls: list[str] = []

    def counted(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **named):
            calls.append(name)
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    counted(ocp.PyTreeCheckpointHandler, "metadata")
    counted(reference, "handed")
    source = shallow("31b")
    native = converted(source, "maxtext")
    for times in (1, 2):
        assert logit_check(source, native, tokens=40).passed
        assert sorted(calls) == ["handed"] * times + ["metadata"] * times
