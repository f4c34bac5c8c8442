"""Slots: as many jobs as slots, and a helper only if no job needs the idle slot."""

from __future__ import annotations

import threading

import pytest

from paroquant_stream.errors import RunCancelledError
from paroquant_stream.execution.slots import Buffers, Slot, SlotPool


def has_helper(slot: Slot) -> bool:
    with slot.helper() as pool:
        return pool is not None


def test_only_a_second_slot_gives_a_helper():
    assert not has_helper(Slot(SlotPool(1)))
    assert has_helper(Slot(SlotPool(2)))


def test_a_slot_that_a_job_waits_for_gives_no_helper():
    assert not has_helper(Slot(SlotPool(2, waiting=2)))
    assert has_helper(Slot(SlotPool(3, waiting=2)))


def test_the_jobs_of_a_shared_pool_count_as_waiting():
    pool = SlotPool(2)
    pool.share(1)
    assert not has_helper(Slot(pool))


def test_more_jobs_than_announced_still_get_a_slot():
    pool = SlotPool(2, waiting=0)
    assert has_helper(Slot(pool))


def test_a_helper_ends_with_the_body_and_returns_its_slot():
    slot = Slot(SlotPool(2))
    with slot.helper() as pool:
        assert pool.submit(threading.get_ident).result() != threading.get_ident()
        assert not has_helper(slot)
    assert has_helper(slot)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(threading.get_ident)


def test_a_helper_has_three_threads():
    barrier = threading.Barrier(3, timeout=30)
    with Slot(SlotPool(2)).helper() as pool:
        list(pool.map(lambda _: barrier.wait(), range(3)))


def test_a_released_slot_is_free_again():
    pool = SlotPool(1)
    first = Slot(pool)
    memory = first.buffers
    first.release()
    first.release()
    assert Slot(pool).buffers is memory
    with pytest.raises(AssertionError):
        first.buffers  # noqa: B018


def test_a_second_release_does_not_add_a_slot():
    pool = SlotPool(1)
    first = Slot(pool)
    first.release()
    first.release()
    assert not has_helper(Slot(pool))


def test_the_last_used_buffers_are_taken_first():
    pool = SlotPool(3, waiting=3)
    slots = [Slot(pool) for _ in range(3)]
    memory = slots[1].buffers
    for slot in (slots[0], slots[2], slots[1]):
        slot.release()
    assert Slot(pool).buffers is memory


def test_a_job_that_waits_for_a_slot_is_cancelled():
    pool = SlotPool(1)
    Slot(pool)
    threading.Timer(0.05, pool.stop).start()
    with pytest.raises(RunCancelledError):
        Slot(pool)


def test_stopping_a_share_stops_no_other():
    pool = SlotPool(1)
    one, other = pool.share(1), pool.share(1)
    one.stop()
    with pytest.raises(RunCancelledError):
        one.check()
    pool.check()
    other.check()


def test_stopping_a_pool_stops_its_shares_and_children():
    models = SlotPool(1)
    shards = SlotPool(1, 0, parent=models)
    share = shards.share(1)
    models.stop()
    for pool in (models, shards, share):
        with pytest.raises(RunCancelledError):
            pool.check()


def test_buffers_are_reused_and_grow():
    buffers = Buffers()
    first = buffers.take(0, 100)
    first[:] = b"x" * 100
    assert buffers.take(0, 50) == b"x" * 50
    assert buffers.take(0, 100) == b"x" * 100
    assert buffers.take(1, 50) == bytes(50)
    assert len(buffers.take(0, 200)) == 200
