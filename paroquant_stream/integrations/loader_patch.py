"""Puts `paroquant_stream.load` in the place of the loaders of paroquant, mlx-lm and mlx-vlm.

None of the three is imported for this, as that is slow and a program may want to configure it
first: an import hook replaces the functions when their module is imported.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ..errors import MissingExtraError
from . import mlx_loaders
from .import_hook import LOADER_MODULES, after_import, forget
from .replacement import Call, Replacement

logger = logging.getLogger(__name__)
_installed: list[Callable[..., Any]] = []
"""The loader with the options of each install() that is not undone; the last one is used."""


def install(loader: Callable[..., Any], **options: Any) -> None:
    """Replace the loaders in this process, as `paroquant_stream.install` describes.

    Args:
        loader: `paroquant_stream.load`.
        **options: Keyword options of `loader` for every call.

    Raises:
        MissingExtraError: None of the three packages is installed.
        TypeError: `loader` has no such option, or the programs give it.
    """
    by_us = {"model_config": None, "tokenizer": False}
    inspect.signature(loader).bind("a model", False, False, **by_us, **options)
    there = [module for module in LOADER_MODULES if _is_there(module)]  # warns, so each is asked
    if not there:
        raise MissingExtraError(
            "neither paroquant nor mlx-lm nor mlx-vlm is installed, so there is no loader to "
            "replace: pip install 'paroquant_stream[lm]'"
        )
    _installed.append(partial(loader, **options))
    if len(_installed) == 1:
        for module in LOADER_MODULES:
            after_import(module, _apply)
    for module in LOADER_MODULES:
        home = sys.modules.get(module)
        if home is not None:
            _apply(home)


def uninstall() -> None:
    """Undo the last `install()`; after the first one is undone, the loaders are back."""
    if _installed:
        _installed.pop()
    if not _installed:
        forget(_apply)
        for replacement in _REPLACEMENTS:
            replacement.restore()


def _apply(home: ModuleType) -> None:
    """Replace the functions of a module."""
    for replacement in _REPLACEMENTS:
        if replacement.module == home.__name__:
            replacement.apply(home)


def _is_there(module: str) -> bool:
    """Return whether a package is installed, without importing it; warn if it lacks the module."""
    package, *below = module.split(".")
    try:
        spec = find_spec(package)
    except ValueError:  # a module without a spec, made by a program
        return False
    if spec is None:
        return False
    places = [os.path.join(d, *below) for d in spec.submodule_search_locations or ()]
    if not any(os.path.isfile(f"{p}.py") or os.path.isfile(f"{p}/__init__.py") for p in places):
        logger.warning("%s has no module %s, so nothing in it is replaced", package, module)
    return True


def _load(call: Call) -> Any:
    given = call.arguments
    return _installed[-1](given["model_path"], given["lazy"], given["force_text"])


def _by(load: Callable[[Call, Callable[..., Any]], Any]) -> Callable[[Call], Any]:
    return lambda call: load(call, _installed[-1])


def _replacement(module: str, name: str, expected: str, call: Callable[[Call], Any]) -> Replacement:
    return Replacement(module, name, tuple(expected.split()), call, lambda: bool(_installed))


PAROQUANT, _LM, _VLM = LOADER_MODULES
_REPLACEMENTS = (
    _replacement(PAROQUANT, "load", "model_path lazy force_text", _load),
    _replacement(_LM, "load", "path_or_hf_repo revision", mlx_loaders.load),
    _replacement(_LM, "load_model", "model_path lazy", _by(mlx_loaders.load_text_model)),
    _replacement(
        _LM,
        "sharded_load",
        "repo pipeline_group tensor_group return_config",
        _by(mlx_loaders.load_sharded),
    ),
    _replacement(_VLM, "load", "path_or_hf_repo revision", mlx_loaders.load),
    _replacement(_VLM, "load_model", "model_path lazy", _by(mlx_loaders.load_vision_model)),
)
