"""A flag that ends the jobs of a run, and those of its parts, but not those of others."""

from __future__ import annotations

import pytest

from paroquant_stream.errors import RunCancelledError
from paroquant_stream.execution.cancellation import Cancellation


def is_stopped(cancellation: Cancellation) -> bool:
    try:
        cancellation.check()
    except RunCancelledError:
        return True
    return False


def test_a_run_goes_on_until_it_is_stopped():
    run = Cancellation()
    run.check()
    run.stop()
    with pytest.raises(RunCancelledError):
        run.check()


def test_the_end_of_a_run_ends_its_parts():
    run = Cancellation()
    part = Cancellation(run)
    inner = Cancellation(part)
    run.stop()
    assert is_stopped(part)
    assert is_stopped(inner)


def test_the_end_of_a_part_ends_no_other():
    run = Cancellation()
    one, other = Cancellation(run), Cancellation(run)
    one.stop()
    assert is_stopped(one)
    assert not is_stopped(run)
    assert not is_stopped(other)
