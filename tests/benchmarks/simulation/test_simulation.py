"""The benchmark's simulation: exact times where a person can work them out."""

from __future__ import annotations

from math import inf

import pytest

from paroquant_stream.files.tensor_writer import file_size
from tests.benchmarks.end_to_end.checkpoint import tensors
from tests.benchmarks.simulation.flow import STAGES, Host, Rates, convert
from tests.benchmarks.simulation.fluid import Gate, Shared, Simulation
from tests.benchmarks.simulation.shapes import on_paper


def use(resource, *amounts):
    for amount in amounts:
        yield resource, amount


def test_one_user_gets_the_whole_resource_or_its_own_limit():
    simulation, link, core = Simulation(), Shared(4), Shared(2, each=1)
    simulation.start(use(link, 10, 2))
    assert simulation.run() == pytest.approx(3)
    simulation.start(use(core, 5))
    assert simulation.run() == pytest.approx(8)


def test_two_users_share_and_the_longer_one_then_has_all():
    simulation, link = Simulation(), Shared(2)
    simulation.start(use(link, 2))
    simulation.start(use(link, 6))
    # both at 1 until 2 s, then the second's other 4 at 2
    assert simulation.run() == pytest.approx(4)


def test_three_users_of_two_cores_take_the_sum_of_their_work():
    simulation, cores = Simulation(), Shared(2, each=1)
    for _ in range(3):
        simulation.start(use(cores, 2))
    assert simulation.run() == pytest.approx(3)


def test_one_who_comes_later_slows_the_first():
    simulation, link, delay = Simulation(), Shared(1), Shared(float("inf"), each=1)

    def late():
        yield delay, 1
        yield link, 1

    simulation.start(use(link, 2))
    simulation.start(late())
    assert simulation.run() == pytest.approx(3)


def test_a_resource_that_serves_one_queues_the_others():
    simulation, disk, ends = Simulation(), Shared(2, at_once=1), []

    def read(size):
        yield disk, size
        ends.append(simulation.now)

    for size in (2, 2, 4):
        simulation.start(read(size))
    simulation.run()
    assert ends == pytest.approx([1, 2, 4])
    assert disk.done == pytest.approx(8)


def test_a_gate_admits_in_order_up_to_its_places():
    simulation, gate, delay, order = Simulation(), Gate(2), Shared(float("inf"), each=1), []

    def visit(name):
        yield gate
        order.append((name, simulation.now))
        yield delay, 1
        simulation.release(gate)

    for name in "abc":
        simulation.start(visit(name))
    assert simulation.run() == pytest.approx(2)
    assert order == [("a", 0), ("b", 0), ("c", 1)]
    assert gate.free == 2


def test_who_waits_for_a_process_goes_on_at_its_end():
    simulation, link = Simulation(), Shared(1)

    def both():
        beside = simulation.start(use(link, 3))
        yield link, 1
        yield beside
        yield link, 1

    simulation.start(both())
    assert simulation.run() == pytest.approx(5)


def test_a_gate_that_never_opens_is_an_error():
    simulation = Simulation()

    def stuck():
        yield Gate()

    simulation.start(stuck())
    with pytest.raises(RuntimeError, match="1 processes wait for ever"):
        simulation.run()


def test_every_resource_does_what_was_asked_of_it():
    simulation, link, cores = Simulation(), Shared(3), Shared(2, each=1)

    def work(size):
        for _ in range(5):
            yield link, size
            yield cores, size / 2

    for size in (1, 2, 4):
        simulation.start(work(size))
    seconds = simulation.run()
    assert (link.done, cores.done) == pytest.approx((35, 17.5))
    assert link.done / 3 <= seconds
    assert link.busy <= seconds


def flow(jobs, shards, known=False, **rates):
    """A made-up model converted: seconds, host, model. What has no rate given is free."""
    specs = tensors(4, "AUTOAWQ", 8192, 1024, 4096, 256)
    model = on_paper("made up", list(specs), shards)
    slices = {(op.kind, op.slices[0][0].shape) for t in model.tasks for op in t.operations}
    seconds = dict.fromkeys((key for key in slices if key[0] in STAGES), 0.0)
    free = dict.fromkeys(("read", "hash", "check", "seal", "quantize"), inf)
    none = dict.fromkeys(("slice", "fresh", "fsync", "start", "load"), 0.0)
    numbers = Rates(**free | none | rates | {"seconds": seconds})
    simulation = Simulation()
    host = Host(jobs, Shared(4, each=1), Shared(1e9), Shared(5e8, at_once=1))
    simulation.start(convert(simulation, host, model.tasks, numbers, 0, known))
    return simulation.run(), host, model


@pytest.mark.parametrize("jobs", [1, 2, 4])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_conversion_reads_hashes_and_writes_every_byte(jobs, shards):
    _, host, model = flow(jobs, shards, hash=1e9, seal=1e9)
    assert host.source.done == pytest.approx(model.size)
    assert host.stages["hash"] == pytest.approx(model.size / 1e9)
    assert host.stages["seal"] == pytest.approx(model.entries / 1e9)
    assert host.target.done == pytest.approx(model.entries)
    assert host.places.free == jobs


def test_a_slow_hash_on_one_core_is_all_that_counts():
    seconds, _, model = flow(1, 3, hash=1e6)
    assert seconds == pytest.approx(model.size / 1e6, rel=0.01)


def test_three_places_hash_three_shards_at_once():
    seconds, _, model = flow(3, 3, hash=1e6)
    assert seconds == pytest.approx(max(task.size for task in model.tasks) / 1e6, rel=0.02)


def test_with_a_place_to_spare_the_hash_runs_beside_the_rest():
    sizes = {"hash": 1e6, "seal": 1e6}
    alone, _, model = flow(1, 1, **sizes)
    beside, _, _ = flow(2, 1, **sizes)
    assert alone == pytest.approx((model.size + model.entries) / 1e6, rel=0.02)
    assert beside == pytest.approx(max(model.size, model.entries) / 1e6, rel=0.02)


def test_a_changed_shard_is_hashed_then_read_from_the_cache():
    seconds, host, model = flow(1, 1, known=True, read=1e6)
    assert host.source.done == pytest.approx(model.size)
    assert seconds == pytest.approx(2 * model.size / 1e6, rel=0.05)


def test_an_entry_cannot_be_written_faster_than_the_disk():
    seconds, _, model = flow(4, 3)
    assert seconds >= sum(file_size(task.outputs) for task in model.tasks) / 5e8
