"""Jobs, their units, and a pool that runs these in a chosen order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from paroquant_stream.conversion.planning import plan_model
from paroquant_stream.conversion.request import make_request
from paroquant_stream.files.tensor_writer import lay_out
from paroquant_stream.store import entry_digest
from paroquant_stream.transform import unit as unit_module
from paroquant_stream.transform.source_shard import SourceShard
from paroquant_stream.transform.task_runner import Job
from paroquant_stream.transform.unit import Unit, UnitResult, ranges_of, steps_of
from paroquant_stream.transform.unit_pool import UnitPool
from paroquant_stream.transform.unit_runner import run_unit

UNIT, BLOCK = 2048, 64


def make_small(monkeypatch) -> None:
    """Cut even a tiny shard into units, and its entry into blocks."""
    monkeypatch.setattr(unit_module, "UNIT", UNIT)
    monkeypatch.setattr(unit_module, "BLOCK", BLOCK)
    monkeypatch.setattr(entry_digest, "BLOCK", BLOCK)


def ignore(_count: int) -> None:
    """Take no note of progress."""


def jobs_of(model: Path, cache: Path | None = None, *, split: bool = True, **more) -> list[Job]:
    """Return the jobs of a model, whose store exists then."""
    request = make_request(model, cache_dir=cache, **more)
    request.store.create()
    tasks = plan_model(request).plan.tasks
    return [Job(task, request.source.directory, request.store, split=split) for task in tasks]


@contextmanager
def whole_unit(job: Job) -> Iterator[Unit]:
    """Provide the unit of all that a job does, with the temp file that it writes."""
    shard = SourceShard(job.task, job.directory, job.store.digest_cache)
    shard.close()
    with job.store.new_entry(job.task.outputs) as file:
        steps = tuple(steps_of(job.task, lay_out(job.task.outputs)[1]))
        hashed = (shard.header, *ranges_of(job.task.shard, steps))
        yield Unit(job.task.shard, job.directory, job.store, steps, file.path, hashed)


class Ordered(UnitPool):
    """Runs units inline in an order that is chosen when they are known."""

    def __init__(
        self, order: Callable[[int], Sequence[int]], before: Callable[[int, Unit], None]
    ) -> None:
        """Set the order.

        Args:
            order: Gives the indexes of this many units in the order to run them.
            before: Called with how many have run, and the next.
        """
        super().__init__(1)
        self._order, self._before = order, before
        self.ran = 0

    def run(self, units, tick) -> Iterator[UnitResult]:
        """Run the units of a shard."""
        for index in self._order(len(units)):
            self._before(self.ran, units[index])
            self.ran += 1
            yield run_unit(units[index], tick)
