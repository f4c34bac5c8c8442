"""What one of the processes does whose rates `cores` adds up."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from paroquant_stream.transform.repack import awq_stripes

KINDS = ("sha256", "memcpy", "new pages", "repack")
COLUMNS = 1024  # words of a row of the packed weight


def make_work(kind: str, size: int, directory: Path) -> Callable[[], object]:
    """A function that handles `size` bytes, a multiple of 32 KiB."""
    data = np.random.default_rng(0).integers(0, 2**32, (size // 4 // COLUMNS, COLUMNS), np.uint32)
    copy, view = np.empty_like(data), data.data

    def write() -> None:
        path = directory / f"cores-{os.getpid()}"
        path.write_bytes(view)
        path.unlink()

    def repack() -> None:
        for _ in awq_stripes(data):
            pass

    work = (lambda: hashlib.sha256(view), lambda: np.copyto(copy, data), write, repack)
    return dict(zip(KINDS, work, strict=True))[kind]


def rate(kind: str, size: int, directory: Path, start: float, seconds: float) -> float:
    """Bytes a second of one process that begins at a time of the monotonic clock."""
    work = make_work(kind, size, directory)
    work()
    time.sleep(max(0, start - time.monotonic()))
    started, done = time.monotonic(), 0
    while time.monotonic() < start + seconds or not done:
        work()
        done += size
    return done / (time.monotonic() - started)
