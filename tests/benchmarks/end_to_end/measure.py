"""How the benchmark measures: whole processes, in turn, each after the same pause.

The pause is for virtual machines that give free memory back to their host within seconds: memory
that a process has just freed costs its successor nothing, all other memory costs up to 2 s a GB.
With a pause before each, every process finds the same.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

LOAD = """
import sys, time
from paroquant_stream import load
load(sys.argv[1], cache_dir=sys.argv[2], jobs=int(sys.argv[3]) if sys.argv[3:] else None)
"""
RAW = """
import sys, pathlib
import mlx.core as mx, mlx_lm.utils
weights = {}
for path in sorted(pathlib.Path(sys.argv[2]).rglob("entries/*/*.safetensors")):
    weights.update(mx.load(str(path)))
mx.eval(weights)
mlx_lm.utils.load_tokenizer(pathlib.Path(sys.argv[1]))
"""
IMPORTS = """
import sys, pathlib
import mlx.core, mlx_lm.utils
mlx_lm.utils.load_tokenizer(pathlib.Path(sys.argv[1]))
"""
PUBLIC = """
import sys
from paroquant.inference.backends.mlx.load import load
load(sys.argv[1])
"""
PEAK = """
from paroquant_stream.cli.convert import peak_rss_bytes
print(peak_rss_bytes())
"""
"""Ends every script: its output is its peak memory in bytes."""


@dataclass(frozen=True)
class Run:
    """One process, from start to end."""

    wall: float
    user: float
    system: float
    output: str = ""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage, summed over the threads."""


def timed(function: Callable[[], object]) -> float:
    """Seconds that `function` took."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def process(command: Sequence[str | Path]) -> Run:
    """Runs a command and waits for it. Raises CalledProcessError."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return Run(wall, user, system, done.stdout)


def python(script: str, *arguments: object) -> Run:
    """Runs one of the scripts above."""
    return process([sys.executable, "-c", script + PEAK, *map(str, arguments)])


@dataclass
class Bench:
    """Where the benchmark works, and how patiently."""

    work: Path
    pause: float
    rounds: int

    @property
    def cache(self) -> Path:
        """The cache that is written and removed again and again."""
        return self.work / "cache"

    def settle(self, *warm: Path, cold: Sequence[Path] = ()) -> None:
        """The same start for every process: `warm` in the page cache, `cold` out of it."""
        time.sleep(self.pause)
        for directory in warm:
            for path in directory.rglob("*.safetensors"):
                with path.open("rb") as file:
                    while file.read(16 << 20):
                        pass
        for directory in cold:
            for path in directory.rglob("*.safetensors"):
                fd = os.open(path, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)

    def copy(self, model: Path) -> Run:
        """`cp -r` and sync of the checkpoint."""
        target = self.work / "copy"
        run = process(["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', model, target])
        shutil.rmtree(target)
        return run

    def convert(self, model: Path, jobs: int, keep: bool = False) -> Run:
        """A conversion into an empty cache, with its stages."""
        shutil.rmtree(self.cache, ignore_errors=True)
        run = self.reconvert(model, jobs)
        if not keep:
            shutil.rmtree(self.cache)
        return run

    def reconvert(self, model: Path, jobs: int) -> Run:
        """A conversion into the cache as it is, with its stages."""
        trace = self.work / "trace.json"
        command = [sys.executable, "-m", "paroquant_stream.convert", model, "--json"]
        command += ["--jobs", str(jobs), "--cache-dir", self.cache, "--trace", trace]
        run = process(command)
        return Run(run.wall, run.user, run.system, run.output, stages(trace))


def stages(trace: Path) -> dict[str, float]:
    """Seconds of each stage of a trace, summed over its threads, without the stages inside it."""
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    own: dict[str, float] = {}
    for tid in {event["tid"] for event in events}:
        inside: list[dict[str, float]] = []
        mine = [event for event in events if event["tid"] == tid]
        for event in sorted(mine, key=lambda event: (event["ts"], -event["dur"])):
            while inside and event["ts"] >= inside[-1]["stop"]:
                inside.pop()
            own[event["name"]] = own.get(event["name"], 0) + event["dur"] / 1e6
            if inside:
                own[inside[-1]["name"]] -= event["dur"] / 1e6
            inside.append({"name": event["name"], "stop": event["ts"] + event["dur"]})
    return own


def ratio(above: Sequence[Run], below: Sequence[Run]) -> float:
    """Median of the ratios of wall seconds, round by round."""
    return median(a.wall / b.wall for a, b in zip(above, below, strict=True))


def print_rounds(measured: dict[str, list[Run]]) -> None:
    """Each round's seconds; a round whose system time is far above the median is marked."""
    for name, runs in measured.items():
        usual = median(run.system for run in runs)
        for run in runs:
            mark = "  <- system time far above the median" if run.system > 1.5 * usual else ""
            print(
                f"  {name:24} wall {run.wall:6.2f}  user {run.user:6.2f}  "
                f"system {run.system:6.2f}{mark}"
            )
