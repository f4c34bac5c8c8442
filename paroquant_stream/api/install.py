"""`install` and `uninstall`: replace paroquant's loader by `load`."""

from __future__ import annotations

from inspect import signature
from typing import Any

from ..integrations import loader_patch
from .load import load
from .load_options import LoadOptions


def install(**options: Any) -> None:
    """Replace paroquant's MLX loader by `load` in this process.

    This includes modules that import the loader later. Calls nest: each needs its own
    `uninstall()`, and the options of the last one apply. References outside of a module's names (a
    class attribute, a `functools.partial`) keep the old loader.

    Args:
        **options: Keyword options of `load` for every call (`cache_dir`, `jobs`, `verify`, ...).

    Raises:
        MissingExtraError: paroquant is not installed.
        LoaderMovedError: The installed version has no such loader, or one with other arguments.
        TypeError: `load` has no such option.
        ValueError: An option has a value that is not allowed.
    """
    signature(load).bind("a model", False, False, **options)
    LoadOptions(**options)
    loader_patch.install(load, **options)


def uninstall() -> None:
    """Undo the last `install()`; after the first one is undone, paroquant's loader is back.

    Does nothing without an `install()`.
    """
    loader_patch.uninstall()
