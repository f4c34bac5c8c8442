"""A shard is stored under its hash only if every unit has read the bytes of that hash."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from dataclasses import replace

import pytest
from safetensors.numpy import load_file

from paroquant_stream.errors import (
    MalformedFileError,
    SourceChangedError,
    SourceDamagedError,
)
from paroquant_stream.files.hashing import SourceDigest
from paroquant_stream.transform import source_shard
from paroquant_stream.transform.source_shard import SourceShard
from paroquant_stream.transform.task_runner import run_task
from paroquant_stream.transform.unit import UnitResult, ranges_of
from paroquant_stream.transform.unit_pool import UnitPool
from paroquant_stream.transform.unit_runner import run_unit
from tests.helpers.builders import as_hub_snapshot, flip, llama_tensors, write_checkpoint
from tests.helpers.records import entry_record
from tests.helpers.units import Ordered, ignore, jobs_of, make_small, whole_unit


@pytest.fixture
def directory(tmp_path):
    return write_checkpoint(tmp_path / "m", llama_tensors(layers=1))


@pytest.fixture
def job(directory, tmp_path, monkeypatch):
    """The only shard, to be cut into about eight units."""
    make_small(monkeypatch)
    monkeypatch.setattr("paroquant_stream.transform.unit.UNIT", 8192)
    return jobs_of(directory, tmp_path / "cache")[0]


@pytest.fixture
def hidden(monkeypatch):
    """A write through a memory map may leave size and times as they were."""
    # private: what compares them
    monkeypatch.setattr(SourceShard, "_unchanged", lambda self: True)


def opened(job) -> SourceShard:
    return SourceShard(job.task, job.directory, job.store.digest_cache)


def path_of(job):
    return job.directory / job.task.shard


def published(job) -> list:
    return [*job.store.folder("entries").rglob("*"), *job.store.folder("tmp").iterdir()]


def keys(job) -> list[str]:
    return [path.stem for path in job.store.folder("entries").rglob("*.safetensors")]


def read_by(unit) -> list[tuple[int, int]]:
    """What a unit reads of its shard."""
    return ranges_of(unit.shard, unit.steps)


def count_of(job) -> int:
    pool = Ordered(range, lambda *_: None)
    run_task(replace(job, force=True), pool, ignore)
    return pool.ran


def test_units_in_any_order_give_the_entry_of_one(job):
    right = run_task(replace(job, split=False), UnitPool(1), ignore).record
    data = job.store.entry_path(right.key).read_bytes()
    count = count_of(job)
    assert count > 6
    for first in range(count):
        job.store.entry_path(right.key).unlink()
        order = [*range(first, count), *range(first)]
        pool = Ordered(lambda _, order=order: order[::-1], lambda *_: None)
        assert run_task(replace(job, force=True), pool, ignore).record == right
        assert job.store.entry_path(right.key).read_bytes() == data


@pytest.mark.usefixtures("hidden")
def test_a_change_between_any_two_units_is_noticed(job):
    """The bytes of every second unit are others only while it runs, whatever ran before it."""
    count, refused = count_of(job), 0
    job.store.entry_path(keys(job)[0]).unlink()
    for first, second in itertools.permutations(range(count), 2):
        fired, units = [], {}
        rest = [n for n in range(count) if n not in (first, second)]

        def before(ran, unit, fired=fired, units=units):
            units[ran] = unit
            if ran == 1:
                ranges = read_by(unit) or read_by(units[0])  # the hash reads what any reads
                start, stop = ranges[len(ranges) // 2]
                fired.append((start + stop) // 2)
                flip(path_of(job), fired[0])
            if ran == 2:
                flip(path_of(job), fired[0])  # as it was before

        order = [first, second, *rest]
        with pytest.raises(SourceChangedError, match="changed during the conversion"):
            run_task(replace(job, force=True), Ordered(lambda _, o=order: o, before), ignore)
        refused += 1
        assert len(fired) == 1
    assert refused == count * (count - 1)
    assert keys(job) == []


@pytest.mark.usefixtures("hidden")
@pytest.mark.parametrize("hash_first", [True, False])
def test_a_change_of_any_tensor_beside_the_hash_is_noticed(job, hash_first):
    ranges = [
        (p.start, p.stop) for o in job.task.operations for s in o.slices for p in s
    ]  # fmt: skip
    count = count_of(job)
    job.store.entry_path(keys(job)[0]).unlink()
    order = [*range(count)] if hash_first else [*range(1, count), 0]
    for at in sorted({at for start, stop in ranges for at in (start, stop - 1)}):

        def before(ran, _unit, at=at):
            if ran == (1 if hash_first else count - 1):  # beside the hash
                flip(path_of(job), at)

        with pytest.raises(SourceChangedError, match="changed during the conversion"):
            run_task(replace(job, force=True), Ordered(lambda _: order, before), ignore)
        flip(path_of(job), at)
    assert len(set(ranges)) > 10
    assert keys(job) == []


@pytest.mark.usefixtures("hidden")
def test_a_change_within_a_unit_that_hashes_is_noticed(job):
    """What it reads a second time, as scales for their biases, must be what it has hashed."""
    whole, refused = replace(job, split=False), 0
    size = path_of(job).stat().st_size
    for step in itertools.count(1, 3):
        ticks = []

        def tick(_count, step=step, ticks=ticks):
            ticks.append(1)
            if len(ticks) == step:
                for at in range(job.task.operations[0].start, size, 97):
                    flip(path_of(job), at)

        before = path_of(job).read_bytes()
        try:
            record = run_task(whole, UnitPool(1), tick).record
        except SourceChangedError:
            refused += 1
        else:
            # all that was read was read once, before the change or after it
            assert len(ticks) < step or record.source_sha256
        changed = path_of(job).read_bytes() != before
        path_of(job).write_bytes(before)
        if not changed:
            break
    assert refused > 1


def test_a_change_of_size_or_times_is_noticed(job):
    def before(ran, _unit):
        if ran == 1:
            os.utime(path_of(job), (1, 1))

    with pytest.raises(SourceChangedError, match="its size or times changed"):
        run_task(job, Ordered(range, before), ignore)
    assert published(job) == []


def test_a_shard_that_becomes_shorter_is_noticed(job):
    def before(ran, _unit):
        if ran == 1:
            os.truncate(path_of(job), 5000)

    with pytest.raises(SourceChangedError):
        run_task(job, Ordered(range, before), ignore)
    assert published(job) == []


def moved(tensors):
    """The tensors in another order, with the same bytes in all."""
    return dict(reversed(tensors.items()))


def of_another_type(tensors):
    name = "model.norm.weight"
    return tensors | {name: tensors[name].view("i2")}


def of_another_shape(tensors):
    name = "model.layers.0.self_attn.k_proj.qweight"
    return tensors | {name: tensors[name].reshape(tensors[name].shape[::-1])}


def of_another_name(tensors):
    found = dict(tensors)
    found["model.norm.weighs"] = found.pop("model.norm.weight")
    return found


def save(path, tensors) -> None:
    """Write tensors in their order."""
    header, at = {}, 0
    names = {"float16": "F16", "int32": "I32", "int16": "I16"}
    for name, array in tensors.items():
        fields = {"dtype": names[str(array.dtype)], "shape": list(array.shape)}
        header[name] = fields | {"data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    data = b"".join(array.tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("change", [moved, of_another_type, of_another_shape, of_another_name])
def test_a_header_replaced_after_the_plan_is_noticed(job, change):
    save(path_of(job), change(llama_tensors(layers=1)))
    with pytest.raises(SourceChangedError, match="is not where it was when the run began"):
        run_task(job, UnitPool(1), ignore)
    assert published(job) == []


def test_a_header_is_parsed_again_only_if_it_is_another(job, monkeypatch):
    parsed, real = [], source_shard.read_header
    monkeypatch.setattr(source_shard, "read_header", lambda *a: parsed.append(1) or real(*a))
    opened(job).close()
    assert parsed == []
    save(path_of(job), load_file(path_of(job)))  # without the metadata, the tensors as they were
    job = replace(job, task=replace(job.task, size=path_of(job).stat().st_size))
    with pytest.raises(SourceChangedError, match="is not where it was"):
        opened(job)
    assert parsed == [1]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
        (b"", "expected a safetensors file, found 0 bytes"),
        (b"<!doctype html>" * 5, "expected a safetensors header, found a header length of"),
    ],
)
@pytest.mark.parametrize("same_size", [False, True])
def test_what_replaced_a_shard_after_the_plan_is_named(job, data, text, same_size):
    if same_size and data:
        data += b" " * (job.task.size - len(data))
    path_of(job).write_bytes(data)
    with pytest.raises(MalformedFileError, match=text):
        opened(job)


def test_a_shard_cut_short_after_the_plan_is_noticed(job):
    os.truncate(path_of(job), job.task.size - 1)
    with pytest.raises(MalformedFileError, match="the header describes"):
        opened(job)


@pytest.mark.usefixtures("hidden")
def test_a_header_replaced_after_it_was_checked_is_noticed(job):
    def before(ran, _unit):
        if not ran:
            flip(path_of(job), 20)

    with pytest.raises(SourceChangedError, match="its header changed during the conversion"):
        run_task(job, Ordered(range, before), ignore)
    assert published(job) == []


def test_a_damaged_header_leaves_no_descriptor(job):
    before = len(os.listdir("/dev/fd"))
    path_of(job).write_bytes(b"\xff" * job.task.size)
    with pytest.raises(MalformedFileError):
        opened(job)
    assert len(os.listdir("/dev/fd")) == before


def test_a_lender_that_changes_between_two_units_is_noticed(job):
    shard = opened(job)
    shard.add(UnitResult(borrowed=(("a", b"1"), ("b", b"2"))))
    shard.add(UnitResult(borrowed=(("a", b"1"),)))
    with pytest.raises(SourceChangedError, match="b changed during the conversion"):
        shard.add(UnitResult(borrowed=(("b", b"3"),)))
    shard.close()


def test_two_units_that_read_other_bytes_are_noticed_at_once(job):
    shard, part = opened(job), job.task.operations[0].slices[0][0]
    place = (part.start, part.stop)
    shard.add(UnitResult(read=((place, b"1"),)))
    with pytest.raises(SourceChangedError, match=f"{part.name} changed during"):
        shard.add(UnitResult(read=((place, b"2"),)))
    shard.close()


def test_what_was_read_and_not_hashed_is_no_proof(job):
    """A unit that reads what the hash gave no fingerprint for is a defect, and refused."""
    with whole_unit(job) as unit:
        shard, result = opened(job), run_unit(unit, ignore)
        digest = SourceDigest(result.digest.sha256, {shard.header: shard._read[shard.header]})
        shard.add(replace(result, digest=digest, read=(((100, 200), b"1"),)))
        with pytest.raises(SourceChangedError, match="changed during the conversion"):
            shard.check()
        shard.close()


def test_without_a_hash_nothing_is_confirmed(job):
    shard = opened(job)
    assert not shard.is_hashed
    with pytest.raises(AssertionError, match="no unit has hashed it"):
        shard.check()
    shard.close()


def test_what_no_unit_borrowed_is_read_for_the_key(scattered_dir, tmp_path):
    jobs = jobs_of(scattered_dir, tmp_path / "cache")
    job = next(job for job in jobs if job.task.borrowed)
    shard, before = opened(job), len(os.listdir("/dev/fd"))
    parts = {
        part.name: hashlib.sha256(
            (scattered_dir / lender).read_bytes()[part.start : part.stop]
        ).digest()
        for lender, found in job.task.borrowed.items()
        for part in found
    }
    assert shard.borrowed_sha256() == job.task.borrowed_sha256(parts)
    assert len(os.listdir("/dev/fd")) == before
    shard.close()


def test_a_known_hash_is_not_made_again(job, settled):
    shard = opened(job)
    assert shard.known_sha256() is None
    assert not shard.may_be_known(None)
    with whole_unit(job) as unit:
        result = run_unit(replace(unit, steps=(), path=None), ignore)
    shard.add(result)
    assert shard.known_sha256() == result.digest.sha256
    shard.close()
    again = opened(job)
    assert again.may_be_known(None)
    assert again.known_sha256() == result.digest.sha256
    assert not again.is_hashed
    again.close()


def test_a_shard_may_be_known_by_its_sample_or_else_by_its_record(job, settled):
    shard = opened(job)
    known = entry_record(source_size=job.task.size)
    assert shard.may_be_known(known)  # the cache may have lost the digest
    assert not shard.may_be_known(replace(known, source_size=job.task.size + 1))
    shard.close()
    known = run_task(job, UnitPool(1), ignore).record
    flip(job.directory / job.task.shard, job.task.size - 1)
    shard = opened(job)
    assert not shard.may_be_known(known)  # the cache has the digest, and it was of another sample
    shard.close()


def test_a_blob_with_another_hash_than_its_name_is_an_error(directory, tmp_path):
    snapshot = as_hub_snapshot(directory, tmp_path / "models--owner--name")
    (blob,) = (tmp_path / "models--owner--name" / "blobs").iterdir()
    flip(blob, blob.stat().st_size - 1)
    (job,) = jobs_of(snapshot, tmp_path / "cache")
    with pytest.raises(SourceDamagedError, match=f"expected SHA-256 {blob.name}"):
        run_task(job, UnitPool(1), ignore)
    assert published(job) == []
