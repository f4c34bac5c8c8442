"""Prints how the cores of a machine add up: GB/s of 1, 2, 4 ... processes together.

    python -m tests.benchmarks.whole_model.cores [--processes 1 2 4 8 16] [--work /dev/shm]

sha256      hashing: cores alone
memcpy      copying 128 MB to another place: memory
new pages   writing a new file, by default into a tmpfs: the kernel's allocation of pages
repack      the 4-bit repack of a conversion: cores and caches

Steal is the share of the time of all cores that the host of a virtual machine gave to others.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import Executor
from pathlib import Path

from paroquant_stream.execution.processes import processes
from tests.benchmarks.whole_model.rate import KINDS, rate


def cpu_times() -> list[int]:
    """Ticks of all cores: user, nice, system, idle, iowait, irq, softirq, steal; see proc(5)."""
    with open("/proc/stat", encoding="ascii") as file:
        return [int(word) for word in file.readline().split()[1:9]]


def together(executor: Executor, count: int, how: tuple[str, int, Path, float, float]) -> str:
    """The rate of several processes together, for the table; `how`: as for `rate`."""
    before = cpu_times()
    total = sum(executor.map(rate, *zip(*[how] * count, strict=True)))
    ticks = [after - since for since, after in zip(before, cpu_times(), strict=True)]
    steal = f" (steal {ticks[7] / sum(ticks):.0%})" if ticks[7] else ""
    return f"{total / 1e9:.2f}{steal}"


def main(argv: list[str] | None = None) -> int:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    counts = [n for n in (1, 2, 4, 8, 16) if n <= (os.cpu_count() or 1)]
    parser.add_argument("--processes", type=int, nargs="+", default=counts)
    parser.add_argument("--seconds", type=float, default=2, help="for each figure")
    parser.add_argument("--delay", type=float, default=2, help="until all have their data")
    parser.add_argument("--size", type=int, default=128 << 20, help="bytes of a call")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"), help="for new pages")
    arguments = parser.parse_args(argv)
    print("| GB/s of N processes | " + " | ".join(map(str, arguments.processes)) + " |")
    print("|---" * (1 + len(arguments.processes)) + "|")
    with processes(max(arguments.processes)) as executor:
        for kind in KINDS:
            cells = []
            for count in arguments.processes:
                start = time.monotonic() + arguments.delay
                how = (kind, arguments.size, arguments.work, start, arguments.seconds)
                cells.append(together(executor, count, how))
            print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
