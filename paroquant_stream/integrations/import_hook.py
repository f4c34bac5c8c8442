"""Calls a function right after a module is imported, so that nothing has to be imported for it.

Imports nothing at run time: an interpreter that `paroquant-stream switch` was turned on for loads
this module at its start.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as `typing` has it, which takes a millisecond to import
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    Action = Callable[[ModuleType], None]

LOADER_MODULES = ("paroquant.inference.backends.mlx.load", "mlx_lm.utils", "mlx_vlm.utils")
"""The modules of other packages that define loaders; paroquant's as of 0.1.16."""
_actions: dict[str, list[Action]] = {}
"""Module name -> what is called after each import of it."""


def after_import(name: str, action: Action) -> None:
    """Call a function after each import of a module, also a repeated one.

    Args:
        name: The module's full name. It may be absent.
        action: Is given the module; what it raises fails the import.
    """
    _actions.setdefault(name, []).append(action)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def forget(action: Action) -> None:
    """Undo every `after_import` of this action."""
    for name, actions in list(_actions.items()):
        actions[:] = [other for other in actions if other != action]
        if not actions:
            del _actions[name]
    if not _actions and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


class _Finder:
    """Finds watched modules by the other finders, and wraps their import loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a watched module; None for all others."""
        if name not in _actions:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _WatchingLoader(spec.loader)  # type: ignore[assignment]
                return spec
        return None

    def invalidate_caches(self) -> None:
        """Do nothing: nothing is cached."""


class _WatchingLoader:
    """Executes the module by its own import loader, then calls the actions."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:  # get_code, which runpy asks for
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module by its own import loader."""
        created: ModuleType | None = self._inner.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then call the actions that are there by then."""
        module.__loader__ = self._inner  # leave no trace of the hook in the module
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        for action in list(_actions.get(module.__name__, ())):
            action(module)


_finder = _Finder()
