"""What tests send to a worker process in the place of a shard's conversion: one that takes its
time, or one that ends the process midway.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from paroquant_stream.transform import remote_runner as elsewhere
from paroquant_stream.transform import source
from paroquant_stream.transform.task_runner import Job, Outcome

_real = source.Source._count


def slow(job: Job, sign: Path, host: str) -> Outcome:
    """Tells of every tick on stderr and waits."""

    def count(self: source.Source, size: int) -> None:
        os.write(2, b"ticking\n")
        time.sleep(0.2)
        _real(self, size)

    source.Source._count = count  # type: ignore[method-assign]
    return elsewhere.run_remote(job, sign, host)


def deadly(job: Job, sign: Path, host: str) -> Outcome:
    """Ends its process after the first tick, with its temp in the store."""

    def count(self: source.Source, size: int) -> None:
        os._exit(9)

    source.Source._count = count  # type: ignore[method-assign]
    return elsewhere.run_remote(job, sign, host)
