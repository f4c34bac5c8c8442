"""A small simulation: generators that use resources, which all their users share evenly.

A process is a generator. It yields `(resource, amount)` to use a resource until `amount` is done,
a `Gate` to take one of its places, or a process to wait for its end.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import count
from math import inf
from typing import Any

Flow = Generator[Any, None, None]


@dataclass(eq=False)
class Gate:
    """Places, given in the order in which they are asked for."""

    free: int = 0
    waiting: deque[Process] = field(default_factory=deque)


@dataclass(eq=False)
class Shared:
    """`capacity` a second for all users together, at most `each` for one: bytes or core-seconds.
    A disk or link serves `at_once` of its users and lets the others queue, as devices do with
    requests; workers that began together would otherwise stay in step for ever.

    Equal shares mean one clock for all users, which runs at the share: a user is done when the
    clock has come as far as its amount, so no user is touched when others come or go.
    """

    capacity: float
    each: float = inf
    at_once: int = 1 << 30
    done: float = 0
    """The sum of the amounts that were finished."""
    busy: float = 0
    """Seconds with any user."""
    clock: float = 0
    users: list[tuple[float, int, float, Process]] = field(default_factory=list)
    queue: deque[tuple[float, Process]] = field(default_factory=deque)

    def rate(self) -> float:
        """What every user gets."""
        return min(self.each, self.capacity / len(self.users))

    def left(self) -> float:
        """Seconds until the next user is done."""
        return max(self.users[0][0] - self.clock, 0) / self.rate() if self.users else inf

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        if self.users:
            self.clock += seconds * self.rate()
            self.busy += seconds


@dataclass(eq=False)
class Process:
    """A flow that was started."""

    flow: Flow
    ended: bool = False
    waiting: list[Process] = field(default_factory=list)


class Simulation:
    """Runs processes until all have ended."""

    def __init__(self) -> None:
        self.now = 0.0
        self._alive = 0
        self._ready: deque[Process] = deque()
        self._busy: dict[Shared, None] = {}  # in the order of first use
        self._order = count()

    def start(self, flow: Flow) -> Process:
        """A new process, from now on."""
        process = Process(flow)
        self._alive += 1
        self._ready.append(process)
        return process

    def release(self, gate: Gate) -> None:
        """Gives a place to who waits longest, or keeps it for the next."""
        if gate.waiting:
            self._ready.append(gate.waiting.popleft())
        else:
            gate.free += 1

    def run(self) -> float:
        """Seconds until every process has ended. Raises RuntimeError if one waits for ever."""
        while True:
            while self._ready:
                self._step(self._ready.popleft())
            if not self._busy:
                break
            first = min(self._busy, key=Shared.left)
            seconds = first.left()
            self.now += seconds
            for resource in self._busy:
                resource.advance(seconds)
            _, _, amount, process = heapq.heappop(first.users)
            first.done += amount
            if first.queue:
                self._serve(first, *first.queue.popleft())
            if not first.users:
                del self._busy[first]
            self._ready.append(process)
        if self._alive:
            raise RuntimeError(f"{self._alive} processes wait for ever")
        return self.now

    def _step(self, process: Process) -> None:
        """Runs a process to its next wait or its end."""
        for expected in process.flow:
            if isinstance(expected, Gate):
                if not expected.free:
                    expected.waiting.append(process)
                    return
                expected.free -= 1
            elif isinstance(expected, Process):
                if not expected.ended:
                    expected.waiting.append(process)
                    return
            else:
                resource, amount = expected
                if len(resource.users) < resource.at_once:
                    self._serve(resource, amount, process)
                else:
                    resource.queue.append((amount, process))
                return
        process.ended = True
        self._alive -= 1
        self._ready.extend(process.waiting)

    def _serve(self, resource: Shared, amount: float, process: Process) -> None:
        """Makes a process a user of the resource."""
        user = (resource.clock + amount, next(self._order), amount, process)
        heapq.heappush(resource.users, user)
        self._busy[resource] = None
