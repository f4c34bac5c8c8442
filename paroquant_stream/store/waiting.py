"""A wait for a lock of another run: one line that names the process, once the wait is not short."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from ..log import Logger

logger = Logger(__name__)
PATIENCE = 1.0  # s; a shorter wait is not worth a line
_LOCKS = Path("/proc/locks")


class Wait:
    """One wait for a lock."""

    def __init__(self) -> None:
        self._since, self._logged = time.monotonic(), False

    def notice(self, what: str, locked: Path) -> None:
        """Log that the run waits, once, after `PATIENCE` seconds; called at each attempt.

        Args:
            what: Whose end is waited for.
            locked: The file or directory that is locked.
        """
        if not self._logged and time.monotonic() - self._since >= PATIENCE:
            self._logged = True
            pid = holder(locked)
            who = f"pid {pid}, " if pid else ""
            logger.warning("waiting for %s (%swhich holds %s)", what, who, locked)


def holder(locked: Path) -> int | None:
    """Find the process that holds a lock of a file.

    Args:
        locked: The file or directory.

    Returns:
        Its id; None where the system does not tell, as macOS, a container or a network file system.
    """
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(locked)
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
        for line in _LOCKS.read_text().splitlines():
            fields = line.split()  # number, FLOCK, ADVISORY, WRITE, pid, device:inode, start, end
            if fields[5:6] == [f"{device}:{status.st_ino}"] and int(fields[4]) > 0:
                return int(fields[4])
    return None
