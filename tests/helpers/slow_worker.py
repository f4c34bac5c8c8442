"""Replacements of `run_remote` for worker processes: one is slow, one ends its process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from paroquant_stream.trace import Span
from paroquant_stream.transform import unit_pool, unit_runner
from paroquant_stream.transform.unit import Unit, UnitResult
from paroquant_stream.transform.unit_pool import Lease

Answer = tuple[UnitResult, list[Span]]


def before_each_tick(action: Callable[[], None]) -> None:
    """Call `action` after every chunk that units of this process read."""

    def run_unit(unit, tick, *rest, **options):
        def slow_tick(count: int) -> None:
            action()
            tick(count)

        return unit_runner.run_unit(unit, slow_tick, *rest, **options)

    unit_pool.run_unit = run_unit


def slow(unit: Unit, lease: Lease, pause: float = 0.2) -> Answer:
    """Write a line to stderr and sleep after every chunk."""

    def action() -> None:
        os.write(2, b"ticking\n")
        time.sleep(pause)

    before_each_tick(action)
    return unit_pool.run_remote(unit, lease)


def steady(unit: Unit, lease: Lease) -> Answer:
    """Sleep for a moment after every chunk, so that a shard takes seconds."""
    return slow(unit, lease, 0.02)


def deadly(unit: Unit, lease: Lease) -> Answer:
    """End the process after the tenth chunk, in the middle of a unit."""
    left = [10]

    def action() -> None:
        left[0] -= 1
        if not left[0]:
            os._exit(9)

    before_each_tick(action)
    return unit_pool.run_remote(unit, lease)
