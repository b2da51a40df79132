"""Processes that JAX's coordination service brings together: here two clients of a real one."""

from __future__ import annotations

import shutil
import socket
import threading
import time

import pytest

from gemma_convert import GemmaConvertError, SourceError, TargetError, to_native
from gemma_convert.engine import processes
from gemma_convert.engine.processes import Processes
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
            Processes(client, number, 2) for number, client in enumerate(self._clients)
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
    monkeypatch.setattr(processes, "CHECK_S", 0.1)
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


@pytest.mark.parametrize("last", [0, 1])
def test_all_wait_for_the_last(two, last):
    for _ in range(2):
        thread, results = begin(two[1 - last].step)
        thread.join(0.3)
        assert thread.is_alive()
        two[last].step()
        thread.join(20)
        assert results == [None]


def test_a_step_is_taken_at_once(two, monkeypatch):
    """Whoever waits is woken, and does not ask again and again."""
    monkeypatch.setattr(processes, "CHECK_S", 20.0)
    thread, results = begin(lambda: [two[1].step() for _ in range(50)])
    started = time.monotonic()
    for _ in range(50):
        two[0].step()
    thread.join(20)
    assert len(results[0]) == 50 and time.monotonic() - started < 10


def test_a_text_comes_to_the_others(two):
    thread, results = begin(two[1].published)
    two[0].publish("two\nlines")
    thread.join(20)
    assert results == ["two\nlines"]


@pytest.mark.parametrize("failed", [0, 1])
def test_a_failure_is_told_to_the_others(two, monkeypatch, failed):
    monkeypatch.setattr(processes, "LINGER_S", 0.0)
    broken, whole = two[failed], two[1 - failed]
    whole.check()
    broken.fail(SourceError("The source cannot be read.", found="Input/output error"))
    broken.check()
    with pytest.raises(GemmaConvertError) as caught:
        whole.check()
    assert caught.value.what == f"Process {failed} failed."
    assert caught.value.found == "The source cannot be read.\n      found: Input/output error"
    assert caught.value.exit_code == 3
    with pytest.raises(GemmaConvertError, match=f"Process {failed} failed"):
        whole.step()


def test_who_waits_hears_of_a_failure(two):
    leader, other = two
    thread, results = begin(leader.step)
    thread.join(0.1)
    other.fail(KeyboardInterrupt())
    thread.join(20)
    assert isinstance(results[0], KeyboardInterrupt)


def test_the_leader_ends_when_the_others_have(two, monkeypatch):
    monkeypatch.setattr(processes, "LINGER_S", 60.0)
    leader, other = two
    thread, results = begin(leader.fail, RuntimeError("x" * 5000))
    thread.join(0.2)
    assert thread.is_alive()
    with pytest.raises(GemmaConvertError, match="Process 0 failed") as caught, other:
        other.check()
    assert caught.value.found.startswith("RuntimeError: xxx")
    assert len(caught.value.found) <= 2000 and caught.value.exit_code == 70
    thread.join(30)
    assert results == [None] and leader.told() and other.told()


def test_the_leader_does_not_wait_without_end(two, monkeypatch):
    monkeypatch.setattr(processes, "LINGER_S", 0.2)
    started = time.monotonic()
    thread, results = begin(two[0].fail, RuntimeError())
    thread.join(20)
    assert results == [None] and not two[0].told()
    assert 0.2 <= time.monotonic() - started < 20


def test_the_first_failure_is_that_of_the_job(two, monkeypatch):
    """A process may fail twice, and none but the leader waits."""
    monkeypatch.setattr(processes, "LINGER_S", 60.0)
    started = time.monotonic()
    for message in ("first", "second"):
        two[1].fail(RuntimeError(message))
    with pytest.raises(GemmaConvertError, match="RuntimeError: first"), two[0]:
        raise TargetError("Broken by the other.")
    assert two[0].told() and two[1].told()
    assert time.monotonic() - started < 20


def test_leaving_by_an_error_tells_it_and_leaving_otherwise_does_not(two):
    leader, other = two
    with other:
        pass
    leader.check()
    with pytest.raises(RuntimeError), other:
        raise RuntimeError("gone")
    with pytest.raises(GemmaConvertError, match="RuntimeError: gone"):
        leader.check()


def test_a_leader_that_is_gone(service, two):
    service.end()
    for ask in (two[1].check, two[1].step):
        with pytest.raises(TargetError) as caught:
            ask()
        assert caught.value.what == "The process that leads cannot be reached."
        assert caught.value.exit_code == 4
        assert "\n" not in caught.value.found
        assert len(caught.value.found) <= 300
    two[1].fail(RuntimeError())
    assert not two[1].told()


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
    assert other.what == f"Process {broken} failed."
    assert other.exit_code == found.exit_code
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
