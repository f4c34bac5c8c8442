"""Several models in one call: they share the workers, and one that fails lets the others finish."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ParoquantStreamError, SomeFailed
from ..execution.executors import run_all
from ..execution.slots import Places, Worker
from ..plan.task import Dtype
from ..store.manifest import Manifest
from ..trace import SILENCE, Trace, written_to
from .converter import convert
from .progress import Progress
from .report import Conversion
from .request import Request, make_request

if TYPE_CHECKING:
    from concurrent.futures import Executor

Result = Conversion | ParoquantStreamError


def convert_checkpoints(
    model_paths: Sequence[str | Path],
    *,
    cache_dir: str | Path | None = None,
    in_place: bool = False,
    force: bool = False,
    jobs: int | None = None,
    drop_source: bool = False,
    dtype: Dtype = "source",
    executor: Executor | None = None,
    progress: Progress | None = None,
    trace: str | Path | None = None,
) -> list[Manifest]:
    """The manifests of these models, in their order; the options are those of
    `convert_checkpoint`.

    `jobs` bounds the shards in work of all models together. `progress` is told of a shard as
    `<model>/<shard>`. Raises SomeFailed when all that can be converted is; a finished model's
    manifest is then what `convert_checkpoint` gives, without work.
    """
    requests: list[Request] = []
    failed: dict[str, ParoquantStreamError] = {}
    manifests: dict[str, Manifest] = {}
    for model in dict.fromkeys(map(str, model_paths)):
        try:
            requests.append(
                make_request(
                    model,
                    cache_dir=cache_dir,
                    in_place=in_place,
                    force=force,
                    jobs=jobs,
                    drop_source=drop_source,
                    dtype=dtype,
                    executor=executor,
                )
            )
        except ParoquantStreamError as error:
            failed[model] = error
    with written_to(trace) as timed:
        for request, result in convert_all(requests, progress, timed):
            if isinstance(result, Conversion):
                manifests[request.model] = result.manifest
            else:
                failed[request.model] = result
    if failed:
        raise some_failed(failed, len(model_paths))
    return [manifests[str(model)] for model in model_paths]


def some_failed(failed: Mapping[str, ParoquantStreamError], count: int) -> SomeFailed:
    """The error for these of `count` models."""
    listed = "\n".join(f"  {model}: {error}" for model, error in failed.items())
    return SomeFailed(f"{len(failed)} of {count} models were not converted:\n{listed}")


def convert_all(
    requests: Sequence[Request], progress: Progress | None = None, trace: Trace = SILENCE
) -> Iterator[tuple[Request, Result]]:
    """What became of each model, as they finish; at most the requests' `jobs` shards in work.

    As many models as jobs are in work at once, since each may be a single shard; with
    `drop_source` one after another, since the room that it saves is counted for one model.
    """
    if not requests:
        return
    jobs = max(request.jobs for request in requests)
    together = 1 if any(request.drop_source for request in requests) else min(jobs, len(requests))
    models = Places(together, len(requests))
    shards = Places(jobs, 0, above=models)

    def work(request: Request, _worker: Worker) -> tuple[Request, Result]:
        tell = partial(_tell, progress, request.model) if progress else None
        try:
            return request, convert(replace(request, places=shards), tell, trace)
        except ParoquantStreamError as error:
            return request, error

    yield from run_all(work, requests, together, trace, models)


def _tell(progress: Progress, model: str, shard: str, done: int, size: int) -> None:
    progress(f"{model}/{shard}", done, size)
