"""Units: the work for a shard is cut at blocks of the entry, and nothing is lost or done twice."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from dataclasses import replace

import pytest

from paroquant_stream.files.tensor_header import TensorSpec
from paroquant_stream.files.tensor_writer import lay_out
from paroquant_stream.plan.task import Operation, Part, Task
from paroquant_stream.store.store import Store
from paroquant_stream.transform import unit as module
from paroquant_stream.transform.unit import Step, Unit, cost_of, ranges_of, steps_of, units_of
from tests.helpers.builders import llama_tensors, write_checkpoint
from tests.helpers.paths import FIXTURES
from tests.helpers.plans import moe_tensors, plan_of
from tests.helpers.units import BLOCK, UNIT, jobs_of, whole_unit

pytestmark = pytest.mark.usefixtures("small_units")
NAMES = [path.name for path in sorted(FIXTURES.iterdir()) if (path / "config.json").exists()]


def steps_and_tensors(task: Task):
    _, tensors = lay_out(task.outputs)
    return steps_of(task, tensors), tensors


def written_by(step: Step, task: Task) -> list[tuple[int, int]]:
    """The ranges of the entry that a step writes."""
    operation = step.operation
    if operation.kind == "quantize":
        part, rows = operation.slices[0][0], operation.outputs[0].shape[0]
        share = part.shape[0] / rows
    else:
        (whole,) = [o for o in task.operations if o.outputs == operation.outputs]
        share = len(operation.slices) / len(whole.slices)
    sizes = [round(output.nbytes * share) for output in operation.outputs]
    return [(place, place + size) for place, size in zip(step.places, sizes, strict=True)]


@pytest.fixture(scope="module")
def tasks():
    found = {name: [job.task for job in jobs_of(FIXTURES / name)] for name in NAMES}
    found["many experts"] = list(plan_of(moe_tensors(experts=16)).tasks)
    return found


def test_every_byte_of_an_entry_is_written_by_one_step(tasks):
    cut = Counter()
    for name, found in tasks.items():
        for task in found:
            steps, tensors = steps_and_tensors(task)
            cut[name] += len(steps) - len(task.operations)
            ranges = sorted(r for step in steps for r in written_by(step, task) if r[1] > r[0])
            position = min((tensor.start for tensor in tensors), default=0)
            for start, stop in ranges:
                assert start == position, (name, task.shard)
                position = stop
            assert position == max((tensor.stop for tensor in tensors), default=0)
    assert min(cut[name] for name in ("llama-awq-single", "many experts")) > 0


def test_a_step_begins_at_a_block_of_every_output(tasks):
    for found in tasks.values():
        for task in found:
            steps, tensors = steps_and_tensors(task)
            starts = [tensor.start for tensor in tensors]
            for step in steps:
                for place in step.places:
                    home = max(start for start in starts if start <= place)
                    assert (place - home) % BLOCK == 0


def test_a_step_that_can_be_cut_is_no_larger_than_a_unit(tasks):
    sizes = [step.size for step in steps_and_tensors(tasks["many experts"][0])[0]]
    assert max(sizes) <= UNIT < sum(sizes)
    quantized = [
        step
        for step in steps_and_tensors(tasks["llama-awq-single"][0])[0]
        if step.operation.kind == "quantize"
    ]
    assert len(quantized) > 2
    row = 256  # 16 rows of scales fill a block
    assert max(step.size for step in quantized) <= max(UNIT, 16 * row)


def test_rows_that_fill_no_block_are_not_cut(monkeypatch, tasks):
    monkeypatch.setattr(module, "BLOCK", 1 << 20)
    task = tasks["llama-awq-single"][0]
    assert len(steps_and_tensors(task)[0]) == len(task.operations)


def test_a_task_of_one_unit_is_not_cut(monkeypatch, tasks):
    monkeypatch.setattr(module, "UNIT", 1 << 30)
    for found in tasks.values():
        for task in found:
            assert len(steps_and_tensors(task)[0]) == len(task.operations)


def test_steps_are_in_the_order_of_a_reading_from_front_to_back(tasks):
    for found in tasks.values():
        for task in found:
            starts = [step.operation.start for step in steps_and_tensors(task)[0]]
            assert starts == sorted(starts)


def test_the_slices_and_rows_of_an_operation_are_divided_without_rest(tasks):
    for found in tasks.values():
        for task in found:
            steps, _ = steps_and_tensors(task)
            for operation in task.operations:
                of = [s.operation for s in steps if s.operation.outputs == operation.outputs]
                of.sort(key=lambda each: each.slices[0][0].start)
                if operation.kind == "quantize":
                    parts = [each.slices[0][0] for each in of]
                    assert sum(part.shape[0] for part in parts) == operation.slices[0][0].shape[0]
                    assert [part.stop for part in parts[:-1]] == [p.start for p in parts[1:]]
                else:
                    slices = [piece for each in of for piece in each.slices]
                    assert sorted(map(str, slices)) == sorted(map(str, operation.slices))


def test_what_is_read_gets_a_fingerprint_once_and_in_order(tasks):
    for found in tasks.values():
        for task in found:
            ranges = ranges_of(task.shard, steps_and_tensors(task)[0])
            assert all(start < stop for start, stop in ranges)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
            parts = [p for o in task.operations for s in o.slices for p in s]
            own = {(p.start, p.stop) for p in parts if p.shard == task.shard and p.stop > p.start}
            assert sum(stop - start for start, stop in ranges) == sum(b - a for a, b in own)


@pytest.fixture
def unit(tmp_path):
    (job,) = jobs_of(write_checkpoint(tmp_path / "m"))
    with whole_unit(job) as unit:
        yield unit


def test_a_shard_beside_others_is_one_unit(unit):
    assert units_of(unit, split=False) == [unit]


def test_a_small_shard_is_one_unit_though_workers_are_idle(unit, monkeypatch):
    monkeypatch.setattr(module, "UNIT", 1 << 20)
    assert units_of(unit, split=True) == [unit]


def test_a_last_shard_is_many_units_and_the_hash_is_the_first(unit):
    first, *others = units_of(unit, split=True)
    assert (first.steps, first.path, first.hashed) == ((), None, unit.hashed)
    assert len(others) > 10
    assert {(other.path, other.hashed) for other in others} == {(unit.path, None)}
    assert sorted((s for other in others for s in other.steps), key=str) == sorted(
        unit.steps, key=str
    )


def test_the_unit_that_takes_longest_comes_first(unit):
    _, *others = units_of(unit, split=True)
    costs = [sum(cost_of(step.operation) for step in other.steps) for other in others]
    assert costs == sorted(costs, reverse=True)
    kinds = [{step.operation.kind for step in other.steps} for other in others]
    assert kinds[0] == {"quantize"}
    assert {"quantize"} not in kinds[len(kinds) // 2 :]


def test_a_unit_is_larger_than_its_size_only_for_one_step(unit):
    for other in units_of(unit, split=True):
        sizes = [step.size for step in other.steps]
        assert sum(sizes) <= UNIT or len(sizes) == 1


def test_a_shard_that_is_hashed_already_has_no_unit_for_it(unit):
    hashed = replace(unit, hashed=None)
    units = units_of(hashed, split=True)
    assert {other.hashed for other in units} == {None}
    assert units == units_of(unit, split=True)[1:]


def test_a_lone_shard_is_cut_however_large_it_is(monkeypatch, tmp_path):
    """Of 4 GB: an embedding and linears as large as those of a 70B; no byte is read."""
    monkeypatch.undo()
    rows, start, operations = 128_256, 1000, []
    for index in range(3):
        part = Part("e", "F16", (rows, 8192), "s", start, start + rows * 8192 * 2)
        fields = (("w", "U32", 1024), ("s", "F16", 64), ("b", "F16", 64))
        outputs = [TensorSpec(f"{n}{index}", dtype, (rows, width)) for n, dtype, width in fields]
        operations.append(Operation("quantize", ((part,),), tuple(outputs)))
        start = part.stop
    task = Task("s", start, tuple(operations))
    steps = steps_of(task, lay_out(task.outputs)[1])
    whole = Unit("s", tmp_path, Store(tmp_path), tuple(steps), tmp_path / "t", ((0, 1000),))
    units = units_of(whole, split=True)
    assert len(units) > 3 * 8
    assert max(sum(step.size for step in each.steps) for each in units) <= 256 << 20


def test_a_unit_is_small_when_pickled(unit):
    for each in (unit, *units_of(unit, split=True)):
        parts = sum(len(s) for step in each.steps for s in step.operation.slices)
        hashed = len(each.hashed or ())
        assert len(pickle.dumps(each)) < 350 * parts + 30 * hashed + 1000


def test_a_model_of_one_layer_has_units_of_each_kind():
    task = plan_of(llama_tensors(layers=1)).tasks[0]
    kinds = {step.operation.kind for step in steps_and_tensors(task)[0]}
    assert {"quantize", "awq_weight", "awq_biases", "copy"} <= kinds
