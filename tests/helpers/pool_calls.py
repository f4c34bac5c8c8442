"""Functions that tests call in the workers of a pool."""

from __future__ import annotations

import os
import time
from pathlib import Path

LIMIT = 60
"""Seconds to wait for what happens at once; reached only by a failure."""


def meet(place: str, limit: float, count: int = 2) -> int:
    """Return the id of this process once as many calls as `count` run at the same time."""
    Path(place).mkdir(exist_ok=True)
    number = time.monotonic_ns()
    Path(place, f"{os.getpid()}-{number}").touch()
    until = time.monotonic() + limit
    while len(os.listdir(place)) < count:
        if time.monotonic() > until:
            raise TimeoutError(f"{count} calls never ran at the same time")
        time.sleep(0.001)
    return os.getpid()


def hold(begun: str, go_on: str) -> int:
    """Note that the call has begun, and return the id of this process once it may go on."""
    Path(begun).touch()
    wait_for(go_on)
    return os.getpid()


def wait_for(path: str | Path) -> None:
    """Wait until a file exists."""
    until = time.monotonic() + LIMIT
    while not os.path.exists(path):
        if time.monotonic() > until:
            raise TimeoutError(f"{path} never came")
        time.sleep(0.001)
