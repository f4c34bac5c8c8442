"""How much memory the machine has, and how much of it is free."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


def physical_memory() -> int:
    """Return the bytes of memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int | None:
    """Return the bytes that Linux can give without swapping, 0 if it does not say; else None."""
    if not _MEMINFO.exists():
        return None
    with suppress(OSError, KeyError, ValueError):
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) << 10
    return 0
