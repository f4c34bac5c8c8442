"""Tests of prefetching: order, limit, errors and cancellation."""

from __future__ import annotations

import threading
import time

import pytest

from paroquant_stream.checkpoint.prefetch import Prefetcher
from paroquant_stream.checkpoint.shard import Shard
from paroquant_stream.errors import CheckpointError, RunCancelledError
from tests.helpers.builders import cut_evenly, write_checkpoint


class CopyingRemote:
    """A remote that copies from a directory; `gates` delay shards."""

    def __init__(self, source, target):
        self.source, self.target = source, target
        self.fetched: list[str] = []
        self.gates: dict[str, threading.Event] = {}
        self.errors: dict[str, BaseException] = {}

    def headers(self, shards):
        return {name: Shard(name, self.source / name).header() for name in shards}

    def fetch(self, shard, tick):
        self.fetched.append(shard)
        if shard in self.gates:
            while not self.gates[shard].wait(0.01):
                tick(0)
        if shard in self.errors:
            raise self.errors[shard]
        data = (self.source / shard).read_bytes()
        tick(len(data))
        (self.target / shard).write_bytes(data)


@pytest.fixture
def remote(tmp_path):
    (tmp_path / "model").mkdir()
    return CopyingRemote(write_checkpoint(tmp_path / "from", cut=cut_evenly(6)), tmp_path / "model")


@pytest.fixture
def names(remote):
    return sorted(path.name for path in remote.source.glob("*.safetensors"))


def prefetcher(remote, needs, headers=None, **options):
    flat = [shard for shards in needs for shard in shards]
    headers = headers or remote.headers(dict.fromkeys(flat))
    return Prefetcher(remote, remote.target, needs, headers, lambda *_: None, **options)


def never() -> None:
    pass


def test_each_shard_is_fetched_once_in_the_order_of_tasks(remote, names):
    a, b, c, d, *_ = names
    with prefetcher(remote, [[c], [a, d], [d, b]]) as running:
        running.wait_for([a, b, c, d], never)
    assert sorted(remote.fetched) == [a, b, c, d]
    assert set(remote.fetched[:2]) == {c, a}


def test_present_shards_are_not_waited_for(remote, names):
    with prefetcher(remote, []) as running:
        running.wait_for(names, lambda: pytest.fail("waited"))


def test_shards_are_fetched_only_so_many_tasks_ahead(remote, names):
    with prefetcher(remote, [[name] for name in names], ahead=2) as running:
        running.wait_for(names[:3], never)
        time.sleep(0.05)
        assert sorted(remote.fetched) == names[:3]
        running.finish_task()
        running.wait_for(names[:4], never)
        assert sorted(remote.fetched) == names[:4]


def test_a_task_that_needs_the_last_shard_does_not_deadlock(remote, names):
    first, *_, last = names
    needs = [[first, last], *([name] for name in names[1:-1]), [last]]
    with prefetcher(remote, needs, ahead=1) as running:
        for shards in needs:
            running.wait_for(shards, never)
            running.finish_task()
    assert sorted(remote.fetched) == names


def test_an_error_stops_all_but_running_downloads(remote, names):
    a, b, c, *_ = names
    remote.errors[b] = CheckpointError("the Hub is gone")
    gate = remote.gates[a] = threading.Event()
    with prefetcher(remote, [[a], [b], [c]]) as running:
        with pytest.raises(CheckpointError, match="the Hub is gone"):
            running.wait_for([b], never)
        gate.set()
        running.wait_for([a], never)
        with pytest.raises(CheckpointError, match="the Hub is gone"):
            running.wait_for([c], never)
    assert c not in remote.fetched


def test_an_unexpected_error_names_the_file(remote, names):
    remote.errors[names[0]] = RuntimeError("odd")
    with (
        prefetcher(remote, [names[:1]]) as running,
        pytest.raises(CheckpointError, match=f"{names[0]}: cannot be fetched: odd"),
    ):
        running.wait_for(names[:1], never)


def test_a_header_unlike_the_planned_one_is_an_error(remote, names):
    headers = remote.headers(names)
    headers[names[0]] = headers[names[1]]
    with (
        prefetcher(remote, [names[:1]], headers) as running,
        pytest.raises(CheckpointError, match="differs from the one that the Hub sent"),
    ):
        running.wait_for(names[:1], never)


def test_a_cancelled_run_stops_waiting(remote, names):
    remote.gates[names[0]] = threading.Event()

    def stop() -> None:
        raise RunCancelledError("stop")

    with prefetcher(remote, [names[:1]]) as running, pytest.raises(RunCancelledError):
        running.wait_for(names[:1], stop)


def test_the_end_of_the_block_stops_a_running_download(remote, names):
    remote.gates[names[0]] = threading.Event()  # never set
    with prefetcher(remote, [names[:1]]) as running:
        while not remote.fetched:
            time.sleep(0.001)
    # private: nothing else shows that the threads have ended
    for thread in running._threads:
        thread.join(60)
        assert not thread.is_alive()


def test_the_first_of_several_errors_is_raised(remote, names):
    a, b, *_ = names
    remote.errors[a] = CheckpointError("first")
    remote.errors[b] = CheckpointError("second")
    gate = remote.gates[b] = threading.Event()
    with prefetcher(remote, [[a], [b]]) as running:
        with pytest.raises(CheckpointError, match="first"):
            running.wait_for([a], never)
        gate.set()
        with pytest.raises(CheckpointError, match="first"):
            running.wait_for([b], never)


def test_ticks_name_the_shard_and_add_up_to_its_size(remote, names):
    ticks = []
    headers = remote.headers(names)
    running = Prefetcher(remote, remote.target, [names], headers, lambda *tick: ticks.append(tick))
    with running:
        running.wait_for(names, never)
    assert sorted(ticks) == [(name, (remote.source / name).stat().st_size) for name in names]


def test_a_shard_without_a_planned_header_is_accepted(remote, names):
    """Another run dropped it after the plan was made."""
    with prefetcher(remote, [names[:1]], {"other": None}) as running:
        running.wait_for(names[:1], never)
