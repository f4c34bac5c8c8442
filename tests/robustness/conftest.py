"""Fixtures of these tests: models in memory, one zygote, and reasons to skip."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.robustness import tracer
from tests.robustness.cuts import write_tiny
from tests.robustness.harness import Model, close_zygote, scratch

LINUX_ROOT = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root of Linux may do this"
)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "new(what): asserts something that a drop is yet to do; says what"
    )


def pytest_collection_modifyitems(items):
    marks = [pytest.mark.slow]
    if sys.platform != "linux":
        why = "runs are forked beside MLX, which was tried on Linux alone"
        marks.append(pytest.mark.skip(reason=why))
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for mark in marks:
                item.add_marker(mark)


@pytest.fixture(scope="session", autouse=True)
def _zygote():
    """Ends the process that forks the runs."""
    yield
    close_zygote()


@pytest.fixture
def place():
    """A directory in memory: no power cut reaches these runs."""
    with scratch() as place:
        yield place


@pytest.fixture
def tiny(place: Path) -> Model:
    """A tiny llama in three shards that need each other a little, and a cache."""
    return Model(write_tiny(place / "model"), place / "cache")


@pytest.fixture
def strace() -> None:
    """Skips the test where strace does not work."""
    if reason := tracer.why_not():
        pytest.skip(reason)
