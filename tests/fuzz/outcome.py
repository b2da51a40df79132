"""What may come of broken input: the values, or one clear message; soon, and in little memory."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import os
import resource
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from hypothesis import HealthCheck, settings

from gemma_convert.cli.app import main
from gemma_convert.errors import GemmaConvertError

T = TypeVar("T")

SECONDS, PATIENCE = 5.0, 20
GROWTH_BYTES = 512 << 20
MESSAGE_CHARACTERS = 20_000

SOAK = int(os.environ.get("GEMMA_CONVERT_SOAK_EXAMPLES", "0"))
"""Cases of each property in a soak; 0 is the fixed share of an ordinary run."""


class HangError(BaseException):
    """A case took longer than it may."""


class Count:
    """How many cases were run in this process."""

    cases = 0


def share(ordinary: int, cost: int = 1) -> settings:
    """How often a property is tried: `ordinary` times, the same ones; in a soak more, and new ones.

    `cost` is how many cheap cases a case is worth.
    """
    return settings(
        max_examples=max(1, SOAK // cost) if SOAK else ordinary,
        derandomize=not SOAK,
        deadline=None,
        print_blob=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def bounded(seconds: float = SECONDS) -> Iterator[None]:
    """Fails where what is done inside takes too long or too much memory.

    `seconds` are the processor's, so that a busy machine is not taken for a hang; what waits for
    something that does not come may do so for `PATIENCE` times as long.
    """

    def late(*_: object) -> None:
        raise HangError(f"longer than {seconds} s")

    Count.cases += 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = {number: signal.signal(number, late) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)
    gc.disable()  # Hypothesis measures it in Python, for which deep recursion leaves no room
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        gc.enable()
        for number, handler in previous.items():
            signal.signal(number, handler)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < GROWTH_BYTES, f"{grown >> 20} MiB more"


def outcome(read: Callable[[], T], code: int = 3) -> T | None:
    """What `read` gives, or None where it refuses with one clear message and that exit code."""
    with bounded():
        try:
            return read()
        except GemmaConvertError as error:
            assert error.exit_code == code, repr(error)
            assert error.where is not None, repr(error)
            clear(error.message)
            return None


def refused(read: Callable[[], object], code: int = 3) -> str:
    """The message with which `read` refuses."""
    with bounded():
        try:
            read()
        except GemmaConvertError as error:
            assert error.exit_code == code, repr(error)
            clear(error.message)
            return error.message
    raise AssertionError("it was taken")


def command(
    *arguments: object, codes: tuple[int, ...] = (0, 3), seconds: float = 4 * SECONDS
) -> tuple[int, str]:
    """Exit code and standard output of a command, run in this process as the script runs it."""
    output, errors = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", handling)
        for handling in ("strict", "backslashreplace")
    )
    before, sys.argv = sys.argv, ["gemma-convert", *map(str, arguments)]
    code = 0
    try:
        with (
            bounded(seconds),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
        ):
            main()
    except SystemExit as end:
        code = 0 if end.code is None else int(end.code)
    finally:
        sys.argv = before
    texts = []
    for stream in (output, errors):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    said, complaint = texts
    assert code in codes, f"exit {code}: {complaint[-2000:]}"
    if code > 1:
        assert complaint.count("error: ") == 1, complaint
        clear(complaint.partition("error: ")[2].removesuffix("\n"))
    return code, said


def clear(message: str) -> None:
    """Asserts that a message is short, complete and does nothing to a terminal."""
    assert message.partition("\n")[0].endswith((".", ":")), message
    assert "Traceback" not in message, message
    assert len(message) < MESSAGE_CHARACTERS
    assert all(line.isprintable() for line in message.split("\n")), ascii(message)


def snapshot(folder: Path) -> dict[str, str]:
    """Path → what stands there, for everything below `folder`."""
    return {
        os.path.relpath(path, folder): _state(path)
        for root, folders, files in os.walk(folder)
        for path in (os.path.join(root, name) for name in (*folders, *files))  # noqa: PTH118
    }


def _state(path: str) -> str:
    status = os.lstat(path)
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:  # noqa: PTH123
            return hashlib.file_digest(file, "sha256").hexdigest()
    return f"{stat.S_IFMT(status.st_mode):o}"
