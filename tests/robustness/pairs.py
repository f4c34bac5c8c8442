"""Two commands at once on one model, and what may be left then.

A round either stops the one at a call until the other has ended or waits, or lets both run in turns
of some calls each. What is acceptable:

- A command that ended with 0 did what it says: the model that it converted loads right.
- After both have ended, one more run of one of the drops completes the model, bit for bit.
- `rm` may leave no entries and no shards only if it first looked into the cache after the drop's
  last call: then a dropped model was there, and to remove it is what was asked.
- `prune` never does.
- A load gives the right parameters or one message.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.robustness import faults
from tests.robustness.cuts import CUTS, write_tiny
from tests.robustness.harness import (
    CACHE,
    Ended,
    Fault,
    Model,
    Parameters,
    Running,
    completes,
    differs,
    one_line,
    parameters,
    undisturbed,
    zygote,
)

IDLE = 0.7  # s without a call after which a command waits for the other
HALF = ("--dtype", "float16")
Start = Callable[[Model, Fault], Running]


@dataclass(frozen=True)
class Command:
    """One of the two."""

    name: str
    start: Start
    change: Callable[[Model], Model] = lambda model: model
    """The model as this command sees it: with another cache, or options."""
    drops: bool = False
    converts: bool = False
    """Whether it publishes a conversion."""


def _drop(model: Model, fault: Fault) -> Running:
    return model.start_drop(fault)


def _cache(*argv: str, clock: float = 0) -> Start:
    def start(model: Model, fault: Fault) -> Running:
        named = [*argv, model.directory] if argv[0] == "rm" else argv
        where = ["--cache-dir", model.cache, "-y"]
        return zygote().start(CACHE, *named, *where, fault={**fault, "clock": clock})

    return start


def _elsewhere(model: Model) -> Model:
    return replace(model, cache=model.directory.parent / "other cache")


def _by_another_path(model: Model) -> Model:
    """Where a test has mounted the model's directory a second time: no link tells that."""
    return replace(_elsewhere(model), directory=model.directory.parent / "same")


COMMANDS = {
    command.name: command
    for command in (
        Command("drop", _drop, drops=True, converts=True),
        Command("drop in float16", _drop, lambda m: replace(m, options=HALF), True, True),
        Command("drop into another cache", _drop, _elsewhere, True, True),
        Command("drop in place", _drop, lambda m: replace(m, cache=None), True, True),
        Command("drop in place in float16", _drop,
                lambda m: replace(m, cache=None, options=HALF), True, True),
        Command("drop through another path", _drop, _by_another_path, True, True),
        Command("convert", lambda m, f: m.start(fault=f), converts=True),
        Command("convert into another cache", lambda m, f: m.start(fault=f), _elsewhere, False,
                True),
        Command("load", lambda m, f: m.start_load(fault=f)),
        Command("rm", _cache("rm")),
        Command("prune --orphans", _cache("prune", "--orphans", clock=7200)),
        Command("prune --max-size 1B", _cache("prune", "--max-size", "1B", clock=7200)),
    )
}  # fmt: skip
PAIRS = [("drop", other) for other in COMMANDS if other != "drop through another path"]
PAIRS += [("drop in place", "drop in place"), ("drop in place", "drop in place in float16")]
PAIRS += [("drop in place", "convert"), ("drop in place", "load")]
KNOWN: dict[tuple[str, tuple[str, ...]], Parameters] = {}


@dataclass
class Round:
    """A model, two commands on it, and what became of them."""

    place: Path
    first: Command
    second: Command
    cut: str = "a chain"
    jobs: int = 1
    converted: bool = False
    """Whether the model was converted before, so that there is something to remove."""
    ended: dict[str, Ended] = field(default_factory=dict)

    def __post_init__(self) -> None:
        directory = write_tiny(self.place / "model", CUTS[self.cut])
        self.model = Model(directory, self.place / "cache", self.jobs)
        self.seen = [self.first.change(self.model), self.second.change(self.model)]
        self.right = [self._right(model) for model in self.seen]
        if self.converted:
            assert self.model.convert().code == 0

    def _right(self, model: Model) -> Parameters:
        key = self.cut, model.options
        if key not in KNOWN:
            KNOWN[key] = undisturbed(model)
        return KNOWN[key]

    def _begin(self, index: int, **fault: object) -> Running:
        command, model = (self.first, self.second)[index], self.seen[index]
        under = [model.directory, model.root, self.model.cache]
        log = self.place / f"log {index}"
        calls = faults.CALLS
        return command.start(model, {"under": under, "log": log, "calls": calls, **fault})

    def one_stopped(self, stopped: int, at: int = 1, match: str = "") -> bool:
        """Runs both, one of them (0 or 1) stopped at a call until the other has ended or makes no
        more calls, as it waits; whether it got there.
        """
        until = self.place / "go on"
        one = self._begin(stopped, do="pause", at=at, match=match, until=until)
        fired = one.wait_for_fault()
        other = self._begin(1 - stopped, do="log")
        seen, done = time.monotonic(), 0
        while not other.is_over and time.monotonic() - seen < IDLE:
            time.sleep(0.01)
            if (now := self._changes(1 - stopped)) > done:
                seen, done = time.monotonic(), now
        until.touch()
        self._end(*((one, other) if stopped == 0 else (other, one)))
        return fired

    def in_turns(self, seed: int) -> None:
        """Runs both at once, each waiting now and then for the other to make some calls."""
        often = random.Random(seed).choice([0.03, 0.1, 0.3])
        begun = [
            self._begin(
                i, do="turns", seed=seed + i, often=often, other=self.place / f"log {1 - i}"
            )
            for i in (0, 1)
        ]
        self._end(*begun)

    def _end(self, first: Running, second: Running) -> None:
        self.ended = {"first": first.wait(), "second": second.wait()}

    @property
    def story(self) -> str:
        """How both ended, and what is left."""
        codes = ", ".join(f"{k} {one_line(e)}" for k, e in self.ended.items())
        return f"{codes}; shards left: {len(self.model.sources)}"

    def problem(self) -> str:
        """What is not acceptable; empty when all is."""
        for index, ended in enumerate(self.ended.values()):
            command, model, right = (self.first, self.second)[index], *self._of(index)
            if ended.code not in (0, 1) or "Traceback" in ended.err:
                return f"{command.name} ended badly: {self.story}"
            if command.name == "load" and ended.code == 0 and parameters(ended) != right:
                return f"a load gave WRONG parameters: {self.story}"
            removed = self._may_be_removed()
            if command.converts and ended.code == 0 and not removed and self._needs_its_own(index):
                why = differs(model, right)
                if why:
                    return f"{command.name} ended with 0, and {why}: {self.story}"
        return self._completed()

    def _of(self, index: int) -> tuple[Model, Parameters]:
        return self.seen[index], self.right[index]

    def _needs_its_own(self, index: int) -> bool:
        """Whether nothing but this command's own conversion can serve it."""
        return (self.first, self.second)[index].drops or self.seen[0].cache == self.seen[1].cache

    def _completed(self) -> str:
        why = []
        for index, command in enumerate((self.first, self.second)):
            if command.drops:
                verdict = completes(*self._of(index))
                if verdict:
                    return ""
                why.append(f"{command.name}: {verdict.why}")
        if self._may_be_removed() and not self.model.sources:
            return ""
        return f"nothing completes the model: {'; '.join(why)}; {self.story}"

    def _may_be_removed(self) -> bool:
        """Whether `rm` began to look when the drop was over, so that it was asked to remove it."""
        if self.second.name != "rm" or self.ended["second"].code:
            return False
        drop, rm = (self._times(index) for index in (0, 1))
        return bool(drop and rm) and rm[0] > drop[-1]

    def _times(self, index: int) -> list[float]:
        return [float(line.partition("\t")[0]) for line in self._lines(index)]

    def _changes(self, index: int) -> int:
        """How many calls a command has made, without those by which it waits for a lock."""
        waiting = ("open", "flock", "close", "mkdir")  # filelock makes its directory each time
        return sum(line.split("\t")[1] not in waiting for line in self._lines(index))

    def _lines(self, index: int) -> list[str]:
        log = self.place / f"log {index}"
        return log.read_text(errors="replace").splitlines() if log.exists() else []


def first_removal(cut: str, place: Path, command: Command, converted: bool) -> int:
    """The number of the call after the one that removes the first shard."""
    model = command.change(Model(write_tiny(place / "model", CUTS[cut]), place / "cache"))
    if converted:
        assert Model(model.directory, place / "cache").convert().code == 0
    log = place / "log"
    under = [model.directory, model.root, place / "cache"]
    assert model.drop({"under": under, "do": "log", "log": log, "calls": faults.CALLS}).code == 0
    names = ("unlink", "remove", "rename", "replace")
    lines = [line.split("\t")[1:] for line in log.read_text().splitlines()]
    return 1 + next(
        number
        for number, (call, *paths) in enumerate(lines, 1)
        if call in names and any(path.startswith(f"{model.directory}/model-") for path in paths)
    )
