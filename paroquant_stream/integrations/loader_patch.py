"""install(): paroquant's own MLX loader replaced by ours for this process, and put back.

Programs hold the loader in two ways: they ask its module when they load, or they took the function
when they were imported. So the name in the module is replaced, and every module's name that *is*
that function. paroquant is not imported for this (its loader takes 2.7 s and brings mlx-lm, which
a program may want to prepare first): a finder waits until somebody else imports it.
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

HOME = "paroquant.inference.backends.mlx.load"
"""The module with the loader, as of paroquant 0.1.16; oMLX and the package's own generator, chat
and serve commands take it from there."""
_installed: list[Callable[..., Any]] = []
"""Our loader with the options of every install() that has had no uninstall(); the last counts."""
_original: Callable[..., Any] | None = None


def install(loader: Callable[..., Any], **options: Any) -> None:
    """Replaces paroquant's MLX loader by `paroquant_stream.load` in this process.

    `loader`: our own `load`. `options`: its keyword options for every call.
    Whoever imports the loader later gets ours too. Calls nest: each needs its `uninstall()`, and
    the options of the innermost count. What holds the function elsewhere than in a module's name
    (a class attribute, `functools.partial`) keeps the old one.

    Raises MissingExtraError without paroquant, LoaderMovedError when the installed version has no such
    loader or gives it other arguments, TypeError for options that `load()` does not have.
    """
    inspect.signature(loader).bind("a model", False, False, **options)
    home = sys.modules.get(HOME)
    if home is not None:
        _replace(home)
    else:
        _check_installed()
    _installed.append(partial(loader, **options))
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def uninstall() -> None:
    """Undoes the last `install()`; the outermost puts paroquant's loader back. Without one it does
    nothing.
    """
    if _installed:
        _installed.pop()
    if not _installed:
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        if _original is not None:
            _swap(load, _original)


def load(model_path: str, lazy: bool = False, force_text: bool = False) -> tuple[Any, Any, bool]:
    """`paroquant_stream.load` with the options of `install()`, under paroquant's signature.

    Whoever kept it beyond `uninstall()` gets paroquant's own.
    """
    current = _installed[-1] if _installed else _original
    assert current is not None  # whoever has this function had it from a module that was patched
    loaded: tuple[Any, Any, bool] = current(model_path, lazy, force_text)
    return loaded


def _check_installed() -> None:
    """Raises unless paroquant is there and has the loader's file; imports nothing of it."""
    try:
        package = find_spec("paroquant")
    except ValueError:  # a module of that name without a spec, as tests make them
        package = None
    if package is None:
        raise MissingExtraError(
            "paroquant is not installed, so there is no loader to replace: "
            "pip install 'paroquant[mlx]', or call paroquant_stream.load() yourself"
        )
    below = os.path.join(*HOME.split(".")[1:])
    for directory in package.submodule_search_locations or ():
        path = os.path.join(directory, below)
        if os.path.isfile(f"{path}.py") or os.path.isfile(os.path.join(path, "__init__.py")):
            return
    raise LoaderMovedError(_moved("it is not there"))


def _replace(home: ModuleType) -> None:
    """Our loader in `home` and wherever its loader was imported by name."""
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
    try:
        installed = version("paroquant")
    except PackageNotFoundError:
        installed = "(of unknown version)"
    return (
        f"paroquant {installed} does not have its MLX loader at {HOME}.load as 0.1.16 has: "
        f"{found}; install paroquant 0.1.16, or call paroquant_stream.load() yourself"
    )


def _swap(old: object, new: object) -> None:
    for module in list(sys.modules.values()):
        try:  # past __getattribute__: a lazy module would import itself here
            names = object.__getattribute__(module, "__dict__")
        except AttributeError:  # sys.modules may hold anything
            continue
        if names is globals():  # this room has to know both
            continue
        for name, value in list(names.items()):
            if value is old:
                names[name] = new


class _Finder(MetaPathFinder):
    """Notices the import of the loader's module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != HOME:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Replacing(spec.loader)
            if spec is not None:
                return spec
        return None


class _Replacing(Loader):
    """Runs the module as its own loader would, then replaces what it defined."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._inner  # nothing of ours stays in the module
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        if _installed:
            _replace(module)


_finder = _Finder()
