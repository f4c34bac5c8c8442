"""Memory of all processes that a command starts, looked at while it runs. Linux only."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import defaultdict

INTERVAL = 0.05  # seconds between two looks, each of which costs about 2 ms
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PARENT, _PAGES = 1, 21  # fields of /proc/PID/stat after the name, see proc(5)


def resident() -> list[int]:
    """Resident bytes of each process below this one; a page that two share counts for both."""
    sizes, children = {}, defaultdict(list)
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
            sizes[int(name)] = int(fields[_PAGES]) * _PAGE
            children[int(fields[_PARENT])].append(int(name))
    below, found = [*children[os.getpid()]], []
    while below:
        pid = below.pop()
        found.append(sizes[pid])
        below += children[pid]
    return found


class MemoryWatch:
    """Looks at the memory of all processes that are started within its `with` block."""

    def __init__(self) -> None:
        self.peak = 0
        """Bytes of all processes together, at their most."""
        self.largest = 0
        """Bytes of the largest one, at its most."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            sizes = resident()
            self.peak = max(self.peak, sum(sizes))
            self.largest = max(self.largest, *sizes, 0)
