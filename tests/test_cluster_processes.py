"""Processes that JAX's coordination service brings together: here two clients of a real one."""

from __future__ import annotations

import shutil
import socket
import threading
import time

import pytest

from gemma_convert import SourceError, TargetError, to_native
from gemma_convert.engine import processes
from gemma_convert.engine.cluster import Cluster
from gemma_convert.engine.processes import ClusterProcesses
from gemma_convert.stores.safetensors.reader import SafetensorsFolder


class Service:
    """A coordination service on the loopback, and its two clients."""

    def __init__(self):
        from jax._src.lib import _jax

        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        self._service = _jax.get_distributed_runtime_service(address, 2)
        self._clients = [
            _jax.get_distributed_runtime_client(
                address, number, init_timeout=60, shutdown_on_destruction=False
            )
            for number in range(2)
        ]
        self._each("connect")
        self.processes = [
            ClusterProcesses(Cluster(client, number, 2))
            for number, client in enumerate(self._clients)
        ]

    def _each(self, method):
        threads = [threading.Thread(target=getattr(client, method)) for client in self._clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def end(self):
        if self._clients:
            self._each("shutdown")
            self._service.shutdown()
        self._clients = []


@pytest.fixture
def service():
    running = Service()
    yield running
    running.end()


@pytest.fixture
def two(service, monkeypatch):
    monkeypatch.setattr(processes, "POLL_S", 0.01)
    return service.processes


def begin(action, *arguments):
    """A thread that runs `action`, and what it has returned or raised."""
    results = []

    def run():
        try:
            results.append(action(*arguments))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def test_all_wait_for_the_last(two):
    leader, other = two
    for step in ("first", "second"):
        thread, results = begin(leader.wait, step)
        thread.join(0.1)
        assert thread.is_alive()
        other.wait(step)
        thread.join(20)
        assert results == [None]


@pytest.mark.parametrize("failed", [0, 1])
def test_a_failure_is_told_to_the_others(two, monkeypatch, failed):
    monkeypatch.setattr(processes, "LINGER_S", 0.0)
    broken, whole = two[failed], two[1 - failed]
    whole.check()
    broken.fail(SourceError("The source cannot be read.", found="Input/output error"))
    broken.check()
    with pytest.raises(TargetError) as caught:
        whole.check()
    assert caught.value.what == "Another process of this conversion failed."
    assert caught.value.where == f"process {failed}"
    assert caught.value.found == (
        "SourceError: The source cannot be read.\n      found: Input/output error"
    )
    assert caught.value.exit_code == 4
    with pytest.raises(TargetError, match=f"process {failed}"):
        whole.wait("made")


def test_who_waits_hears_of_a_failure(two):
    leader, other = two
    thread, results = begin(leader.wait, "transferred")
    thread.join(0.1)
    other.fail(KeyboardInterrupt())
    thread.join(20)
    (error,) = results
    assert isinstance(error, TargetError)
    assert error.found == "KeyboardInterrupt: "


def test_the_leader_ends_when_the_others_have(two, monkeypatch):
    monkeypatch.setattr(processes, "LINGER_S", 60.0)
    leader, other = two
    thread, results = begin(leader.fail, RuntimeError("x" * 5000))
    thread.join(0.2)
    assert thread.is_alive()
    with pytest.raises(TargetError) as caught:
        other.check()
    assert len(str(caught.value.found)) == 2000
    other.fail(caught.value)
    thread.join(30)
    assert results == [None]


def test_the_leader_does_not_wait_without_end(two, monkeypatch):
    monkeypatch.setattr(processes, "LINGER_S", 0.2)
    started = time.monotonic()
    thread, results = begin(two[0].fail, RuntimeError())
    thread.join(20)
    assert results == [None]
    assert 0.2 <= time.monotonic() - started < 20


def test_a_process_may_fail_twice_and_does_not_wait(two, monkeypatch):
    monkeypatch.setattr(processes, "LINGER_S", 20.0)
    started = time.monotonic()
    for message in ("first", "second"):
        two[1].fail(RuntimeError(message))
    assert time.monotonic() - started < 20
    with pytest.raises(TargetError, match="RuntimeError: second"):
        two[0].check()


def test_leaving_by_an_error_tells_it_and_leaving_otherwise_does_not(two):
    leader, other = two
    with other:
        pass
    leader.check()
    with pytest.raises(RuntimeError), other:
        raise RuntimeError("gone")
    with pytest.raises(TargetError, match="RuntimeError: gone"):
        leader.check()


def test_a_leader_that_is_gone(service, two):
    service.end()
    with pytest.raises(TargetError) as caught:
        two[1].check()
    assert caught.value.what == "The process that leads this conversion cannot be reached."
    assert caught.value.exit_code == 4
    assert "\n" not in caught.value.found
    assert len(caught.value.found) <= 300


@pytest.mark.parametrize("broken", [0, 1])
def test_a_conversion_ends_for_all_where_one_fails(shallow, tmp_path, two, broken):
    whole, damaged = shallow("31b"), tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    read = SafetensorsFolder.read_into

    def fail(self, tensor, offset, buffer):
        if self.folder == damaged:
            raise SourceError("The source cannot be read.", where=self.folder)
        return read(self, tensor, offset, buffer)

    def convert(number):
        source = damaged if number == broken else whole
        with two[number]:
            to_native(source, tmp_path / "out", processes=two[number])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsFolder, "read_into", fail)
        running = [begin(convert, number) for number in range(2)]
        for thread, _ in running:
            thread.join(60)
    (found,), (other,) = running[broken][1], running[1 - broken][1]
    assert isinstance(found, SourceError)
    assert isinstance(other, TargetError)
    assert other.where == f"process {broken}"
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
