"""A fault at every call in turn, each time on a fresh copy; and a table of what became of it.

python -m tests.robustness.sweep [--models NAME...] [--jobs N...] [--places cache 'in place']
    [--starts cold converted] [--faults kill tear ...] [--stride N] [--calls changes|all]
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.robustness import cuts, faults
from tests.robustness.harness import (
    Ended,
    Fault,
    Model,
    Parameters,
    Verdict,
    close_zygote,
    completes,
    differs,
    one_line,
    prune,
    scratch,
    undisturbed,
)

KILL_WORKERS = """
import signal
for name in os.listdir("/proc"):
    if name.isdigit():
        try:
            state = open("/proc/" + name + "/stat").read().rpartition(")")[2].split()
        except OSError:
            continue
        tracker = b"resource_tracker" in open("/proc/" + name + "/cmdline", "rb").read()
        if int(state[1]) == os.getpid() and not tracker:  # no worker; prints a traceback when lost
            os.kill(int(name), signal.SIGKILL)
"""
FAULTS: dict[str, Fault] = {
    "kill": {"do": "kill"},
    "tear": {"do": "tear", "calls": ["write", "pwrite"]},
    "SIGINT": {"do": "signal", "signal": "SIGINT"},
    "SIGTERM": {"do": "signal", "signal": "SIGTERM"},
    "ENOSPC": {"do": "fail", "errno": "ENOSPC"},
    "ENOSPC from then on": {"do": "fail", "errno": "ENOSPC", "forever": True},
    "EIO": {"do": "fail", "errno": "EIO"},
    "workers killed": {"do": "run", "script": KILL_WORKERS},
}
STOPS = {"kill": {-9}, "tear": {-9}, "SIGINT": {0, 130}, "SIGTERM": {0, 143}}
"""Exit codes that a run may have after the fault; 0 and 1 for all others."""
PLACES = ("cache", "in place", "a snapshot")
"""Where the conversion goes; `a snapshot` is of the Hub's cache, and goes to a cache, too."""
STARTS = ("cold", "converted")
Prepare = Callable[[Path], Path]


@dataclass(frozen=True)
class Setting:
    """What is dropped, and what befalls it."""

    name: str
    """Of a cut or a committed checkpoint."""
    jobs: int = 1
    place: str = "cache"
    fault: str = "kill"
    start: str = "cold"
    """`converted`: by an earlier run, so that nothing is left but to drop."""
    between: str = ""
    """What happens before the rerun: `load`, `convert`, `prune` two hours later, or `kill`, a rerun
    that is killed too.
    """
    calls: tuple[str, ...] = faults.CHANGES
    options: tuple[str, ...] = ()

    def model(self, place: Path) -> Model:
        """The model of this setting in a new directory."""
        directory = cuts.write(place / "model", self.name)
        if self.place == "a snapshot":
            directory = cuts.as_snapshot(place, directory)
        cache = None if self.place == "in place" else place / "cache"
        return Model(directory, cache, self.jobs, self.options)


@dataclass
class Tally:
    """What became of a setting."""

    setting: Setting
    fired: int = 0
    lost: int = 0
    """Cut points after which nothing brings the model back."""
    incomplete: int = 0
    """Cut points after which the rerun was not enough, the lost ones among them."""
    untidy: int = 0
    """Runs that ended otherwise than they may: a traceback, another exit code."""
    reasons: list[str] = field(default_factory=list)
    """Why, each with its cut point."""

    def add(self, point: int, ended: Ended, verdict: Verdict) -> None:
        """Counts a cut point."""
        self.fired += 1
        codes = STOPS.get(self.setting.fault, {0, 1})
        if ended.code not in codes or "Traceback" in ended.err:
            self.untidy += 1
            why = f"untidy ({ended.code}) {ended.message}"
            self.reasons.append(f"{self._where(point, ended)}: {why}")
        if not verdict:
            self.incomplete += 1
            self.lost += verdict.lost
            self.reasons.append(f"{self._where(point, ended)}: {verdict.why}")

    def _where(self, point: int, ended: Ended) -> str:
        """The call, its path without what differs from copy to copy."""
        _, call, *paths = ended.fired[0].split(" ")
        return f"{point} ({call} {' '.join(path.partition(f'/{point}/')[2] for path in paths)})"

    @property
    def row(self) -> tuple[str, ...]:
        """A line of the table."""
        s = self.setting
        numbers = (self.fired, self.lost, self.fired - self.incomplete, self.untidy)
        return (s.name, str(s.jobs), s.place, s.start, s.fault, s.between or "-",
                *map(str, numbers))  # fmt: skip


HEADS = ("MODEL", "JOBS", "PLACE", "START", "FAULT", "BETWEEN")
HEADS += ("FIRED", "LOST", "COMPLETED", "UNTIDY")


def sweep(setting: Setting, points: Iterable[int], workers: int = 2) -> Tally:
    """The fault at each of these calls, until one is beyond the last call."""
    tally, over, lock = Tally(setting), threading.Event(), threading.Lock()
    with scratch() as place:
        right = undisturbed(setting.model(place / "whole"))

        def one(point: int) -> None:
            if over.is_set():
                return
            outcome = cut(setting, right, point, place / str(point))
            if outcome is None:
                over.set()
                return
            with lock:
                tally.add(point, *outcome)

        with ThreadPoolExecutor(workers) as pool:
            for _ in _limited(pool, one, points, over):
                pass
    return tally


def _limited(
    pool: ThreadPoolExecutor,
    work: Callable[[int], None],
    points: Iterable[int],
    over: threading.Event,
) -> Iterator[None]:
    """The results of `work`, a few points ahead of what is known to be the end."""
    for batch in _batches(points, 4):
        yield from pool.map(work, batch)
        if over.is_set():
            return


def _batches(points: Iterable[int], size: int) -> Iterator[list[int]]:
    source = iter(points)
    while batch := list(itertools.islice(source, size)):
        yield batch


def cut(
    setting: Setting, right: Parameters, point: int, place: Path
) -> tuple[Ended, Verdict] | None:
    """What a fault at one call leads to; None when the run is over before that call."""
    place.mkdir()
    try:
        model = setting.model(place)
        if setting.start == "converted":
            assert model.convert().code == 0
        fault = {"calls": setting.calls, **FAULTS[setting.fault], "at": point}
        if fault["do"] == "fail":  # one that cannot fail would look like the end of the run
            fault["calls"] = [call for call in fault["calls"] if call not in faults.NEVER_FAIL]
        ended = model.drop(model.watched(**fault))
        if not ended.fired:
            assert ended.code == 0, f"nothing fired, and yet: {ended.err}"
            return None
        return ended, after(setting, model, right, point)
    finally:
        shutil.rmtree(place)


def after(setting: Setting, model: Model, right: Parameters, point: int) -> Verdict:
    """Whether the model can be completed, after what happens between."""
    if setting.between == "load" and (why := differs(model, right)):
        return Verdict(f"before any rerun, {why}", lost="WRONG" in why)
    if setting.between == "convert":
        verdict = completes(model, right, "--quiet", "--json")
        if not verdict:
            return verdict
    if setting.between == "kill":
        model.drop(model.watched(do="kill", at=1 + point * 7 % 40, calls=setting.calls))
    if setting.between == "prune":
        for rule in (("--orphans",), ("--max-size", "1B")):
            done = prune(model, *rule)
            if done.code:
                return Verdict(f"prune {rule[0]} fails: {one_line(done)}")
    return completes(model, right)


def every(stride: int = 1, first: int = 1) -> Iterable[int]:
    """Each `stride`-th call, from the `first` on."""
    return itertools.count(first, stride)


def table(tallies: Sequence[Tally]) -> str:
    """The rows under their heads, and a sum."""
    rows = [HEADS, *(tally.row for tally in tallies)]
    sums = [sum(int(t.row[i]) for t in tallies) for i in range(6, len(HEADS))]
    rows.append(("all", *[""] * 5, *map(str, sums)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def reasons(tallies: Sequence[Tally], most: int = 3) -> str:
    """Why models were not completed: how often, and where for example."""
    lines = []
    for tally in tallies:
        kinds: dict[str, list[str]] = {}
        for reason in tally.reasons:
            kinds.setdefault(_kind(reason), []).append(reason)
        for same in sorted(kinds.values(), key=len, reverse=True)[:most]:
            lines.append(f"{', '.join(tally.row[:6])}: {len(same)} x, one at {same[0][:500]}")
    return "\n".join(lines)


def _kind(reason: str) -> str:
    """A reason without its point, numbers and paths."""
    return re.sub(r"/\S*|\d+", "", reason.partition("): ")[2])[:80]


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.robustness.sweep")
    parser.add_argument("--models", nargs="+", default=list(cuts.CUTS))
    parser.add_argument("--public", action="store_true", help="all committed checkpoints instead")
    parser.add_argument("--jobs", nargs="+", type=int, default=[1])
    parser.add_argument("--places", nargs="+", choices=PLACES, default=["cache"])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=["cold"])
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=["kill"])
    parser.add_argument("--between", nargs="+", default=[""])
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--calls", choices=["changes", "all"], default="changes")
    options = parser.parse_args()
    calls = faults.CHANGES if options.calls == "changes" else faults.CALLS
    tallies = []
    models = cuts.PUBLIC if options.public else options.models
    chosen = itertools.product(models, options.jobs, options.places, options.faults,
                               options.starts, options.between)  # fmt: skip
    started = time.monotonic()
    for name, jobs, place, fault, start, between in chosen:
        setting = Setting(name, jobs, place, fault, start, between, calls)
        tallies.append(sweep(setting, every(options.stride)))
        print("  ".join(tallies[-1].row), file=sys.stderr, flush=True)
    close_zygote()
    print(table(tallies))
    print(reasons(tallies))
    print(f"{time.monotonic() - started:.0f} s")
    return int(any(tally.incomplete or tally.untidy for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
