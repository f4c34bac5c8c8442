"""Shards on their way: fetched in order and once, waited for without a deadlock."""

from __future__ import annotations

import threading
import time

import pytest

from paroquant_stream.checkpoint.prefetch import Prefetcher
from paroquant_stream.checkpoint.shard import Shard
from paroquant_stream.errors import CheckpointError, RunCancelledError
from tests.helpers.builders import cut_evenly, write_checkpoint


class Shelf:
    """A remote that copies from a directory; `gates` hold shards back."""

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
def shelf(tmp_path):
    (tmp_path / "there").mkdir()
    return Shelf(write_checkpoint(tmp_path / "from", cut=cut_evenly(6)), tmp_path / "there")


@pytest.fixture
def names(shelf):
    return sorted(path.name for path in shelf.source.glob("*.safetensors"))


def prefetcher(shelf, needs, headers=None, **options):
    flat = [shard for shards in needs for shard in shards]
    headers = headers or shelf.headers(dict.fromkeys(flat))
    return Prefetcher(shelf, shelf.target, needs, headers, lambda *_: None, **options)


def never() -> None:
    pass


def test_each_shard_is_fetched_once_in_the_order_in_which_tasks_need_them(shelf, names):
    a, b, c, d, *_ = names
    with prefetcher(shelf, [[c], [a, d], [d, b]]) as coming:
        coming.wait_for([a, b, c, d], never)
    assert sorted(shelf.fetched) == [a, b, c, d]
    assert set(shelf.fetched[:2]) == {c, a}


def test_what_is_there_already_is_not_waited_for(shelf, names):
    with prefetcher(shelf, []) as coming:
        coming.wait_for(names, lambda: pytest.fail("waited"))


def test_no_more_is_fetched_than_the_bound_allows_until_a_task_is_done(shelf, names):
    with prefetcher(shelf, [[name] for name in names], ahead=2) as coming:
        coming.wait_for(names[:3], never)
        time.sleep(0.05)
        assert sorted(shelf.fetched) == names[:3]
        coming.finish_task()
        coming.wait_for(names[:4], never)
        assert sorted(shelf.fetched) == names[:4]


def test_a_task_that_borrows_from_the_last_shard_does_not_wait_for_ever(shelf, names):
    first, *_, last = names
    needs = [[first, last], *([name] for name in names[1:-1]), [last]]
    with prefetcher(shelf, needs, ahead=1) as coming:
        for shards in needs:
            coming.wait_for(shards, never)
            coming.finish_task()
    assert sorted(shelf.fetched) == names


def test_an_error_reaches_who_waits_and_what_was_on_its_way_still_arrives(shelf, names):
    a, b, c, *_ = names
    shelf.errors[b] = CheckpointError("the Hub is gone")
    gate = shelf.gates[a] = threading.Event()
    with prefetcher(shelf, [[a], [b], [c]]) as coming:
        with pytest.raises(CheckpointError, match="the Hub is gone"):
            coming.wait_for([b], never)
        gate.set()
        coming.wait_for([a], never)
        with pytest.raises(CheckpointError, match="the Hub is gone"):
            coming.wait_for([c], never)
    assert c not in shelf.fetched


def test_any_other_error_is_told_with_the_file(shelf, names):
    shelf.errors[names[0]] = RuntimeError("odd")
    with (
        prefetcher(shelf, [names[:1]]) as coming,
        pytest.raises(CheckpointError, match=f"{names[0]}: cannot be fetched: odd"),
    ):
        coming.wait_for(names[:1], never)


def test_a_header_that_is_not_the_planned_one_is_an_error(shelf, names):
    headers = shelf.headers(names)
    headers[names[0]] = headers[names[1]]
    with (
        prefetcher(shelf, [names[:1]], headers) as coming,
        pytest.raises(CheckpointError, match="differs from the one that the Hub sent"),
    ):
        coming.wait_for(names[:1], never)


def test_a_wait_ends_when_the_run_is_told_to_stop(shelf, names):
    shelf.gates[names[0]] = threading.Event()

    def stop() -> None:
        raise RunCancelledError("stop")

    with prefetcher(shelf, [names[:1]]) as coming, pytest.raises(RunCancelledError):
        coming.wait_for(names[:1], stop)


def test_leaving_stops_a_download_that_is_running(shelf, names):
    shelf.gates[names[0]] = threading.Event()  # never set
    started = time.monotonic()
    with prefetcher(shelf, [names[:1]]) as coming:
        while not shelf.fetched:
            time.sleep(0.001)
    assert time.monotonic() - started < 1
    assert not [thread for thread in coming._threads if thread.is_alive()]
