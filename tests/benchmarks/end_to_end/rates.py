"""What one core and the disk of this machine do: the numbers that the simulation is driven by."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import xxhash

from paroquant_stream.checkpoint.checkpoint import open_checkpoint
from paroquant_stream.checkpoint.config import ModelConfig
from paroquant_stream.checkpoint.layout import Layout
from paroquant_stream.checkpoint.quantization import Quantization
from paroquant_stream.files.folder import Folder
from paroquant_stream.files.new_file import NewFile
from paroquant_stream.plan.planner import Plan, make_plan
from paroquant_stream.plan.task import Operation
from paroquant_stream.store.store import Store
from paroquant_stream.transform.quantize import quantize_rows
from paroquant_stream.transform.repack import awq_biases, awq_stripes, group_scales
from paroquant_stream.transform.source import Source
from paroquant_stream.transform.unit import Unit
from tests.benchmarks.end_to_end.checkpoint import TOY, make_checkpoint
from tests.benchmarks.end_to_end.measure import LOAD, Bench, process, python, timed
from tests.benchmarks.simulation.flow import BLOCK, Rates

Seconds = dict[tuple[str, tuple[int, ...]], float]


def usual(function: Callable[[], object], rounds: int = 7) -> float:
    """Median core-seconds of a call; time in which others had the core does not count."""
    found = []
    for _ in range(rounds):
        before = time.process_time()
        function()
        found.append(time.process_time() - before)
    return median(found)


def busy_seconds() -> float:
    """Core-seconds that all processes have used since the machine started; 0 without /proc."""
    with contextlib.suppress(OSError):
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(word) for word in file.readline().split()[1:]]
        return (sum(ticks[:8]) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # less idle, wait
    return 0.0


def wait_for_quiet(patience: float = 4) -> None:
    """Returns when others use less than a tenth of a core, or when patience ends."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        before = busy_seconds()
        time.sleep(1)
        if busy_seconds() - before < 0.1:
            return


def words(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**32, shape, np.uint32)


def halves(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.001, 0.02, shape).astype(np.float16)


def operation_seconds(plans: Iterable[Plan]) -> Seconds:
    """Seconds of a slice, for every kind and shape of operation that the plans have."""
    seconds: Seconds = {}
    for plan in plans:
        for operation in (op for task in plan.tasks for op in task.operations):
            key = (operation.kind, operation.slices[0][0].shape)
            if key not in seconds and operation.kind not in ("copy", "quantize"):
                seconds[key] = slice_seconds(operation)
    return seconds


def slice_seconds(operation: Operation) -> float:
    """Seconds of one slice; its arrays were just used, as those that were just read."""
    shape = operation.slices[0][0].shape
    if operation.kind == "awq_weight":
        data = words(shape)
        return usual(lambda: [None for _ in awq_stripes(data)])
    if operation.kind == "awq_biases":
        zeros, scales = words(shape), halves((shape[0], shape[1] * 8))
        return usual(lambda: np.ascontiguousarray(awq_biases(scales, zeros)))
    if operation.kind == "group_scales":
        scales = halves(shape)
        return usual(lambda: np.ascontiguousarray(group_scales(scales)))
    raise NotImplementedError(operation.kind)


def cpu_rates() -> dict[str, float]:
    """Bytes a second of one core: hash, check, seal and quantize."""
    size = 32 * BLOCK
    data = memoryview(words((size // 4,))).cast("B")
    block = memoryview(bytearray(BLOCK))
    chunks = [data[start : start + BLOCK] for start in range(0, size, BLOCK)]

    def seal(chunk: memoryview) -> None:
        xxhash.xxh3_128(chunk)
        block[:] = chunk

    def digest(chunk: memoryview) -> None:
        hashlib.sha256(chunk)
        xxhash.xxh3_128(chunk)

    work = {"hash": digest, "check": xxhash.xxh3_128, "seal": seal}
    rates = {
        name: size / usual(lambda f=function: [f(chunk) for chunk in chunks])
        for name, function in work.items()
    }
    values = np.random.default_rng(0).normal(0, 0.05, (2048, 8192)).astype(np.float16)
    pieces = np.array_split(values, values.nbytes >> 21)
    seconds = usual(lambda: [quantize_rows(piece, "F16", 128, 4) for piece in pieces])
    return rates | {"quantize": values.nbytes / seconds}


def two_cores() -> float:
    """How many cores two threads get, of the mixture that a conversion is."""
    matrices = [words((8192, 1024)) for _ in range(2)]

    def work(matrix: np.ndarray) -> None:
        for _ in range(3):
            hashlib.sha256(matrix)
            for stripe in awq_stripes(matrix):
                xxhash.xxh3_128(stripe)

    one = usual(lambda: work(matrices[0]))
    with ThreadPoolExecutor(2) as pool:  # the best of 9, for others only take
        both = min(timed(lambda: list(pool.map(work, matrices))) for _ in range(9))
    return min(2 * one / both, 2)


def read_rates(directory: Path, size: int = 512 << 20) -> tuple[float, float]:
    """Bytes a second of one core out of the page cache, and of the disk alone."""
    buffer = memoryview(bytearray(64 << 20))
    path = directory / "read"
    with path.open("wb") as file:
        for _ in range(0, size, len(buffer)):
            file.write(buffer)
        os.fsync(file.fileno())
    fd = os.open(path, os.O_RDONLY)
    try:

        def read() -> None:
            for start in range(0, size, len(buffer)):
                os.preadv(fd, [buffer], start)

        def away() -> None:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

        read()
        cached = usual(read)
        cold = []
        for _ in range(3):
            away()
            cold.append(timed(read))
    finally:
        os.close(fd)
        path.unlink()
    return size / cached, size / max(median(cold) - cached, 1e-9)


def part_seconds(plan: Plan, model: Path, work: Path) -> float:
    """Seconds of a part's read beside its bytes: the smallest part of a small shard."""
    parts = [p for op in plan.tasks[0].operations for s in op.slices for p in s]
    part = min(parts, key=lambda part: part.stop - part.start)
    unit = Unit(plan.tasks[0].shard, model, Store(work), (), None)
    source = Source(unit, lambda _: None)
    try:
        return usual(lambda: [source.whole(part) for _ in range(1000)]) / 1000
    finally:
        source.close()


def write_rates(directory: Path, size: int = 512 << 20) -> tuple[float, float, float]:
    """Bytes a second of one stream and of two to the disk, and seconds to publish a file."""
    data = memoryview(words((BLOCK // 4,))).cast("B")
    published = []

    def stream(name: str) -> None:
        with Folder.open(directory) as folder, Folder.open(directory / "entries") as entries:
            file = NewFile(folder, name, size, 0o600)
            for _ in range(size // BLOCK):
                file.write(data)
            file._writer.flush()
            published.append(timed(lambda: file.publish(entries, name)))
            file.discard()

    def clear() -> None:
        shutil.rmtree(directory / "entries", ignore_errors=True)
        (directory / "entries").mkdir()

    one, two = [], []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            clear()
            one.append(size / (timed(lambda: stream("a")) - published[-1]))
            clear()
            both = timed(lambda: list(pool.map(stream, "ab")))
            two.append(2 * size / (both - max(published[-2:])))
    shutil.rmtree(directory / "entries")
    return median(one), max(median(two), median(one)), median(published)


def fresh_seconds(pause: float, size: int = 256 << 20) -> float:
    """Seconds a byte of memory that no process had for a while."""

    def touch() -> None:
        memory = np.empty(size, np.uint8)
        memory[::4096] = 1

    found = []
    for _ in range(3):
        time.sleep(pause)
        found.append(timed(touch))
    return median(found) / size


def start_seconds(bench: Bench, model: Path) -> tuple[float, float, float]:
    """Seconds to convert next to nothing, to find nothing to do, and to load next to nothing."""
    command = [sys.executable, "-m", "paroquant_stream.convert", model, "--quiet"]
    command += ["--cache-dir", bench.cache]
    converts = []
    for _ in range(5):
        shutil.rmtree(bench.cache, ignore_errors=True)
        converts.append(process(command).wall)
    nothing = median(process(command).wall for _ in range(5))
    load = median(python(LOAD, model, bench.cache).wall for _ in range(3))
    shutil.rmtree(bench.cache)
    return median(converts), nothing, load


@dataclass(frozen=True)
class Machine:
    """What was measured here."""

    rates: Rates
    cores: float
    """How many cores two threads get."""
    read: float
    """Bytes a second of the disk."""
    write: float
    """Bytes a second of one stream to the disk."""
    writes: float
    """The same of two."""
    nothing: float
    """Seconds of a conversion that has nothing to do."""


def measure_machine(bench: Bench, plans: Iterable[Plan]) -> Machine:
    """Everything above."""
    toy = bench.work / "toy"
    make_checkpoint(toy, shards=1, **TOY)
    headers = open_checkpoint(ModelConfig.read(toy), lambda _: False).headers()
    plan = make_plan(headers, Layout.AUTOAWQ, Quantization(4, 128))
    wait_for_quiet()
    cores = cpu_rates()
    seconds = operation_seconds([plan, *plans])
    wait_for_quiet()
    pair = two_cores()
    read, disk = read_rates(bench.work)
    one, two, fsync = write_rates(bench.work)
    wait_for_quiet()
    start, nothing, load = start_seconds(bench, toy)
    each = part_seconds(plan, toy, bench.work)
    fresh = fresh_seconds(bench.pause)
    rates = Rates(read, **cores, seconds=seconds, slice=each, fresh=fresh, fsync=fsync,
                  start=start, load=load)  # fmt: skip
    return Machine(rates, pair, disk, one, two, nothing)


def machine_text(here: Machine) -> str:
    """The rates, in lines."""
    rates = here.rates
    shapes = ", ".join(
        f"{shape[0]}x{shape[1] * 8} {shape[0] * shape[1] * 4 / seconds / 1e9:.2f}"
        for (kind, shape), seconds in rates.seconds.items()
        if kind == "awq_weight" and shape[0] >= 1024
    )
    return (
        f"one core, GB/s: read {rates.read / 1e9:.1f}, hash {rates.hash / 1e9:.2f}, read again "
        f"{rates.check / 1e9:.1f}, seal {rates.seal / 1e9:.1f}, quantize "
        f"{rates.quantize / 1e9:.2f}\n  repack {shapes}\n"
        f"two threads get {here.cores:.2f} cores; disk, GB/s: read {here.read / 1e9:.2f}, write "
        f"{here.write / 1e9:.2f}, two streams {here.writes / 1e9:.2f}; fsync "
        f"{rates.fsync * 1e3:.0f} ms\n"
        f"fresh memory {rates.fresh * 1e9:.2f} s a GB; a part {rates.slice * 1e6:.0f} us; start "
        f"{rates.start:.2f} s, nothing to do {here.nothing:.2f} s, load {rates.load:.2f} s"
    )
