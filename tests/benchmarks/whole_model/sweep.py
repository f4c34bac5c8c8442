"""What is measured of a whole model: conversions by jobs and executors, and what follows them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from paroquant_stream.execution.processes import processes
from tests.benchmarks.end_to_end.measure import (
    IMPORTS,
    LOAD,
    Bench,
    Run,
    process,
    python,
    stages,
)
from tests.benchmarks.whole_model.memory import MemoryWatch
from tests.benchmarks.whole_model.reading import digest, entries, read_all

WAITING = ("shard", "wait for the shard")  # stages in which a run waits for its workers
READERS: dict[str, Callable[[int], AbstractContextManager[Executor]]] = {
    "threads": ThreadPoolExecutor,
    "processes": processes,
}


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    seconds: float
    beside_copy: float | None = None
    """The same, by the seconds of the copy before it."""
    cores: float | None = None
    """Core-seconds, user and system."""
    peak: int | None = None
    """Resident bytes of all processes together."""
    largest: int | None = None
    """Those of the largest."""
    entries: str = ""
    """The digest of all entries."""

    def line(self) -> str:
        """The row in Markdown."""
        cells = [self.what, f"{self.seconds:.2f}"]
        cells.append("" if self.beside_copy is None else f"{self.beside_copy:.2f}")
        cells.append("" if self.cores is None else f"{self.cores:.1f}")
        cells += ["" if n is None else f"{n / 1e6:.0f}" for n in (self.peak, self.largest)]
        return "| " + " | ".join([*cells, self.entries]) + " |"


HEAD = ("", "s", "beside cp -r", "s of cores", "peak RSS, MB", "largest process, MB", "entries")


@dataclass(frozen=True)
class Sweep:
    """A model, and how it is converted."""

    bench: Bench
    model: Path
    threads: int
    """That read and hash the entries."""
    with_stages: bool = False
    """Whether the stages of each conversion are printed."""

    def conversions(self, jobs: Sequence[int], executors: Sequence[str]) -> Iterator[Row]:
        """Convert into an empty cache, each after a copy; the cache of the last one stays."""
        self.bench.copy(self.model)  # not counted: its memory may be new to the machine
        for _ in range(self.bench.rounds):
            for count in jobs:
                for executor in executors:
                    shutil.rmtree(self.bench.cache, ignore_errors=True)
                    self.bench.settle()
                    copy = self.bench.copy(self.model)
                    yield Row("cp -r", copy.wall, cores=copy.user + copy.system)
                    row = self.convert(count, executor)
                    found = digest(entries(self.bench.cache), self.threads)
                    yield replace(row, beside_copy=row.seconds / copy.wall, entries=found)

    def reruns(self, jobs: int, executor: str) -> Iterator[Row]:
        """Run with all entries, read them, and run with all but one."""
        for _ in range(self.bench.rounds):
            yield self.convert(jobs, executor)
        for _ in range(self.bench.rounds):
            yield self._command("cache", "verify")[0]
            yield from self._readings()
        shards = sorted(self.model.glob("*.safetensors"))
        with flipped(shards[len(shards) // 2]):
            yield self.convert(jobs, executor)

    def loads(self, jobs: int) -> Iterator[Row]:
        """Load with an empty cache, after a conversion and after the imports of a load alone."""
        for _ in range(self.bench.rounds):
            shutil.rmtree(self.bench.cache, ignore_errors=True)
            converted = self.convert(jobs, "auto")
            yield converted
            self.bench.settle()
            imported = python(IMPORTS, self.model)
            yield Row("imports", imported.wall)
            shutil.rmtree(self.bench.cache)
            self.bench.settle()
            loaded = python(LOAD, self.model, self.bench.cache, jobs)
            ratio = (loaded.wall - imported.wall) / converted.seconds
            what = f"first load; without imports {ratio:.2f} of the conversion"
            yield Row(what, loaded.wall, cores=loaded.user + loaded.system)

    def convert(self, jobs: int, executor: str) -> Row:
        """Convert what the cache lacks."""
        words = ["--json", "--quiet", "--jobs", jobs, "--executor", executor]
        trace = self.bench.work / "trace.json"
        row, run = self._command("convert", *words, *self.with_stages * ["--trace", trace])
        shards = json.loads(run.output)["shards"]
        count = sum(shard["action"] == "converted" for shard in shards)
        what = f"convert {count} of {len(shards)} shards, {jobs} jobs, {executor}"
        if self.with_stages:
            found = [f"{k} {s:.1f} s" for k, s in stages(trace).items() if k not in WAITING]
            print(what, *sorted(found), sep=", ", file=sys.stderr)
        return replace(row, what=what)

    def _command(self, name: str, *words: object) -> tuple[Row, Run]:
        """Run a command of the package on the model, and watch its memory."""
        arguments = [*words, self.model, "--cache-dir", self.bench.cache]
        self.bench.settle()
        with MemoryWatch() as memory:
            command = [sys.executable, "-m", f"paroquant_stream.{name}", *map(str, arguments)]
            run = process(command)
        what = f"{name} {words[0]}"
        cores, memories = run.user + run.system, (memory.peak, memory.largest)
        return Row(what, run.wall, None, cores, *memories), run

    def _readings(self) -> Iterator[Row]:
        """Read all entries, as a yardstick for their verification."""
        for kind, make in READERS.items():
            with make(self.threads) as executor:
                seconds = read_all(entries(self.bench.cache), executor, self.threads)
            yield Row(f"read by {self.threads} {kind}", seconds)


@contextmanager
def flipped(path: Path) -> Iterator[None]:
    """Another last byte in a file, as long as the body runs."""
    for last in (False, True):
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([byte ^ 1]))
        if not last:
            yield
