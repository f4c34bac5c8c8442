"""`convert_checkpoint` and `convert_checkpoints`: convert models without loading them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from ..conversion.batch import convert_all, some_failed
from ..conversion.converter import convert_or_find
from ..conversion.progress import check_progress
from ..conversion.report import Conversion
from ..conversion.request import ConvertOptions, Request, make_request, request_for
from ..errors import ParoquantStreamError
from ..options import check, check_path
from ..progress_bar import SHARDS, reported
from ..store.manifest import Manifest
from ..trace import written_to

if TYPE_CHECKING:
    from ..conversion.progress import ProgressOption
    from ..conversion.request import ConvertKeywords


def convert_checkpoint(
    model_path: str | Path,
    *,
    progress: ProgressOption = None,
    trace: str | Path | None = None,
    **options: Unpack[ConvertKeywords],
) -> Manifest:
    """Convert a model, except for shards whose entries are in the cache.

    Args:
        model_path: A model directory or a Hub repository id. The shards of a repository are
            converted while the next ones download.
        progress: True shows bars, or lines where stderr is no terminal; False nothing; None bars on
            a terminal or in a notebook. A function is called by the workers, as
            `progress(shard, bytes done, total bytes)`.
        trace: A file to write the stages of every worker to, for chrome://tracing and
            ui.perfetto.dev. Of workers on other hosts it has the stage `shard` alone.
        **options: The fields of `ConvertOptions`: cache_dir, in_place, force, jobs, revision,
            drop_source, dtype, io_bits, executor.

    Returns:
        The manifest, which lists the entries.

    Raises:
        ValueError: An option has a value that is not allowed.
        CheckpointError: The model cannot be used, or a shard cannot be downloaded.
        StoreError: The cache cannot be read or written.
        ExecutionError: Workers lack something or were lost.

    After an error the entries that were published stay, and the next call resumes there.
    """
    _check(progress, trace)
    request = make_request(model_path, **options)
    with written_to(trace) as timed, reported(progress) as phase:
        return convert_or_find(request, phase(SHARDS), timed).manifest


def convert_checkpoints(
    model_paths: Sequence[str | Path],
    *,
    progress: ProgressOption = None,
    trace: str | Path | None = None,
    **options: Unpack[ConvertKeywords],
) -> list[Manifest]:
    """Convert several models, which share the workers.

    Args:
        model_paths: Model directories or Hub repository ids.
        progress: As for `convert_checkpoint`; a shard is named `<model>/<shard>`.
        trace: As for `convert_checkpoint`.
        **options: The fields of `ConvertOptions`; `jobs` is the number of workers that all models
            share.

    Returns:
        The manifests, in the order of the models.

    Raises:
        SomeModelsFailedError: Some models were not converted; lists them, and its `failures` has
            the error of each. The others are converted, and `convert_checkpoint` returns their
            manifests at once.
        ValueError: An option has a value that is not allowed.
    """
    _check(progress, trace)
    chosen = ConvertOptions(**options)
    listed = not isinstance(model_paths, (str, bytes)) and isinstance(model_paths, Sequence)
    check("model_paths", model_paths, "a list of paths or repository ids", listed)
    for path in model_paths:
        check_path("model_paths", path, optional=False)
    requests: list[Request] = []
    failed: dict[str, ParoquantStreamError] = {}
    manifests: dict[str, Manifest] = {}
    for model in dict.fromkeys(map(str, model_paths)):
        try:
            requests.append(request_for(model, chosen))
        except ParoquantStreamError as error:
            failed[model] = error
    with written_to(trace) as timed, reported(progress) as phase:
        for request, result in convert_all(requests, phase(SHARDS), timed):
            if isinstance(result, Conversion):
                manifests[request.source.name] = result.manifest
            else:
                failed[request.source.name] = result
    if failed:
        raise some_failed(failed, len(model_paths))
    return [manifests[str(model)] for model in model_paths]


def _check(progress: object, trace: object) -> None:
    check_progress(progress)
    check_path("trace", trace)
