"""The converter's flow as processes of the simulation: what waits for what, as the product does it.

A shard holds one of its host's places. It reads, hashes and converts in the order of the entry; a
thread of its own writes blocks of 4 MB, three on their way; with a place to spare the hash runs
beside the conversion and embeddings are quantized by two. What has been read once is in the page
cache.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, inf

from paroquant_stream.files.tensor_writer import file_size, lay_out
from paroquant_stream.plan.task import Part, Task
from tests.benchmarks.simulation.fluid import Flow, Gate, Shared, Simulation

BLOCK, BLOCKS = 4 << 20, 3
BATCH, READERS = 32 << 20, 4  # of `mx.load`


@dataclass(frozen=True)
class Rates:
    """What one core does, and what every process costs before it works."""

    read: float
    """Bytes a second out of the page cache."""
    hash: float
    """SHA-256 and XXH3 of the source, bytes a second."""
    check: float
    """XXH3 of what is read again, bytes a second."""
    seal: float
    """XXH3 of the entry and the copy into blocks, bytes a second."""
    quantize: float
    """Bytes of an embedding a second."""
    seconds: dict[tuple[str, tuple[int, ...]], float]
    """Of one slice of an operation, by kind and the shape of its first part."""
    slice: float
    """Seconds that every read of a part costs beside its bytes."""
    fresh: float
    """Seconds a byte of memory that was never touched."""
    fsync: float
    """Seconds to make an entry durable and give it its name."""
    start: float
    """Seconds of a conversion of next to nothing."""
    load: float
    """Seconds of a load of next to nothing."""


@dataclass(eq=False)
class Host:
    """Cores, disk or link, and the places of `--jobs`."""

    jobs: int
    cores: Shared
    source: Shared | None
    """Where bytes come from that were not read before; None for the page cache."""
    target: Shared
    backed: bool = False
    """Whether fresh memory costs nothing."""
    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Core-seconds."""
    waiting: int = 0
    _used: int = 0

    def __post_init__(self) -> None:
        self.places = Gate(self.jobs)

    def work(self, stage: str, seconds: float) -> tuple[Shared, float]:
        """One core for so long."""
        self.stages[stage] += seconds
        return self.cores, seconds

    def first_use(self) -> bool:
        """Whether a place is taken that has no memory yet."""
        self._used += 1
        return self._used <= self.jobs and not self.backed


@dataclass
class Reading:
    """How far a shard is hashed and read: `source.Source` in numbers."""

    hashed: int = 0
    seen: int = 0
    ahead: int = 0
    """Bytes read beyond `seen`, which who comes there finds in the page cache."""
    alone: bool = True
    """Whether the conversion hashes too."""
    disk: int = 0
    copied: int = 0
    digested: int = 0
    checked: int = 0

    def reach(self, start: int, stop: int) -> None:
        """Reads `start:stop`."""
        self.copied += stop - start
        new = max(stop - max(start, self.seen), 0)
        self.disk += new
        if start <= self.seen:
            self.seen = max(self.seen, stop)
        else:
            self.ahead += new

    def read(self, part: Part, shard: str) -> None:
        """Reads a part, and what must be hashed before it."""
        size = part.stop - part.start
        if part.shard != shard:
            self.copied, self.disk = self.copied + size, self.disk + size
            self.digested += size
            return
        if self.alone and self.hashed < part.start:
            self.advance(part.start)
        self.reach(part.start, part.stop)
        if self.alone and self.hashed == part.start:
            self.hashed, self.digested = part.stop, self.digested + size
        else:
            self.checked += size

    def advance(self, stop: int) -> None:
        """Reads and hashes up to `stop`."""
        self.digested += stop - self.hashed
        self.reach(self.hashed, stop)
        self.hashed = stop

    def take(self, rates: Rates) -> tuple[int, dict[str, float]]:
        """Bytes from the disk and core-seconds by stage since the last call."""
        seconds = {
            "read": self.copied / rates.read,
            "hash": self.digested / rates.hash + self.checked / rates.check,
        }
        disk = self.disk
        self.disk = self.copied = self.digested = self.checked = 0
        return disk, seconds


@dataclass
class Step:
    """A slice of an operation, or as many as fill a block."""

    stage: str
    disk: int
    seconds: dict[str, float]
    work: float
    out: float


STAGES = {"awq_weight": "repack", "awq_biases": "biases", "group_scales": "biases"}


def slices(task: Task, reading: Reading, rates: Rates) -> Iterator[Step]:
    """All slices of a task, in the order of the entry."""
    makers = {output.name: op for op in task.operations for output in op.outputs}
    done: set[int] = set()
    for tensor in lay_out(task.outputs)[1]:
        operation = makers[tensor.name]
        if id(operation) in done:
            continue
        done.add(id(operation))
        size = sum(output.nbytes for output in operation.outputs)
        for parts in operation.slices:
            whole = parts[0].stop - parts[0].start
            count = 1 if operation.kind in STAGES else max(1, ceil(whole / BLOCK))
            out = size / len(operation.slices) / count
            for index in range(count):
                for part in parts:
                    cut = [part.start + (part.stop - part.start) * i // count
                           for i in (index, index + 1)]  # fmt: skip
                    reading.read(
                        Part(part.name, part.dtype, part.shape, part.shard, *cut), task.shard
                    )
                disk, seconds = reading.take(rates)
                seconds["read"] += rates.slice * len(parts)
                if operation.kind in STAGES:
                    work = rates.seconds[operation.kind, parts[0].shape]
                else:
                    work = whole / count / rates.quantize if operation.kind == "quantize" else 0.0
                yield Step(STAGES.get(operation.kind, operation.kind), disk, seconds, work, out)


def steps(task: Task, reading: Reading, rates: Rates) -> Iterator[Step]:
    """The same, small slices of one stage put together until they fill a block."""
    last: Step | None = None
    for step in slices(task, reading, rates):
        if last and last.stage == step.stage and last.out + step.out <= BLOCK:
            last.disk, last.work, last.out = (
                last.disk + step.disk,
                last.work + step.work,
                last.out + step.out,
            )
            last.seconds = {name: last.seconds[name] + s for name, s in step.seconds.items()}
            continue
        if last:
            yield last
        last = step
    if last:
        yield last


def convert(
    simulation: Simulation,
    host: Host,
    tasks: Sequence[Task],
    rates: Rates,
    plan: float,
    known: bool,
) -> Flow:
    """A whole conversion. `known`: each shard is hashed first, since one of its size was."""
    yield Shared(inf, each=1), rates.start + plan
    host.waiting = len(tasks)
    for task in tasks:
        simulation.start(shard(simulation, host, task, rates, known))


def shard(simulation: Simulation, host: Host, task: Task, rates: Rates, known: bool) -> Flow:
    """One shard, from the wait for a place to the entry's name."""
    yield host.places
    host.waiting -= 1
    reading = Reading()
    if known:
        yield from hash_rest(host, task, reading, rates)
        reading.alone = False
    beside = None
    if host.places.free > host.waiting:
        host.places.free -= 1
        reading.alone = False
        beside = simulation.start(hash_rest(host, task, reading, rates) if not known else iter(()))
    blocks, ready, slots = deque[float](), Gate(), Gate(BLOCKS)
    writer = simulation.start(write(simulation, host, blocks, ready, slots))
    if not host.backed:
        largest = max(p.stop - p.start for op in task.operations for s in op.slices for p in s)
        memory = BLOCKS * BLOCK + (largest if host.first_use() else 0)
        yield host.work("memory", memory * rates.fresh)
    blank = file_size(task.outputs) - sum(output.nbytes for output in task.outputs)
    for step in steps(task, reading, rates):
        yield from fetch(host, step.disk, step.seconds, rates)
        step.out, blank = step.out + blank, 0
        count = ceil(step.out / BLOCK)
        for _ in range(count):
            yield slots
            if beside and step.stage == "quantize":
                half = simulation.start(iter([host.work(step.stage, step.work / count / 2)]))
                yield host.work(step.stage, step.work / count / 2)
                yield half
            else:
                yield host.work(step.stage, step.work / count)
            yield host.work("seal", step.out / count / rates.seal)
            blocks.append(step.out / count)
            simulation.release(ready)
    if beside:
        yield beside
    elif not known:
        yield from hash_rest(host, task, reading, rates)
    blocks.append(0)
    simulation.release(ready)
    yield writer
    yield Shared(inf, each=1), rates.fsync
    for _ in range(2 if beside else 1):
        simulation.release(host.places)


def fetch(host: Host, disk: int, seconds: dict[str, float], rates: Rates) -> Flow:
    """Bytes from the disk, and what is done to them as they come, a block at a time."""
    source = host.source if disk else None
    if source and not host.backed:
        seconds = seconds | {"memory": disk * rates.fresh}  # of the page cache
    pieces = ceil(disk / BLOCK) if source else 1
    for _ in range(pieces):
        if source:
            yield source, disk / pieces
        for stage, value in seconds.items():
            yield host.work(stage, value / pieces)


def hash_rest(host: Host, task: Task, reading: Reading, rates: Rates) -> Flow:
    """Reads and hashes what is left of the shard."""
    mine = Reading(reading.hashed, reading.seen)
    while mine.hashed < task.size:
        mine.seen = max(mine.seen, reading.seen)
        mine.advance(min(mine.hashed + BLOCK, task.size))
        reading.seen = max(mine.seen, reading.seen)
        found = min(reading.ahead, mine.disk)
        reading.ahead, mine.disk = reading.ahead - found, mine.disk - found
        disk, seconds = mine.take(rates)
        yield from fetch(host, disk, seconds, rates)


def write(
    simulation: Simulation, host: Host, blocks: deque[float], ready: Gate, slots: Gate
) -> Flow:
    """An entry's own writer; a block of no bytes is the end."""
    while True:
        yield ready
        size = blocks.popleft()
        if not size:
            return
        yield host.target, size
        simulation.release(slots)


def load(simulation: Simulation, host: Host, size: int, rates: Rates) -> Flow:
    """A warm load: what every load costs, then the entries, by four threads."""
    yield Shared(inf, each=1), rates.load
    cost = 1 / rates.read + (0 if host.backed else rates.fresh)

    def reader() -> Flow:
        for _ in range(ceil(size / READERS / BATCH)):
            if host.source:
                yield host.source, BATCH
            yield host.work("read", BATCH * cost)

    for _ in range(READERS):
        simulation.start(reader())
