"""Workers: as many places as jobs, a helper only where a place is free and nobody waits for it."""

from __future__ import annotations

import threading

import pytest

from paroquant_stream.errors import RunCancelledError
from paroquant_stream.execution.slots import Buffers, Slot, SlotPool


def helped(worker: Slot) -> bool:
    with worker.helper() as pool:
        return pool is not None


def test_one_place_has_no_helper_and_two_have():
    assert not helped(Slot(SlotPool(1)))
    assert helped(Slot(SlotPool(2)))


def test_a_place_that_another_job_is_going_to_take_lends_no_helper():
    assert not helped(Slot(SlotPool(2, waiting=2)))
    assert helped(Slot(SlotPool(3, waiting=2)))


def test_a_helper_goes_with_the_body():
    places = SlotPool(2)
    worker = Slot(places)
    with worker.helper() as pool:
        assert pool.submit(threading.get_ident).result() != threading.get_ident()
        assert not helped(worker)
    assert helped(worker)


def test_a_place_is_free_again_once_it_is_left():
    places = SlotPool(1)
    first = Slot(places)
    memory = first.buffers
    first.release()
    first.release()
    assert Slot(places).buffers is memory
    with pytest.raises(AssertionError):
        first.buffers  # noqa: B018


def test_who_waits_for_a_place_hears_of_the_end():
    places = SlotPool(1)
    Slot(places)
    threading.Timer(0.05, places.stop).start()
    with pytest.raises(RunCancelledError):
        Slot(places)


def test_buffers_are_used_again_and_grow():
    buffers = Buffers()
    first = buffers.take(0, 100)
    first[:] = b"x" * 100
    assert buffers.take(0, 50) == b"x" * 50
    assert buffers.take(1, 50) == bytes(50)
    assert len(buffers.take(0, 200)) == 200
