"""`install` and `uninstall`: replace the loaders of other packages by `load`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..distributed.split import Parallel
from ..integrations import loader_patch
from ..store.format import Dtype
from .load import load
from .load_options import LoadOptions

if TYPE_CHECKING:
    from ..conversion.progress import ProgressOption


def install(
    *,
    cache_dir: str | Path | None = None,
    jobs: int | None = None,
    revision: str | None = None,
    dtype: Dtype = "source",
    io_bits: int = 4,
    progress: ProgressOption = None,
    verify: Literal["header", "full"] = "header",
    trace: str | Path | None = None,
    layers: range | None = None,
    group: Any = None,
    parallel: Parallel = "pipeline",
) -> None:
    """Use `load` in the place of paroquant's, mlx-lm's and mlx-vlm's loaders in this process.

    Of mlx-lm and mlx-vlm that is `load` and `load_model` of `mlx_lm.utils` and `mlx_vlm.utils`, and
    `mlx_lm.utils.sharded_load`, for ParoQuant models alone: directories and Hub repositories whose
    config.json has the quant_method paroquant, and what `export_model` wrote. All others go to the
    original function with all arguments. paroquant's loader is replaced for all models.

    A function is replaced under every name that any loaded module has for it, and when its module
    is imported later. Calls nest: each needs its own `uninstall()`, and the options of the last one
    apply. References outside of a module's names (a class attribute, a `functools.partial`) keep
    the old function. One with other parameters than expected is not replaced; a warning says so.

    Args:
        cache_dir: For every call, as all options here, and as in `load`.
        jobs: As in `load`.
        revision: As in `load`.
        dtype: As in `load`.
        io_bits: As in `load`.
        progress: As in `load`.
        verify: As in `load`.
        trace: As in `load`; the file of the last call stays.
        layers: As in `load`.
        group: As in `load`.
        parallel: As in `load`.

    Raises:
        MissingExtraError: None of the three packages is installed.
        ValueError: An option has a value that is not allowed.
    """
    how = (cache_dir, jobs, revision, dtype, io_bits, progress, verify, trace)
    options = LoadOptions(False, False, *how, layers, group, parallel)
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    for own in ("lazy", "force_text", "model_config", "tokenizer"):  # the program's
        del given[own]
    loader_patch.install(load, **given)


def uninstall() -> None:
    """Undo the last `install()`; after the first one is undone, the original loaders are back.

    Does nothing without an `install()`.
    """
    loader_patch.uninstall()
