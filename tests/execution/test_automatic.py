"""Threads for little work, worker processes for much."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from paroquant_stream.cli.convert import main
from paroquant_stream.conversion.request import default_jobs, make_request
from paroquant_stream.execution import automatic
from paroquant_stream.execution.automatic import MIN_BYTES, Automatic
from tests.helpers.cache_files import entries

GB = 1 << 30


@pytest.mark.parametrize(
    ("jobs", "sizes"),
    [(2, [GB] * 9), (1, [GB] * 9), (16, [40 * GB, GB]), (16, [MIN_BYTES // 4] * 3), (16, [])],
)
def test_little_work_is_done_by_threads(jobs, sizes):
    with Automatic() as choice:
        assert choice.choose(jobs, sizes) is None


def test_much_work_is_done_by_one_pool_of_processes():
    with Automatic() as choice:
        pool = choice.choose(3, [GB] * 3)
        assert isinstance(pool, ProcessPoolExecutor)
        assert choice.choose(8, [GB] * 30) is pool
        assert not multiprocessing.active_children()  # none is started before its first job
        pool.submit(abs, -1).result()
        assert multiprocessing.active_children()
    assert not multiprocessing.active_children()
    with pytest.raises(RuntimeError):
        pool.submit(abs, -1)


def test_the_default_jobs_are_those_of_threads(model_dir):
    assert make_request(model_dir, executor=Automatic()).jobs == default_jobs()


@pytest.fixture
def pools(monkeypatch) -> list:
    """What a command chose, with bounds as of a large model."""
    chosen, real = [], Automatic.choose
    monkeypatch.setattr(automatic, "MIN_BYTES", 1)

    def choose(self, *arguments):
        chosen.append(real(self, *arguments))
        return chosen[-1]

    monkeypatch.setattr(Automatic, "choose", choose)
    return chosen


def test_the_command_converts_a_large_model_in_processes(model_dir, tmp_path, pools):
    arguments = [str(model_dir), "--quiet", "--jobs", "3"]
    assert main([*arguments, "--cache-dir", str(tmp_path / "a")]) == 0
    assert main([*arguments, "--cache-dir", str(tmp_path / "b"), "--executor", "thread"]) == 0
    assert [type(pool).__mro__[1] for pool in pools] == [ProcessPoolExecutor]
    assert entries(tmp_path / "a") == entries(tmp_path / "b")
    assert len(entries(tmp_path / "a")) == 3


def test_a_command_without_work_chooses_nothing(model_dir, tmp_path, pools):
    arguments = [str(model_dir), "--quiet", "--jobs", "3", "--cache-dir", str(tmp_path / "a")]
    for _ in range(2):
        assert main(arguments) == 0
    assert len(pools) == 1
