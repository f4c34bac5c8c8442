"""Several models in one call: they share the workers, and one that fails lets the others finish."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..errors import ParoquantStreamError, SomeModelsFailedError
from ..execution.automatic import Automatic
from ..execution.cancellation import Cancellation
from ..execution.threads import Shared, run_all
from ..trace import NO_TRACE, Trace
from .converter import convert_or_find
from .progress import Progress
from .report import Conversion
from .request import Request

Result = Conversion | ParoquantStreamError


def some_failed(failed: Mapping[str, ParoquantStreamError], count: int) -> SomeModelsFailedError:
    """Return the error for these of `count` models."""
    listed = "\n".join(f"  {_reason(model, str(error))}" for model, error in failed.items())
    return SomeModelsFailedError(
        f"{len(failed)} of {count} models were not converted:\n{listed}", dict(failed)
    )


def _reason(model: str, reason: str) -> str:
    """Return a reason that starts with the model, once."""
    named = reason.startswith((f"{model}:", f"{model}/", f"{Path(model).expanduser()}"))
    return (reason if named else f"{model}: {reason}").replace("\n", "\n  ")


def convert_all(
    requests: Sequence[Request], progress: Progress | None = None, trace: Trace = NO_TRACE
) -> Iterator[tuple[Request, Result]]:
    """Convert several models at once and yield what became of each, as they finish.

    As many models as jobs are converted at once, since each may be a single shard; with
    `drop_source` one after another, since the space that it saves is counted for one model.

    Args:
        requests: The largest of their `jobs` is the number of workers, of all together.
        progress: Called with `<model>/<shard>`, its finished bytes and its size.
        trace: Gets the time of each stage.
    """
    if not requests:
        return
    jobs = max(request.jobs for request in requests)
    together = (
        1 if any(request.options.drop_source for request in requests) else min(jobs, len(requests))
    )
    threads = ThreadPoolExecutor(jobs, thread_name_prefix="worker")

    def work(request: Request, cancellation: Cancellation) -> tuple[Request, Result]:
        report = partial(_report, progress, request.source.name) if progress else None
        shared = Shared(automatic, threads, cancellation)
        try:
            return request, convert_or_find(replace(request, shared=shared), report, trace)
        except ParoquantStreamError as error:
            return request, error

    try:
        with Automatic() as automatic:
            yield from run_all(work, requests, together)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _report(progress: Progress, model: str, shard: str, done: int, size: int) -> None:
    progress(f"{model}/{shard}", done, size)
