"""`install` and `uninstall`: replace paroquant's loader by `load`."""

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
    progress: ProgressOption = None,
    verify: Literal["header", "full"] = "header",
    trace: str | Path | None = None,
    layers: range | None = None,
    group: Any = None,
    parallel: Parallel = "pipeline",
) -> None:
    """Replace paroquant's MLX loader by `load` in this process.

    This includes modules that import the loader later. Calls nest: each needs its own
    `uninstall()`, and the options of the last one apply. References outside of a module's names (a
    class attribute, a `functools.partial`) keep the old loader.

    Args:
        cache_dir: For every call, as all options here, and as in `load`.
        jobs: As in `load`.
        revision: As in `load`.
        dtype: As in `load`.
        progress: As in `load`.
        verify: As in `load`.
        trace: As in `load`; the file of the last call stays.
        layers: As in `load`.
        group: As in `load`.
        parallel: As in `load`.

    Raises:
        MissingExtraError: paroquant is not installed.
        LoaderMovedError: The installed version has no such loader, or one with other arguments.
        ValueError: An option has a value that is not allowed.
    """
    how = (cache_dir, jobs, revision, dtype, progress, verify, trace, layers, group, parallel)
    options = LoadOptions(False, False, *how)
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    del given["lazy"], given["force_text"]  # the program's own
    loader_patch.install(load, **given)


def uninstall() -> None:
    """Undo the last `install()`; after the first one is undone, paroquant's loader is back.

    Does nothing without an `install()`.
    """
    loader_patch.uninstall()
