"""install() and uninstall(): load() in the place of paroquant's own loader."""

from __future__ import annotations

from typing import Any

from ..integrations import loader_patch
from .load import load


def install(**options: Any) -> None:
    """Replace paroquant's MLX loader by `load` in this process.

    Whoever imports the loader later gets ours too. Calls nest: each needs its `uninstall()`, and
    the options of the innermost count. What holds the function elsewhere than in a module's name
    (a class attribute, `functools.partial`) keeps the old one.

    Args:
        **options: Keyword options of `load` for every call (`cache_dir`, `jobs`, `verify`, ...).

    Raises:
        MissingExtraError: paroquant is not installed.
        LoaderMovedError: The installed version has no such loader, or gives it other arguments.
        TypeError: `load` has no such option.
    """
    loader_patch.install(load, **options)


def uninstall() -> None:
    """Undo the last `install()`; the outermost puts paroquant's loader back.

    Without an `install()` it does nothing.
    """
    loader_patch.uninstall()
