"""The choice between threads and processes, by how much there is to do."""

from __future__ import annotations

import logging
import sys
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Executor

logger = logging.getLogger(__name__)
MIN_BYTES = 1 << 30  # of source shards; below, starting the processes costs more than they save
MIN_JOBS = 2


class Automatic(ExitStack):
    """Worker processes that are started once a run has enough work, and shared by later runs.

    They end with the `with` block.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._pool: Executor | None = None
        self._tried = False

    def choose(self, jobs: int, size: int) -> Executor | None:
        """Return where to convert shards.

        Args:
            jobs: How many units are converted at once.
            size: The bytes of the shards that are not surely converted already.

        Returns:
            This process and others, or None for threads of this process.
        """
        if jobs < MIN_JOBS or size < MIN_BYTES or not _can_start():
            return None
        with self._lock:
            if not self._tried:
                self._tried = True  # one pool, or one warning, for several models
                from .eager_processes import EagerProcesses  # late: most runs need none of it
                from .processes import processes

                try:
                    self._pool = self.enter_context(processes(jobs, EagerProcesses))
                except OSError as error:
                    logger.warning("no worker processes, so threads convert: %s", error)
            return self._pool


def _can_start() -> bool:
    """Return whether this interpreter can be started again; one in a bundle is no Python."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)
