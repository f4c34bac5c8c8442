"""Replaces the MLX loader of the `paroquant` package for this process, and restores it.

Programs look the loader up in its module at each load, or imported the function once. So the name
in the module is replaced, and every name in another module that refers to the same function.
paroquant is not imported for this, as that is slow and imports mlx-lm, which a program may want to
configure first: an import hook replaces the loader when its module is imported.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ..errors import LoaderMovedError, MissingExtraError

LOADER_MODULE = "paroquant.inference.backends.mlx.load"
"""The module that defines the loader, as of paroquant 0.1.16.

oMLX and the package's own generator, chat and serve commands import it from there.
"""
_installed: list[Callable[..., Any]] = []
"""The loader with the options of each install() that is not undone; the last one is used."""
_original: Callable[..., Any] | None = None
"""paroquant's own loader, once its module was patched."""


def install(loader: Callable[..., Any], **options: Any) -> None:
    """Replace paroquant's MLX loader in this process, as `paroquant_stream.install` describes.

    Args:
        loader: `paroquant_stream.load`.
        **options: Keyword options of `loader` for every call.

    Raises:
        MissingExtraError: paroquant is not installed.
        LoaderMovedError: The installed version has no such loader, or one with other arguments.
        TypeError: `loader` has no such option.
    """
    inspect.signature(loader).bind("a model", False, False, **options)
    home = sys.modules.get(LOADER_MODULE)
    if home is not None:
        _replace(home)
    else:
        _check_installed()
    _installed.append(partial(loader, **options))
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def uninstall() -> None:
    """Undo the last `install()`; after the first one is undone, paroquant's loader is back."""
    if _installed:
        _installed.pop()
    if not _installed:
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        if _original is not None:
            _swap(load, _original)


def load(model_path: str, lazy: bool = False, force_text: bool = False) -> tuple[Any, Any, bool]:
    """Load a model by the installed loader; after `uninstall()` by paroquant's own.

    Args:
        model_path: A model directory or a Hub repository id.
        lazy: Leave the parameters unevaluated.
        force_text: Load the text part of a vision model.

    Returns:
        The model, its tokenizer or processor, and whether it is a vision model.
    """
    current = _installed[-1] if _installed else _original
    assert current is not None  # only a patched module refers to this function
    loaded: tuple[Any, Any, bool] = current(model_path, lazy, force_text)
    return loaded


def _check_installed() -> None:
    """Check that paroquant has the loader's file, without importing it."""
    try:
        package = find_spec("paroquant")
    except ValueError:  # a module without a spec, made by a program
        package = None
    if package is None:
        raise MissingExtraError(
            "paroquant is not installed, so there is no loader to replace: "
            "pip install 'paroquant[mlx]', or call paroquant_stream.load() yourself"
        )
    below = os.path.join(*LOADER_MODULE.split(".")[1:])
    for directory in package.submodule_search_locations or ():
        path = os.path.join(directory, below)
        if os.path.isfile(f"{path}.py") or os.path.isfile(os.path.join(path, "__init__.py")):
            return
    raise LoaderMovedError(_moved("there is no such module"))


def _replace(home: ModuleType) -> None:
    """Replace the loader in its module and in every module that imported it by name."""
    global _original  # noqa: PLW0603 (a process has one loader)
    found = vars(home).get("load")
    if found is load:
        return
    if not callable(found):
        raise LoaderMovedError(_moved("it has no load()"))
    expected = list(inspect.signature(load).parameters)
    parameters = inspect.signature(found).parameters
    if list(parameters) != expected:
        raise LoaderMovedError(_moved(f"it takes ({', '.join(parameters)}), not {tuple(expected)}"))
    _original = found
    _swap(found, load)


def _moved(found: str) -> str:
    """Write the message of a LoaderMovedError."""
    try:
        installed = version("paroquant")
    except PackageNotFoundError:
        installed = "(of unknown version)"
    return (
        f"paroquant {installed} does not have its MLX loader at {LOADER_MODULE}.load, as 0.1.16 "
        f"has: {found}; install paroquant 0.1.16, or call paroquant_stream.load() yourself"
    )


def _swap(old: object, new: object) -> None:
    """Replace an object by another one in the names of every module but this."""
    for module in list(sys.modules.values()):
        try:  # not by getattr, at which a lazy module would import itself
            names = object.__getattribute__(module, "__dict__")
        except AttributeError:  # sys.modules may hold any object
            continue
        if names is globals():  # this module needs both
            continue
        for name, value in list(names.items()):
            if value is old:
                names[name] = new


class _Finder(MetaPathFinder):
    """Wraps the import of the loader's module, to patch it right after."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module by the other finders, and wrap its import loader."""
        if name != LOADER_MODULE:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _PatchingLoader(spec.loader)
            if spec is not None:
                return spec
        return None


class _PatchingLoader(Loader):
    """Executes the module by its own import loader, then replaces the function it defined."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module by its own import loader."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then patch it unless everything was uninstalled meanwhile."""
        module.__loader__ = self._inner  # leave no trace of the hook in the module
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        if _installed:
            _replace(module)


_finder = _Finder()
