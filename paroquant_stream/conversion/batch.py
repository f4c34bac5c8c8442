"""Several models in one call: they share the workers, and one that fails lets the others finish."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..errors import ParoquantStreamError, SomeModelsFailedError
from ..execution.slots import Places, Worker
from ..execution.threads import run_all
from ..trace import NO_TRACE, Trace
from .converter import convert
from .progress import Progress
from .report import Conversion
from .request import Request

if TYPE_CHECKING:
    pass

Result = Conversion | ParoquantStreamError


def some_failed(failed: Mapping[str, ParoquantStreamError], count: int) -> SomeModelsFailedError:
    """The error for these of `count` models."""
    listed = "\n".join(f"  {model}: {error}" for model, error in failed.items())
    return SomeModelsFailedError(f"{len(failed)} of {count} models were not converted:\n{listed}")


def convert_all(
    requests: Sequence[Request], progress: Progress | None = None, trace: Trace = NO_TRACE
) -> Iterator[tuple[Request, Result]]:
    """What became of each model, as they finish; at most the requests' `jobs` shards in work.

    As many models as jobs are in work at once, since each may be a single shard; with
    `drop_source` one after another, since the room that it saves is counted for one model.
    """
    if not requests:
        return
    jobs = max(request.jobs for request in requests)
    together = (
        1 if any(request.options.drop_source for request in requests) else min(jobs, len(requests))
    )
    models = Places(together, len(requests))
    shards = Places(jobs, 0, above=models)

    def work(request: Request, _worker: Worker) -> tuple[Request, Result]:
        tell = partial(_tell, progress, request.source.name) if progress else None
        try:
            return request, convert(replace(request, places=shards), tell, trace)
        except ParoquantStreamError as error:
            return request, error

    yield from run_all(work, requests, together, trace, models)


def _tell(progress: Progress, model: str, shard: str, done: int, size: int) -> None:
    progress(f"{model}/{shard}", done, size)
