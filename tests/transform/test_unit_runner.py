"""A unit reads and writes its part, whoever runs it, and says what it has read."""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
from dataclasses import replace

import pytest
import xxhash

from paroquant_stream.errors import (
    CheckpointError,
    OutOfRangeError,
    RunCancelledError,
    StoreError,
)
from paroquant_stream.trace import Trace
from paroquant_stream.transform.source import Buffers
from paroquant_stream.transform.unit import ranges_of, units_of
from paroquant_stream.transform.unit_runner import run_unit
from tests.helpers.builders import llama_tensors, write_checkpoint
from tests.helpers.units import ignore, jobs_of, whole_unit

pytestmark = pytest.mark.usefixtures("small_units")


@pytest.fixture
def unit(tmp_path):
    (job,) = jobs_of(write_checkpoint(tmp_path / "m", llama_tensors(layers=1)))
    with whole_unit(job) as unit:
        yield unit


def shard_of(unit) -> bytes:
    return (unit.directory / unit.shard).read_bytes()


def ranges(pieces) -> list[tuple[int, int]]:
    return sorted((piece.start, piece.start + piece.size) for piece in pieces if piece.size)


def test_a_whole_shard_is_hashed_and_written(unit):
    result = run_unit(unit, ignore)
    data = shard_of(unit)
    assert result.digest.sha256 == hashlib.sha256(data).hexdigest()
    assert result.digest.fingerprints == {
        (a, b): xxhash.xxh3_128_digest(data[a:b]) for a, b in unit.hashed
    }
    found = ranges(result.pieces)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
    assert found[-1][1] == unit.path.stat().st_size
    assert result.borrowed == ()


def test_units_write_together_what_one_writes(unit):
    one = run_unit(unit, ignore)
    whole = unit.path.read_bytes()
    unit.path.write_bytes(bytes(len(whole)))
    results = [run_unit(each, ignore) for each in reversed(units_of(unit, split=True))]
    assert unit.path.read_bytes() == whole
    found = ranges(piece for result in results for piece in result.pieces)
    assert sum(b - a for a, b in found) == sum(b - a for a, b in ranges(one.pieces))
    assert results[-1].digest == one.digest


def test_what_is_read_apart_from_the_hash_has_a_fingerprint(unit):
    data = shard_of(unit)
    for each in units_of(unit, split=True)[1:]:
        result = run_unit(each, ignore)
        assert result.digest is None
        assert sorted(place for place, _ in result.read) == ranges_of(unit.shard, each.steps)
        for (start, stop), digest in result.read:
            assert digest == xxhash.xxh3_128_digest(data[start:stop])


def test_a_unit_that_only_hashes_writes_nothing(unit):
    before = unit.path.read_bytes()
    result = run_unit(units_of(unit, split=True)[0], ignore)
    assert (result.pieces, result.read, result.borrowed) == ((), (), ())
    assert result.digest.sha256 == hashlib.sha256(shard_of(unit)).hexdigest()
    assert unit.path.read_bytes() == before


def test_what_is_borrowed_has_a_sha256(scattered_dir):
    job = next(job for job in jobs_of(scattered_dir) if job.task.borrowed)
    with whole_unit(job) as unit:
        result = run_unit(unit, ignore)
    for name, digest in result.borrowed:
        (part,) = [p for parts in job.task.borrowed.values() for p in parts if p.name == name]
        data = (scattered_dir / part.shard).read_bytes()[part.start : part.stop]
        assert digest == hashlib.sha256(data).digest()
    assert {name for name, _ in result.borrowed} == {
        part.name for parts in job.task.borrowed.values() for part in parts
    }


def test_every_byte_is_counted_for_hash_and_conversion(unit):
    read = sum(stop - start for start, stop in unit.hashed[1:])
    counts = []
    for each in units_of(unit, split=True):
        run_unit(each, counts.append)
    alone = []
    run_unit(unit, alone.append)
    steps = sum(step.size for step in unit.steps)
    size = len(shard_of(unit))
    assert sum(counts) == sum(alone) == size + steps
    assert read <= steps  # scales are read for their biases too


def test_buffers_are_those_of_the_caller(unit):
    buffers = Buffers()
    run_unit(unit, ignore, buffers)
    memory = buffers._buffers[0]  # private: they are reused without being asked for
    run_unit(unit, ignore, buffers)
    assert buffers._buffers[0] is memory
    assert len(memory) > 0


def test_a_trace_has_the_stages(unit):
    trace = Trace()
    run_unit(unit, ignore, trace=trace)
    found = {span.stage for span in trace.spans}
    assert {"read", "hash", "write", "quantize", "awq_weight", "copy"} <= found


@pytest.mark.parametrize("sync", [False, True])
def test_only_for_another_host_the_bytes_are_synced(unit, monkeypatch, sync):
    real, synced = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(fd) or real(fd))
    for each in units_of(unit, split=True):
        synced.clear()
        run_unit(each, ignore, sync=sync)
        assert len(synced) == (sync and each.path is not None)


def failing(unit, case, monkeypatch):
    def stop(_count):
        raise RunCancelledError("stop")

    def full(*_):
        raise OSError(28, "No space left on device")

    if case is RunCancelledError:
        return unit, stop
    if case is StoreError:
        monkeypatch.setattr(os, "pwrite", full)
    if case is CheckpointError:
        return replace(unit, directory=unit.directory / "nowhere"), ignore
    return unit, ignore


@pytest.mark.parametrize("error", [RunCancelledError, StoreError, CheckpointError])
def test_an_error_leaves_no_descriptor(unit, monkeypatch, error):
    before = len(os.listdir("/dev/fd"))
    with monkeypatch.context() as patch:
        broken, tick = failing(unit, error, patch)
        with pytest.raises(error):
            run_unit(broken, tick)
    assert len(os.listdir("/dev/fd")) == before


def test_an_entry_whose_run_has_ended_is_an_error(unit):
    unit.path.unlink()
    with pytest.raises(StoreError, match="No such file"):
        run_unit(unit, ignore)


def test_a_value_that_overflows_is_an_error(tmp_path):
    tensors = llama_tensors(layers=1)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype("f4") * 1e6
    (job,) = jobs_of(write_checkpoint(tmp_path / "m", tensors), dtype="float16")
    with whole_unit(job) as unit, pytest.raises(OutOfRangeError, match=r"model\.norm\.weight"):
        run_unit(unit, ignore)


def test_a_result_is_small_when_pickled(unit):
    for each in (unit, *units_of(unit, split=True)):
        result = pickle.loads(pickle.dumps(each)) and run_unit(each, ignore)
        items = len(result.pieces) + len(result.read) + len(result.borrowed)
        items += len(result.digest.fingerprints) if result.digest else 0
        blocks = sum(len(piece.blocks) for piece in result.pieces)
        assert len(pickle.dumps(result)) < 100 * items + blocks + 1000
        assert pickle.loads(pickle.dumps(result)) == result
