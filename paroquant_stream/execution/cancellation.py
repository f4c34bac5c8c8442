"""The flag that ends a run's jobs: once one has failed, or the run was interrupted."""

from __future__ import annotations

import threading

from ..errors import RunCancelledError


class Cancellation:
    """A flag that jobs look at after every chunk."""

    def __init__(self, parent: Cancellation | None = None) -> None:
        """Start unset.

        Args:
            parent: A run that this one is a part of; the end of it ends this one too.
        """
        self._stop, self._parent = threading.Event(), parent

    def stop(self) -> None:
        """End the jobs: `check` raises from now on."""
        self._stop.set()

    def check(self) -> None:
        """Return unless the run has ended.

        Raises:
            RunCancelledError: It has, or its parent has.
        """
        if self._stop.is_set():
            raise RunCancelledError("another shard failed or the run was interrupted")
        if self._parent:
            self._parent.check()
