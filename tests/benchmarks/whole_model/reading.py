"""Reads all entries: as fast as the machine does, and to tell whether two runs made the same."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import xxhash

CHUNK = 4 << 20  # bytes that are read at once; larger ones leave the L2 cache
RANGE = 64 << 20  # bytes that a worker reads at a time


def entries(cache: Path) -> list[Path]:
    """Every entry of a cache, by its key."""
    return sorted(cache.glob("v1/entries/*/*.safetensors"))


def read_range(path: Path, start: int, stop: int) -> int:
    """Reads bytes of a file and returns how many there were."""
    buffer, position = memoryview(bytearray(CHUNK)), start
    fd = os.open(path, os.O_RDONLY)
    try:
        while position < stop:
            count = os.preadv(fd, [buffer[: stop - position]], position)
            if not count:
                break
            position += count
    finally:
        os.close(fd)
    return position - start


def read_all(paths: Sequence[Path], executor: Executor, workers: int) -> float:
    """Seconds in which the workers read every byte; they run before the clock does."""
    ranges = [
        (path, start, min(start + RANGE, size))
        for path in paths
        for size in [path.stat().st_size]
        for start in range(0, size, RANGE)
    ]
    list(executor.map(read_range, [paths[0]] * workers, [0] * workers, [0] * workers))
    started = time.perf_counter()
    counts = list(executor.map(read_range, *zip(*ranges, strict=True)))
    seconds = time.perf_counter() - started
    assert sum(counts) == sum(path.stat().st_size for path in paths)
    return seconds


def digest(paths: Sequence[Path], threads: int) -> str:
    """One hash over the names and the bytes of all entries."""
    with ThreadPoolExecutor(threads) as executor:
        hashes = zip(paths, executor.map(_hash, paths), strict=True)
        text = "".join(f"{path.name} {found}\n" for path, found in hashes)
        return xxhash.xxh3_64_hexdigest(text.encode())


def _hash(path: Path) -> str:
    found, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()
