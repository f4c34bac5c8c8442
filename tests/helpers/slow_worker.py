"""Replacements of `run_remote` for worker processes: one is slow, one ends its process."""

from __future__ import annotations

import os
import time

from paroquant_stream.trace import Span
from paroquant_stream.transform import remote_runner, source
from paroquant_stream.transform.remote_runner import Lease
from paroquant_stream.transform.task_runner import Job, Outcome

_real = source.Source._count  # private: called after every chunk


def slow(job: Job, lease: Lease, pause: float = 0.2) -> tuple[Outcome, list[Span]]:
    """Write a line to stderr and sleep after every chunk."""

    def count(self: source.Source, size: int) -> None:
        os.write(2, b"ticking\n")
        time.sleep(pause)
        _real(self, size)

    source.Source._count = count  # type: ignore[method-assign]
    return remote_runner.run_remote(job, lease)


def steady(job: Job, lease: Lease) -> tuple[Outcome, list[Span]]:
    """Sleep for a moment after every chunk, so that a shard takes seconds."""
    return slow(job, lease, 0.02)


def deadly(job: Job, lease: Lease) -> tuple[Outcome, list[Span]]:
    """End the process after the first chunk, which leaves a temporary file in the store."""

    def count(self: source.Source, size: int) -> None:
        os._exit(9)

    source.Source._count = count  # type: ignore[method-assign]
    return remote_runner.run_remote(job, lease)
