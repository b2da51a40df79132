"""Several processes that work on one conversion: who does what, and waiting for one another.

No accelerator is touched, and nothing but short texts goes over the network.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

from gemma_convert.engine.cluster import Cluster, connect
from gemma_convert.errors import TargetError
from gemma_convert.output import Progress

POLL_S = 0.1
CHECK_S = 1.0
LINGER_S = 10.0
"""The longest time that the leader waits for the others to end, when one has failed."""

_PREFIX = "gemma-convert/"


class Processes(Protocol):
    """The processes of one job; `index` is this one's number, and 0 leads."""

    @property
    def index(self) -> int: ...

    @property
    def count(self) -> int: ...

    def wait(self, step: str) -> None:
        """Returns when all have come to `step`; TargetError where one of them has failed."""

    def check(self) -> None:
        """Raises TargetError where another process has failed."""

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process ends with `error`, its writes done.

        The leader waits for the others: it holds what they read, and removes what they write to.
        """

    def __enter__(self) -> Processes: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Tells the others of a failure, and leaves the job."""


class OneProcess:
    """A process by itself."""

    index, count = 0, 1

    def wait(self, step: str) -> None:
        del step

    def check(self) -> None:
        pass

    def fail(self, error: BaseException) -> None:
        del error

    def __enter__(self) -> OneProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Watched:
    """A progress bar that looks now and then whether the other processes are still there."""

    def __init__(self, bar: Progress, processes: Processes) -> None:
        self._bar, self._processes = bar, processes
        self._next = 0.0

    def advance(self, count: int, name: str) -> None:
        """Notes `count` bytes more; TargetError where another process has failed."""
        self._bar.advance(count, name)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + CHECK_S
            self._processes.check()


def join(
    coordinator: str | None, processes: int | None, process: int | None, detect: bool
) -> Processes:
    """The processes that the arguments of `cluster.connect` name; one alone without arguments."""
    cluster = connect(coordinator, processes, process, detect)
    return OneProcess() if cluster is None else ClusterProcesses(cluster)


class ClusterProcesses:
    """The processes that `jax.distributed` has brought together."""

    def __init__(self, cluster: Cluster) -> None:
        self._client = cluster.client
        self.index, self.count = cluster.process, cluster.processes

    def wait(self, step: str) -> None:
        place = f"{_PREFIX}step/{step}/"
        self._call("key_value_set", f"{place}{self.index}", "reached")
        while len(self._values(place)) < self.count:
            self.check()
            time.sleep(POLL_S)

    def check(self) -> None:
        for number, message in self._values(f"{_PREFIX}failed/"):
            if number == str(self.index):
                continue
            raise TargetError(
                "Another process of this conversion failed.",
                where=f"process {number}",
                found=message,
                do="start all processes again when the cause is gone",
            )

    def fail(self, error: BaseException) -> None:
        message = f"{type(error).__name__}: {error}"[:2000]
        self._call("key_value_set", f"{_PREFIX}failed/{self.index}", message, True)
        ending = time.monotonic() + LINGER_S
        while not self.index and time.monotonic() < ending:
            if len(self._values(f"{_PREFIX}failed/")) == self.count:
                return
            time.sleep(POLL_S)

    def __enter__(self) -> ClusterProcesses:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if value is not None:
            self.fail(value)

    def _values(self, place: str) -> Sequence[tuple[str, str]]:
        """(last part of the key, value) of everything below `place`."""
        found = self._call("key_value_dir_get", place)
        return [(key.rpartition("/")[2], value) for key, value in found]

    def _call(self, method: str, *arguments: object) -> Any:
        import jax

        try:
            return getattr(self._client, method)(*arguments)
        except jax.errors.JaxRuntimeError as error:
            raise TargetError(
                "The process that leads this conversion cannot be reached.",
                found=str(error).splitlines()[0][:300],
                do="start all processes again",
            ) from None
