"""`install` and `uninstall`: replace the loaders of other packages by `load`."""

from __future__ import annotations

from typing import Any

from ..integrations import loader_patch
from .load import load


def install(**options: Any) -> None:
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
        **options: Keyword options of `load` for every call (`cache_dir`, `jobs`, `verify`, ...).

    Raises:
        MissingExtraError: None of the three packages is installed.
        TypeError: `load` has no such option, or the replaced functions give it.
    """
    loader_patch.install(load, **options)


def uninstall() -> None:
    """Undo the last `install()`; after the first one is undone, the original loaders are back.

    Does nothing without an `install()`.
    """
    loader_patch.uninstall()
