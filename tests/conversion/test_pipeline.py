"""The tasks of a model, run by workers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from paroquant_stream.execution.slots import SlotPool

from paroquant_stream.conversion import pipeline
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import RunCancelledError, StoreError
from paroquant_stream.store.manifest import Manifest
from paroquant_stream.store.store import Store
from tests.helpers.builders import cut_apart, llama_tensors, write_checkpoint
from tests.helpers.conversions import actions, run

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
    slots, told = SlotPool(1, 0), []

    def stop(shard: str, done: int, size: int) -> None:
        told.append(done)
        if done:
            slots.stop()

    request = replace(make_request(model_dir, jobs=1), slots=slots)
    with pytest.raises(RunCancelledError):
        convert(request, stop)
    assert told[:-1] == [0, 0, 0]  # the sizes, then what stopped it
