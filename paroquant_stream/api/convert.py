"""`convert_checkpoint` and `convert_checkpoints`: convert models without loading them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from ..conversion.batch import convert_all, some_failed
from ..conversion.converter import convert
from ..conversion.report import Conversion
from ..conversion.request import Request, make_request
from ..errors import ParoquantStreamError
from ..store.manifest import Manifest
from ..trace import written_to

if TYPE_CHECKING:
    from ..conversion.progress import Progress
    from ..conversion.request import ConvertKeywords


def convert_checkpoint(
    model_path: str | Path,
    *,
    progress: Progress | None = None,
    trace: str | Path | None = None,
    **options: Unpack[ConvertKeywords],
) -> Manifest:
    """Convert a model, except for shards whose entries are in the cache.

    Args:
        model_path: A model directory or a Hub repository id. The shards of a repository are
            converted while the next ones download.
        progress: Called by the workers as `progress(shard, bytes done, total bytes)`.
        trace: A file to write the stages of every worker to, for chrome://tracing and
            ui.perfetto.dev. Of an executor's workers it has the stage `shard` alone.
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
    request = make_request(model_path, **options)
    with written_to(trace) as timed:
        return convert(request, progress, timed).manifest


def convert_checkpoints(
    model_paths: Sequence[str | Path],
    *,
    progress: Progress | None = None,
    trace: str | Path | None = None,
    **options: Unpack[ConvertKeywords],
) -> list[Manifest]:
    """Convert several models, which share the workers.

    Args:
        model_paths: Model directories or Hub repository ids.
        progress: As for `convert_checkpoint`; a shard is named `<model>/<shard>`.
        trace: As for `convert_checkpoint`.
        **options: The fields of `ConvertOptions`; `jobs` limits the shards of all models that are
            converted at the same time.

    Returns:
        The manifests, in the order of the models.

    Raises:
        SomeModelsFailedError: Some models were not converted; lists them. The others are converted,
            and `convert_checkpoint` returns their manifests at once.
        ValueError: An option has a value that is not allowed.
    """
    requests: list[Request] = []
    failed: dict[str, ParoquantStreamError] = {}
    manifests: dict[str, Manifest] = {}
    for model in dict.fromkeys(map(str, model_paths)):
        try:
            requests.append(make_request(model, **options))
        except ParoquantStreamError as error:
            failed[model] = error
    with written_to(trace) as timed:
        for request, result in convert_all(requests, progress, timed):
            if isinstance(result, Conversion):
                manifests[request.source.name] = result.manifest
            else:
                failed[request.source.name] = result
    if failed:
        raise some_failed(failed, len(model_paths))
    return [manifests[str(model)] for model in model_paths]
