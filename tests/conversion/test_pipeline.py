"""The tasks of a model, run by workers."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash

from paroquant_stream.backends.backend import Backend
from paroquant_stream.conversion import pipeline
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import RunCancelledError, StoreError
from paroquant_stream.execution.automatic import Automatic
from paroquant_stream.execution.cancellation import Cancellation
from paroquant_stream.execution.threads import Shared
from paroquant_stream.files.tensor_header import TensorSpec
from paroquant_stream.maintenance.verify import verify_model
from paroquant_stream.plan.task import Operation, Part, Task
from paroquant_stream.store.manifest import Manifest
from paroquant_stream.store.store import Store
from paroquant_stream.transform import unit_pool
from tests.helpers.builders import cut_apart, flip, llama_tensors, write_checkpoint
from tests.helpers.cache_files import entries
from tests.helpers.conversions import actions, flip_byte, run
from tests.helpers.paths import FIXTURES
from tests.helpers.units import make_small

pytestmark = pytest.mark.usefixtures("settled")


@pytest.mark.parametrize("jobs", [1, 2, 8])
def test_the_number_of_jobs_never_changes_a_bit(model_dir, tmp_path, jobs):
    result = convert(make_request(model_dir, cache_dir=tmp_path / str(jobs), jobs=jobs))
    reference = run(model_dir)
    assert [r.digest for r in result.manifest.entries] == [
        r.digest for r in reference.manifest.entries
    ]


def test_one_file_and_ten_hold_the_same_tensors(tmp_path):
    tensors = llama_tensors()
    one = run(write_checkpoint(tmp_path / "one", tensors))
    ten = run(write_checkpoint(tmp_path / "ten", tensors, cut_apart(10)))

    def stored(result: Manifest):
        return sorted((t.name, t.dtype, t.shape) for r in result.entries for t in r.tensors)

    assert stored(one.manifest) == stored(ten.manifest)


def test_progress_ends_at_the_size_of_every_shard(model_dir):
    last: dict[str, tuple[int, int]] = {}
    convert(
        make_request(model_dir, jobs=2),
        lambda shard, done, size: last.update({shard: (done, size)}),
    )
    assert len(last) == 3
    assert all(done == size for done, size in last.values())


def test_a_full_disk_is_reported_before_work_and_a_rerun_resumes(model_dir, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Store, "free_bytes", lambda _: 1000)
        with pytest.raises(StoreError, match=r"[\d.]+ kB needed for 3 shards, 1\.0 kB free"):
            run(model_dir)
    assert set(actions(run(model_dir)).values()) == {"converted"}


def test_a_forced_run_needs_room_for_what_is_converted_already(model_dir, monkeypatch):
    run(model_dir)
    monkeypatch.setattr(Store, "free_bytes", lambda _: 1000)
    with pytest.raises(StoreError, match=r"kB needed for 3 shards, 1\.0 kB free"):
        run(model_dir, force=True)


@pytest.mark.parametrize(
    ("jobs", "drop_source", "ahead"), [(3, False, None), (1, True, 2), (3, True, 3)]
)
def test_only_a_drop_limits_what_is_downloaded_ahead(
    model_dir, monkeypatch, jobs, drop_source, ahead
):
    given, real = [], pipeline.Prefetcher
    monkeypatch.setattr(pipeline, "Prefetcher", lambda *a: given.append(a[-1]) or real(*a))
    convert(make_request(model_dir, jobs=jobs, drop_source=drop_source))
    assert given == [ahead]


def test_an_equal_manifest_is_not_written_again(model_dir, monkeypatch):
    """So that a cache that cannot be written still serves."""
    first, real, looked = run(model_dir), pipeline.work_of, []
    monkeypatch.setattr(pipeline, "work_of", lambda *a: looked.append(1) or real(*a))
    monkeypatch.setattr("paroquant_stream.conversion.converter.staleness", lambda *_: "unknown")
    monkeypatch.setattr(Store, "write_manifest", lambda *_: pytest.fail("written"))
    assert run(model_dir).manifest == first.manifest
    assert looked


def test_a_run_that_is_stopped_ends_at_the_next_bytes(model_dir):
    cancellation, told = Cancellation(), []

    def stop(shard: str, done: int, size: int) -> None:
        told.append(done)
        if done:
            cancellation.stop()

    shared = Shared(Automatic(), ThreadPoolExecutor(1), cancellation)
    request = replace(make_request(model_dir, jobs=1), shared=shared)
    with shared.threads, pytest.raises(RunCancelledError):
        convert(request, stop)
    assert set(told[:-1]) == {0}  # the sizes, then what stopped it
    assert told[-1] > 0


def splits(model, jobs, monkeypatch) -> list[bool]:
    found, real = [], pipeline.run_task

    def noted(job, *rest):
        found.append((job.task.shard, job.split))
        return real(job, *rest)

    monkeypatch.setattr(pipeline, "run_task", noted)
    convert(make_request(model, jobs=jobs))
    return [split for _, split in sorted(found)]


@pytest.mark.parametrize(
    ("shards", "jobs", "expected"),
    [
        (1, 1, [False]),
        (1, 2, [True]),  # one alone, for all workers
        (12, 1, [False] * 12),
        (12, 2, [False] * 11 + [True]),  # once the other worker has the one before
    ],
)
def test_the_last_shards_are_split_among_the_workers(tmp_path, monkeypatch, shards, jobs, expected):
    model = write_checkpoint(tmp_path / "m", cut=cut_apart(shards))
    found = splits(model, jobs, monkeypatch)
    assert abs(sum(found) - sum(expected)) <= 1  # they are of almost the same size
    assert found[0] == expected[0]
    assert found[-1] == expected[-1]


@pytest.mark.parametrize(
    ("jobs", "in_turn", "shards", "expected"),
    [
        (1, True, 1, 1),
        (1, False, 9, 1),
        (2, False, 9, 3),
        (2, True, 2, 3),
        (8, False, 8, 9),
        (8, True, 8, 3),
        (16, True, 9, 6),
        (8, True, 9, 9),  # not all are split: each needs a worker of its own
    ],
)
def test_shards_are_begun_for_every_worker(model_dir, jobs, in_turn, shards, expected):
    request = make_request(model_dir, jobs=jobs)
    assert pipeline._shards_at_once(request, shards, in_turn) == expected  # private: as below


@pytest.mark.parametrize("in_turn", [True, False])
def test_as_many_shards_are_dropped_at_once_as_jobs(model_dir, in_turn):
    request = make_request(model_dir, jobs=8, drop_source=True)
    assert pipeline._shards_at_once(request, 8, in_turn) == 8  # private: as below


def reader_of(add, copies=True) -> SimpleNamespace:
    """One that begins no copies."""
    return SimpleNamespace(begin=lambda _: None, add=lambda record, _: add(record), copies=copies)


@pytest.mark.parametrize(("shards", "jobs"), [(3, 4), (6, 4)])
def test_a_run_whose_entries_are_read_meanwhile_publishes_each(tmp_path, monkeypatch, shards, jobs):
    asked, real, published = [], pipeline._shards_at_once, []
    monkeypatch.setattr(pipeline, "_shards_at_once", lambda *a: asked.append(a[1:]) or real(*a))
    model = write_checkpoint(tmp_path / "m", cut=cut_apart(shards))
    request = make_request(model, jobs=jobs, cache_dir=tmp_path / "cache")
    found = convert(request, reader=reader_of(published.append))
    assert asked == [(shards, True)]
    assert {each.key for each in published} == {each.key for each in found.manifest.entries}
    convert(make_request(model, jobs=jobs, cache_dir=tmp_path / "other"))
    assert asked[1:] == [(shards, False)]


@pytest.mark.parametrize(
    ("jobs", "reader", "expected"),
    [
        (2, reader_of(id), []),
        (3, reader_of(id), [3]),
        (2, reader_of(id, copies=False), [2]),
        (2, None, [2]),
    ],
)
def test_few_jobs_whose_entries_are_copied_are_threads(
    model_dir, monkeypatch, jobs, reader, expected
):
    asked, real = [], Automatic.choose
    monkeypatch.setattr(Automatic, "choose", lambda self, *a: asked.append(a[0]) or real(self, *a))
    convert(make_request(model_dir, jobs=jobs), reader=reader)
    assert asked == expected


@pytest.mark.parametrize("reader", [reader_of(id), None])
def test_an_executor_that_is_given_is_used(model_dir, reader):
    with ThreadPoolExecutor(2) as threads:
        convert(make_request(model_dir, jobs=2, executor=threads), reader=reader)
        assert threads._threads  # private: whether it was given work


def task(name: str, size: int, kind: str = "cast") -> Task:
    part = Part("t", "F16", (size // 2,), name, 0, size)
    operation = Operation(kind, ((part,),), (TensorSpec("t", "F16", (size // 2,)),))
    return Task(name, size, (operation,))


@pytest.mark.parametrize(
    ("jobs", "sizes", "expected"),
    [
        (1, [10, 10, 90], [False, False, False]),
        (2, [10, 10, 10, 10], [False, False, False, True]),
        (4, [10] * 6, [False, False, False, True, True, True]),
        (2, [40, 10, 10, 10], [True, False, False, True]),
        (2, [10, 10, 10, 40], [False, False, False, True]),
        (2, [30, 20, 10], [False, True, True]),  # a half of what is left is a worker's share
    ],
)
def test_a_shard_above_a_workers_share_is_split(model_dir, jobs, sizes, expected):
    tasks = [task(f"s{number}", size) for number, size in enumerate(sizes)]
    # private: real shards of such sizes would have to be converted
    found = pipeline._jobs(make_request(model_dir, jobs=jobs), tasks, tasks, {})
    assert [job.split for job in found] == expected
    assert [job.task for job in found] == tasks


@pytest.mark.parametrize(
    ("new", "split"),
    [
        ([1], [False, True, False, False]),
        ([0, 3], [False, False, False, True]),
        ([0, 1, 2], [False, False, True, False]),
    ],
)
def test_workers_share_what_changed_alone(model_dir, new, split):
    tasks = [task(f"s{number}", 10) for number in range(4)]
    request = make_request(model_dir, jobs=2)
    found = pipeline._jobs(request, tasks, [tasks[n] for n in new], {})  # private: as above
    assert [job.split for job in found] == split


@pytest.mark.parametrize("flipped", [0, 1])
def test_processes_start_for_what_changed_alone(model_dir, monkeypatch, flipped):
    convert(make_request(model_dir))
    asked = []
    monkeypatch.setattr(Automatic, "choose", lambda _self, *a: asked.append(a))
    shard, config = model_dir / "model-00001-of-00003.safetensors", model_dir / "config.json"
    size = shard.stat().st_size
    if flipped:
        flip(shard, size - 1)
    config.write_text(config.read_text() + "\n")  # so that there is a run at all
    convert(make_request(model_dir, jobs=2))
    assert asked == [(2, size * flipped)]


class Elsewhere(Executor):
    """Threads that do not look like those of this process."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2)

    def submit(self, *call, **options):
        return self._threads.submit(*call, **options)


@pytest.mark.parametrize(
    ("executor", "loads", "expected"),
    [(Elsewhere, "all", 1), (Elsewhere, "text", 1), (Elsewhere, None, 0), (None, "all", 0)],
)
def test_what_a_load_needs_is_imported_while_others_work(
    model_dir, monkeypatch, executor, loads, expected
):
    imported, converted = [], threading.Event()

    def note(_self: Backend, config: Mapping[str, Any]) -> None:
        assert converted.wait(30)  # passes only if the conversion does not wait for this
        imported.append(config["model_type"])

    monkeypatch.setattr(Backend, "import_class", note)
    request = make_request(model_dir, jobs=2, executor=executor and executor())
    convert(request, loads=loads)
    converted.set()
    for thread in threading.enumerate():
        if thread.name == "meanwhile":
            thread.join(30)
    assert imported == ["llama"] * expected


@pytest.mark.parametrize(("kind", "split"), [("quantize", True), ("cast", False)])
def test_an_embedding_counts_as_long_as_it_takes(model_dir, kind, split):
    tasks = [task("first", 10, kind), *(task(f"s{n}", 10) for n in range(2))]
    found = pipeline._jobs(make_request(model_dir, jobs=2), tasks, tasks, {})  # private: as above
    assert [job.split for job in found] == [split, False, True]


@pytest.mark.parametrize("jobs", [2, 3])
def test_units_never_change_a_bit(tmp_path, monkeypatch, jobs):
    make_small(monkeypatch)
    tensors = llama_tensors()
    for cut in (None, cut_apart(4)):
        model = write_checkpoint(tmp_path / str(cut is None), tensors, cut)
        one = convert(make_request(model, cache_dir=tmp_path / "one", jobs=1))
        many = convert(make_request(model, cache_dir=tmp_path / "many", jobs=jobs))
        assert one.manifest == many.manifest
    assert entries(tmp_path / "one") == entries(tmp_path / "many")


FAST = ("llama-awq-single", "llama-legacy-size", "llama-native-size", "llama-qlinear-adversarial",
        "qwen3_moe-awq-adversarial", "qwen3_5_moe-native-size")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        path.name if path.name in FAST else pytest.param(path.name, marks=pytest.mark.slow)
        for path in sorted(FIXTURES.iterdir())
        if (path / "config.json").exists()
    ],
)
def test_units_never_change_a_bit_of_any_layout(name, tmp_path, monkeypatch):
    """Experts are cut between their slices, embeddings between rows."""
    make_small(monkeypatch)
    model, ran = FIXTURES / name, []
    one = convert(make_request(model, cache_dir=tmp_path / "one", jobs=1))
    real = unit_pool.run_unit
    monkeypatch.setattr(
        unit_pool, "run_unit", lambda unit, *a, **k: ran.append(unit) or real(unit, *a, **k)
    )
    many = convert(make_request(model, cache_dir=tmp_path / "many", jobs=3))
    assert len(ran) > len(many.manifest.entries) + 3
    assert one.manifest == many.manifest
    assert entries(tmp_path / "one") == entries(tmp_path / "many")


def as_format_1(result, cache) -> Manifest:
    """Leave a cache as an earlier version did: flat digests, and a manifest of format 1."""
    records = []
    for record in result.manifest.entries:
        path = Store(cache).entry_path(record.key)
        digest = xxhash.xxh3_128(path.read_bytes()).hexdigest()
        path.with_suffix(".digest").write_text(f"xxh3-128 {digest} {record.size}\n")
        records.append(replace(record, digest=digest))
    manifest = replace(result.manifest, entries=tuple(records))
    data = bytearray(manifest.encode())
    data[8:12] = (1 << 16 | 1).to_bytes(4, "little")  # the version, which no hash covers
    store = Store(cache)
    store.manifest_path(store.manifest_names()[0]).write_bytes(data)
    return manifest


def test_a_cache_of_an_earlier_version_is_used_as_it_is(model_dir, tmp_path):
    cache = tmp_path / "cache"
    first = convert(make_request(model_dir, cache_dir=cache))
    old = as_format_1(first, cache)
    before = entries(cache)
    again = convert(make_request(model_dir, cache_dir=cache))
    assert again.manifest == old
    assert set(actions(again).values()) == {"reused"}
    assert entries(cache) == before
    assert verify_model(make_request(model_dir, cache_dir=cache), True) == (6, [])
    flip(Store(cache).entry_path(old.entries[1].key), -1 % old.entries[1].size)
    _, (problem,) = verify_model(make_request(model_dir, cache_dir=cache), True)
    assert f"expected XXH3 {old.entries[1].digest}" in str(problem)


def test_an_old_cache_whose_manifest_is_lost_is_adopted(model_dir, tmp_path):
    cache = tmp_path / "cache"
    first = convert(make_request(model_dir, cache_dir=cache))
    as_format_1(first, cache)
    store = Store(cache)
    store.manifest_path(store.manifest_names()[0]).unlink()
    again = convert(make_request(model_dir, cache_dir=cache))
    assert again.manifest == first.manifest  # with digests over blocks
    assert {report.action for report in again.shards} == {"reused"}


def test_a_changed_shard_of_an_old_cache_is_converted_beside_the_others(model_dir, tmp_path):
    cache = tmp_path / "cache"
    old = as_format_1(convert(make_request(model_dir, cache_dir=cache)), cache)
    flip_byte(model_dir, 2, "model.layers.0.self_attn.q_proj.qweight")
    again = convert(make_request(model_dir, cache_dir=cache))
    kept = [r for r in again.manifest.entries if r in old.entries]
    assert len(kept) == 2
    assert sum(r.digest.startswith("tree:") for r in again.manifest.entries) == 1
    assert verify_model(make_request(model_dir, cache_dir=cache), False) == (3, [])
