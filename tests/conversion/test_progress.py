"""How far each shard is."""

from __future__ import annotations

import threading

from paroquant_stream.conversion.progress import Tally
from paroquant_stream.plan.task import Task


def test_a_byte_counts_once_per_download_hash_and_conversion():
    told = []
    tasks = [Task("here", 60, ()), Task("there", 60, ())]
    tally = Tally(lambda *given: told.append(given), tasks, [[], ["there"]])
    tally.add("here", 60)
    tally.add("there", 60)
    tally.add("here", 60)
    tally.add("there", 60)
    assert told == [("here", 30, 60), ("there", 20, 60), ("here", 60, 60), ("there", 40, 60)]


def test_more_ticks_than_bytes_never_pass_the_size():
    told = []
    tally = Tally(lambda *given: told.append(given), [Task("a", 10, ())], [])
    tally.add("a", 100)
    assert told == [("a", 10, 10)]


def test_nobody_is_told_of_a_shard_that_no_task_of_this_run_owns():
    told = []
    Tally(lambda *given: told.append(given), [Task("a", 10, ())], [["b"]]).add("b", 5)
    assert told == []


def test_two_threads_are_never_told_of_at_once():
    events, threads = [], []

    def tell(shard: str, done: int, size: int) -> None:
        events.append(f"begin {shard}")
        if shard == "a":
            threads.append(threading.Thread(target=tally.add, args=("b", 20)))
            threads[0].start()
            threads[0].join(0.3)  # long enough for a call that nothing holds back
        events.append(f"end {shard}")

    tally = Tally(tell, [Task("a", 10, ()), Task("b", 10, ())], [])
    tally.add("a", 20)
    threads[0].join()
    assert events == ["begin a", "end a", "begin b", "end b"]
