"""How far each shard is."""

from __future__ import annotations

import threading

import pytest

from paroquant_stream.conversion.progress import FileProgress, Tally, check_progress
from paroquant_stream.plan.task import Task


def test_a_byte_counts_once_per_download_hash_and_conversion():
    reported = []
    tasks = [Task("here", 60, ()), Task("there", 60, ())]
    tally = Tally(lambda *given: reported.append(given), tasks, [[], ["there"]])
    tally.add("here", 60)
    tally.add("there", 60)
    tally.add("here", 60)
    tally.add("there", 60)
    assert reported == [("here", 30, 60), ("there", 20, 60), ("here", 60, 60), ("there", 40, 60)]


def test_more_ticks_than_bytes_never_pass_the_size():
    reported = []
    tally = Tally(lambda *given: reported.append(given), [Task("a", 10, ())], [])
    tally.add("a", 100)
    assert reported == [("a", 10, 10)]


def test_nobody_is_told_of_a_shard_that_no_task_of_this_run_owns():
    reported = []
    Tally(lambda *given: reported.append(given), [Task("a", 10, ())], [["b"]]).add("b", 5)
    assert reported == []


def test_a_file_is_announced_and_never_passes_its_size():
    reported = []
    count = FileProgress("f", 10, lambda *given: reported.append(given))
    count.add(6)
    count.add(6)
    assert reported == [("f", 0, 10), ("f", 6, 10), ("f", 10, 10)]
    FileProgress("f", 10, None).add(1)


def test_progress_is_yes_no_none_or_a_function():
    for progress in (True, False, None, print):
        check_progress(progress)
    with pytest.raises(ValueError, match="progress is True, False, None or a function, not 1"):
        check_progress(1)


def test_two_threads_are_never_reported_at_once():
    events, threads = [], []

    def report(shard: str, done: int, size: int) -> None:
        events.append(f"begin {shard}")
        if shard == "a":
            threads.append(threading.Thread(target=tally.add, args=("b", 20)))
            threads[0].start()
            threads[0].join(0.3)  # long enough for a call that nothing holds back
        events.append(f"end {shard}")

    tally = Tally(report, [Task("a", 10, ()), Task("b", 10, ())], [])
    tally.add("a", 20)
    threads[0].join()
    assert events == ["begin a", "end a", "begin b", "end b"]
