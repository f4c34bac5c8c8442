"""Run a unit: the function that every worker calls."""

from __future__ import annotations

from contextlib import nullcontext

from ..store.entry_file import PieceWriter, piece_writer
from ..trace import NO_TRACE, Trace
from .operations import run_operation
from .source import Buffers, Source, Tick
from .unit import Step, Unit, UnitResult


def run_unit(
    unit: Unit,
    tick: Tick,
    buffers: Buffers | None = None,
    trace: Trace = NO_TRACE,
    sync: bool = False,
) -> UnitResult:
    """Hash and convert what a unit names, and write it at its place.

    Args:
        unit: What is done.
        tick: Progress callback; what it raises cancels the unit.
        buffers: Memory to read into; by default new.
        trace: Gets the time of each stage.
        sync: Make what is written durable, as another host will publish it.

    Raises:
        CheckpointError: The shard cannot be read.
        SourceChangedError: Its bytes changed meanwhile.
        OutOfRangeError: A value would overflow in the dtype of its output.
        StoreError: The entry cannot be written.
    """
    source = Source(unit, tick, buffers, trace)
    path = unit.path
    try:
        with (
            piece_writer(path, unit.written, trace, unit.copy) if path else nullcontext() as writer
        ):
            for step in unit.steps:
                _write(step, source, writer, trace)
            digest = source.finish_hash()
            pieces = writer.finish(sync) if writer else []
    finally:
        source.close()
    read, borrowed = tuple(source.read.items()), tuple(source.borrowed.items())
    return UnitResult(tuple(pieces), read, borrowed, digest)


def _write(step: Step, source: Source, writer: PieceWriter | None, trace: Trace) -> None:
    chunks = run_operation(step.operation, source)
    while True:
        with trace.span(step.operation.kind, step.operation.outputs[0].name):
            result = next(chunks, None)
        if result is None or writer is None:
            return
        index, chunk = result
        writer.write(step.places[index], chunk)
