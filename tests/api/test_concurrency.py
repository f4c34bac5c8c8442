"""Threads, asyncio, Ctrl-C and cancelling: what the README says is safe."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from paroquant_stream import convert_checkpoint, list_cache, load, verify_cache
from paroquant_stream.transform import task_runner
from tests.helpers.builders import cut_evenly, llama_tensors, write_checkpoint

pytestmark = pytest.mark.usefixtures("settled", "on_the_cpu")
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class StopError(Exception):
    """What a program raises to stop a conversion."""


def logits(model) -> list:
    import mlx.core as mx

    return model(mx.array([[1, 2, 3]])).tolist()


@pytest.fixture
def converted(monkeypatch) -> list[str]:
    """The shards that were converted; private: the work that a cached entry saves."""
    real, shards = task_runner._convert, []

    def counted(job, *rest):
        outcome = real(job, *rest)
        shards.append(job.task.shard)
        return outcome

    monkeypatch.setattr(task_runner, "_convert", counted)
    return shards


def test_two_threads_load_one_model_and_convert_it_once(model_dir, converted):
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: logits(load(model_dir, jobs=1).model), range(2)))
    assert found[0] == found[1]
    assert len(converted) == 3


def test_a_thread_pool_converts_several_models(tmp_path):
    models = [write_checkpoint(tmp_path / str(n), llama_tensors(n), cut_evenly(2)) for n in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        manifests = list(pool.map(convert_checkpoint, models))
    assert [manifest.directory for manifest in manifests] == [str(path) for path in models]
    assert verify_cache().problems == ()


@pytest.mark.parametrize("scaling", [None, LLAMA_3], ids=["plain", "llama 3"])
def test_what_a_thread_loaded_another_thread_runs(model_dir, scaling):
    config = model_dir / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_scaling": scaling}))

    async def main():
        return await asyncio.to_thread(load, model_dir)

    model, _, _ = asyncio.run(main())
    assert logits(model) == logits(load(model_dir).model)


def test_a_lazy_model_runs_in_the_thread_that_loaded_it(model_dir):
    with ThreadPoolExecutor(1) as pool:
        model, _, _ = pool.submit(load, model_dir, lazy=True).result()
        with pytest.raises(RuntimeError, match="no Stream"):
            logits(model)
        fresh, _, _ = pool.submit(load, model_dir, lazy=True).result()
        found = pool.submit(logits, fresh).result()
    assert found == logits(load(model_dir).model)


def test_in_a_running_event_loop_both_work(model_dir):
    async def cell():
        convert_checkpoint(model_dir, jobs=2)
        return logits(load(model_dir).model)

    assert asyncio.run(cell()) == logits(load(model_dir).model)


def test_in_a_thread_no_signal_handler_is_set(model_dir):
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(kind) for kind in kinds]

    def work():
        with pytest.raises(ValueError, match="main thread"):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        convert_checkpoint(model_dir, jobs=2)
        return logits(load(model_dir).model)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result()
    assert [signal.getsignal(kind) for kind in kinds] == before


def test_progress_is_called_from_several_threads(model_dir):
    seen = set()
    convert_checkpoint(model_dir, jobs=2, progress=lambda *_: seen.add(threading.current_thread()))
    assert seen > {threading.main_thread()}


@pytest.mark.parametrize("jobs", [1, 2])
def test_progress_that_raises_stops_a_conversion(model_dir, converted, jobs):
    def stop_after_one(_shard, done, size):
        if done == size:
            raise StopError

    with pytest.raises(StopError):
        convert_checkpoint(model_dir, jobs=jobs, progress=stop_after_one)
    kept = len(converted)
    assert kept > 0
    convert_checkpoint(model_dir, jobs=jobs)
    assert len(converted) == 3  # what was finished is not converted again
    assert verify_cache().problems == ()


def test_ctrl_c_stops_a_conversion_of_the_main_thread(model_dir, converted):
    def press(_shard, done, size):
        if done == size:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(model_dir, jobs=1, progress=press)
    assert 0 < len(converted) < 3
    convert_checkpoint(model_dir)
    assert len(converted) == 3


class Gate:
    """Progress that waits in a worker thread until it is opened."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, _shard, done, _size):
        if done:
            self.reached.set()
            assert self.opened.wait(60)


def test_ctrl_c_in_the_main_thread_leaves_a_worker_thread_at_work(model_dir):
    gate = Gate()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(convert_checkpoint, model_dir, progress=gate)
        assert gate.reached.wait(60)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not running.done()
        gate.opened.set()
        assert len(running.result().entries) == 3
    assert verify_cache().problems == ()


def test_a_cancelled_task_leaves_its_thread_at_work(model_dir):
    gate = Gate()

    async def main():
        task = asyncio.create_task(asyncio.to_thread(convert_checkpoint, model_dir, progress=gate))
        await asyncio.to_thread(gate.reached.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert list_cache().models == ()
        gate.opened.set()

    asyncio.run(main())  # ends when the threads have ended
    assert [model.state for model in list_cache().models] == ["fresh"]
