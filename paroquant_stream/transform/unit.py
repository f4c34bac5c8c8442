"""Units of work: what one worker does at a time, some 256 MB of a shard or a whole one.

An operation that is larger is cut between slices of its stack, or rows of its embedding, where a
block of the entry's digest ends in every output. Where enough shards are left for every worker, a
shard is one unit that reads it once, from front to back, for the hash and the conversion. Of a
shard that is more than a worker's share, the hash and every 256 MB are units of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd, lcm
from pathlib import Path

from ..files.hashing import Range, SourceDigest
from ..files.tensor_header import TensorInfo
from ..plan.task import Operation, Part, Task
from ..store.entry_digest import BLOCK
from ..store.entry_file import EntryCopy, Piece
from ..store.store import Store

UNIT = 256 << 20  # bytes read; 64 MB gains nothing, and larger ones leave workers idle at the end

_QUANTIZE_COST = 3  # 5.2 s of a core for 1 GB of an embedding, 1.7 s for other tensors


@dataclass(frozen=True)
class Step:
    """An operation, or some slices or rows of it, and where its outputs go."""

    operation: Operation
    places: tuple[int, ...]
    """For each output the offset in the entry at which the bytes begin."""

    @property
    def size(self) -> int:
        """Bytes that it reads."""
        return self.operation.size


@dataclass(frozen=True)
class Unit:
    """Work for one worker; small when pickled."""

    shard: str
    directory: Path
    """Of the model."""
    store: Store
    steps: tuple[Step, ...]
    """In the order in which a reading from front to back meets what they need."""
    path: Path | None
    """The temp file of the entry; None where there are no steps."""
    hashed: tuple[Range, ...] | None = None
    """Whether this unit hashes the shard too, and what then gets a fingerprint."""
    copy: EntryCopy | None = None
    """Gets what is written too, where the unit runs in the process of the run."""

    @cached_property
    def written(self) -> int:
        """Bytes of its outputs, at most."""
        return sum(output.nbytes for step in self.steps for output in step.operation.outputs)


@dataclass(frozen=True)
class UnitResult:
    """What a worker read and wrote."""

    pieces: tuple[Piece, ...] = ()
    read: tuple[tuple[Range, bytes], ...] = ()
    """The XXH3-128 of what was read of the shard, apart from its hash."""
    borrowed: tuple[tuple[str, bytes], ...] = ()
    """The SHA-256 of each borrowed tensor."""
    digest: SourceDigest | None = None
    """Of the shard, where the unit hashed it."""


def steps_of(task: Task, tensors: Sequence[TensorInfo]) -> list[Step]:
    """Cut the operations of a task into steps of at most `UNIT`, where they can be cut.

    Args:
        task: Of the shard.
        tensors: Of its entry, from `lay_out`.
    """
    places = {tensor.name: tensor.start for tensor in tensors}
    steps = [step for operation in task.operations for step in _cut(operation, places)]
    return sorted(steps, key=lambda step: step.operation.start)


def _cut(operation: Operation, places: Mapping[str, int]) -> Iterator[Step]:
    whole = Step(operation, tuple(places[output.name] for output in operation.outputs))
    rows = operation.outputs[0].shape[0] if operation.kind == "quantize" else len(operation.slices)
    if whole.size <= UNIT or rows < 2:
        yield whole
        return
    sizes = [output.nbytes // rows for output in operation.outputs]
    together = lcm(*(BLOCK // gcd(BLOCK, size) for size in sizes))  # end at blocks of every output
    count = max(together, UNIT * rows // whole.size // together * together)
    for first in range(0, rows, count):
        last = min(first + count, rows)
        moved = tuple(p + first * s for p, s in zip(whole.places, sizes, strict=True))
        yield Step(_narrowed(operation, first, last), moved)


def _narrowed(operation: Operation, first: int, last: int) -> Operation:
    """Return some slices of a stack, or some rows of an embedding."""
    if operation.kind != "quantize":
        return replace(operation, slices=operation.slices[first:last])
    part = operation.slices[0][0]
    row = (part.stop - part.start) // part.shape[0]
    start = part.start + first * row
    rows = Part(
        part.name,
        part.dtype,
        (last - first, *part.shape[1:]),
        part.shard,
        start,
        start + (last - first) * row,
    )
    return replace(operation, slices=((rows,),))


def units_of(unit: Unit, split: bool) -> list[Unit]:
    """Divide the work for a shard.

    Args:
        unit: All of it, with the hash.
        split: Whether other workers would be idle.
    """
    if not split or sum(step.size for step in unit.steps) <= UNIT:
        return [unit]
    runs, size = [list[Step]()], 0
    for step in unit.steps:
        if size and size + step.size > UNIT:
            runs.append([])
            size = 0
        runs[-1].append(step)
        size += step.size
    # the longest first: the hash, then embeddings
    runs.sort(key=lambda run: -sum(cost_of(step.operation) for step in run))
    hashes = [] if unit.hashed is None else [replace(unit, steps=(), path=None)]
    return hashes + [replace(unit, steps=tuple(run), hashed=None) for run in runs]


def cost_of(operation: Operation) -> int:
    """Return how long an operation takes, beside other operations."""
    return operation.size * (_QUANTIZE_COST if operation.kind == "quantize" else 1)


def ranges_of(shard: str, steps: Sequence[Step]) -> list[Range]:
    """Return what steps read of their shard, in file order."""
    parts = (part for step in steps for part in step.operation.parts)
    return sorted({(p.start, p.stop) for p in parts if p.shard == shard and p.stop > p.start})
