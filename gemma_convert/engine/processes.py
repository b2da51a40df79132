"""Several processes that work on one job: in step, and ending together.

They exchange short texts through the key-value store of JAX's coordination service, which process 0
runs: it leads. The first failure of any process is that of the job, with one exit code for all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from types import TracebackType
from typing import Any

from gemma_convert.errors import INTERRUPTED, GemmaConvertError, TargetError, exit_code

CHECK_S = 1.0
"""A process that waits looks as often whether another has failed."""

LINGER_S = 10.0
"""The longest time that a process which ends waits for others to hear why."""

_NO_VALUE = ("NOT_FOUND", "DEADLINE_EXCEEDED", "ALREADY_EXISTS")


@dataclass
class Processes:
    """The processes of one job, of which this one is number `index`; one alone without `client`."""

    client: Any = None
    index: int = 0
    count: int = 1
    _steps: int = field(default=0, init=False)
    _told: bool | None = field(default=None, init=False)

    @property
    def leads(self) -> bool:
        """Whether this is process 0, which reports and publishes, or the only one."""
        return not self.index

    def step(self) -> None:
        """Returns when all have come as far; raises what `check` raises."""
        place = f"step/{self._steps}"
        if not self.leads:
            self._say(f"{place}/{self.index}")
        for other in self._partners:
            self._hear(f"{place}/{other}")
        if self.leads:
            self._say(f"{place}/0")
        self._steps += 1

    def publish(self, text: str) -> None:
        """Gives `text` of process 0 to the others, who have it from `published`."""
        self.step()
        self._say(f"text/{self._steps}", text)

    def published(self) -> str:
        """What process 0 has given to `publish`, for the others."""
        if self.leads:
            raise ValueError("there is no other process")
        self.step()
        return self._hear(f"text/{self._steps}")

    def check(self) -> None:
        """Raises the job's failure, where it is that of another process.

        It has the other's exit code; TargetError where process 0 cannot be reached.
        """
        said = self._call("key_value_dir_get", "failure/")
        process, code, text = said[0][1].split(" ", 2) if said else (self.index, 0, "")
        if int(process) == self.index:
            return
        if int(code) == INTERRUPTED:
            raise KeyboardInterrupt(f"process {process}")
        failure = GemmaConvertError(
            f"Process {process} failed.",
            found=text,
            do="start all processes again when the cause is gone",
        )
        failure.exit_code = int(code)
        raise failure

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process ends with `error`, its writes done.

        Raises the failure of another process that came first. Process 0 waits for the others: it
        holds what they read, and removes what they write to.
        """
        known = isinstance(error, GemmaConvertError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        with suppress(TargetError):  # process 0 is gone
            self._say("failure/first", f"{self.index} {exit_code(error)} {text}"[:2000])
            self._say(f"left/{self.index}")
            if self.leads:
                self.told()
            self.check()

    def told(self) -> bool:
        """Whether those who must know of a failure do: process 0, or from process 0 the others.

        Before the first step nobody waits for this process elsewhere, so it waits for process 0.
        """
        if self._told is None:
            patient = not self._steps and not self.leads
            ending = inf if patient else time.monotonic() + LINGER_S
            self._told = all(self._has_left(other, ending) for other in self._partners)
        return self._told

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if value is not None:
            self.fail(value)

    @property
    def _partners(self) -> Sequence[int]:
        """Whom this process waits for: process 0 for all others, they for process 0."""
        return range(1, self.count) if self.leads else (0,)

    def _has_left(self, other: int, ending: float) -> bool:
        with suppress(TargetError):  # process 0 is gone
            while self._wait(f"left/{other}") is None:
                if time.monotonic() >= ending:
                    return False
            return True
        return False

    def _hear(self, key: str) -> str:
        while (word := self._wait(key)) is None:
            self.check()
        return word

    def _wait(self, key: str) -> str | None:
        word: str | None = self._call("blocking_key_value_get", key, round(CHECK_S * 1000))
        return word

    def _say(self, key: str, word: str = "") -> None:
        """Says `word`; what has been said stays."""
        self._call("key_value_set", key, word)

    def _call(self, method: str, key: str, *arguments: object) -> Any:
        """What the store answers; None where it has no such value, or one already."""
        if self.client is None:
            return None
        import jax

        try:
            return getattr(self.client, method)(f"gemma-convert/{key}", *arguments)
        except jax.errors.JaxRuntimeError as error:
            found = str(error).splitlines()[0][:300]
            if found.startswith(_NO_VALUE):
                return None
            raise TargetError(
                "The process that leads cannot be reached.",
                found=found,
                do="start all processes again",
            ) from None
