"""`export_model`: a converted model as an MLX model directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..backends.mlx_lm import MlxLm
from ..backends.mlx_vlm import MlxVlm
from ..conversion.progress import check_progress
from ..conversion.request import ConvertOptions, request_for
from ..options import check_count, check_flags, check_path
from ..progress_bar import reported

if TYPE_CHECKING:
    from ..conversion.progress import ProgressOption
    from ..exports.mlx_directory_writer import Export
    from ..store.format import Dtype

SHARD_SIZE = 5_000_000_000


def export_model(
    model_path: str | Path,
    out: str | Path,
    *,
    self_contained: bool = False,
    vision: bool = False,
    shard_size: int = SHARD_SIZE,
    cache_dir: str | Path | None = None,
    jobs: int | None = None,
    revision: str | None = None,
    dtype: Dtype = "source",
    progress: ProgressOption = None,
) -> Export:
    """Write a model as an MLX model directory, converting first what is not in the cache.

    Args:
        model_path: A model directory, or a Hub repository id.
        out: The directory to write, which must not exist.
        self_contained: Add a Python file by which mlx-lm reads it without this package; mlx-lm runs
            it only with `trust_remote_code`.
        vision: Write a vision model with its towers, and add two Python files by which mlx-vlm
            0.6.16 or newer reads it without this package; mlx-vlm runs them without being asked.
        shard_size: Bytes of tensors in a file at most; a larger tensor has its own file.
        cache_dir: As for `convert_checkpoint`.
        jobs: As for `convert_checkpoint`.
        revision: As for `convert_checkpoint`.
        dtype: As for `convert_checkpoint`: which of its conversions is written.
        progress: As for `convert_checkpoint`; a function is also called for each file of the export
            as it is written.

    Raises:
        ValueError: An option has a value that is not allowed.
        CheckpointError: `out` exists or its parent does not, or the model cannot be used.
        StoreError: It cannot be written.
        MissingExtraError: MLX has no backend, or mlx-lm is not installed; before any work.
        ModelError: As `load` raises.
    """
    check_path("out", out, optional=False)
    check_flags(self_contained=self_contained, vision=vision)
    check_count("shard_size", shard_size, optional=False)
    check_progress(progress)
    options = ConvertOptions(cache_dir=cache_dir, jobs=jobs, revision=revision, dtype=dtype)
    (MlxVlm() if vision else MlxLm()).check_installed()
    from ..exports.exported_config import MODEL_FILE, VISION_FILE  # brings MLX

    code = VISION_FILE if vision else MODEL_FILE if self_contained else None
    return _export(model_path, out, options, code, shard_size, progress)


def _export(
    model_path: str | Path,
    out: str | Path,
    options: ConvertOptions,
    code: str | None,
    shard_size: int,
    progress: ProgressOption,
) -> Export:
    from ..exports.mlx_directory_writer import export_directory, new_target

    target = new_target(out)
    request = request_for(model_path, options)
    with reported(progress) as phase:
        return export_directory(request, target, code, shard_size, phase)
