"""Replaces a function of another package in this process, and restores it.

Programs look a loader up in its module at each load, or imported the function once. So the name in
the module is replaced, and every name in any loaded module that is bound to the very function: a
name is looked at by identity, never by its spelling, so nothing else can be caught. References
outside of a module's names (a class attribute, a `functools.partial`) keep the old function.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)
Function = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """A call of a replaced function."""

    home: ModuleType
    """The module that defines the function."""
    original: Function
    arguments: dict[str, Any]
    """Parameter -> value, the defaults included; without those that `**` collects."""
    more: dict[str, Any]
    """What `**` collects."""
    passed: inspect.BoundArguments

    def forward(self, **changed: Any) -> Any:
        """Call the original function.

        Args:
            **changed: Parameters that are given another value than the caller gave.
        """
        self.passed.arguments.update(changed)
        return self.original(*self.passed.args, **self.passed.kwargs)


class Replacement:
    """A function of another package, and what is called in its place.

    Args:
        module: The module that defines it.
        name: Its name.
        expected: The parameters without which it is another function than the one known.
        call: Called with a `Call` in its place; None from `active` calls the original.
        active: Whether calls are to be replaced now.
    """

    def __init__(
        self,
        module: str,
        name: str,
        expected: tuple[str, ...],
        call: Callable[[Call], Any],
        active: Callable[[], bool],
    ) -> None:
        self.module, self.name, self._expected = module, name, expected
        self._call, self._active = call, active
        self._replaced: list[tuple[Function, Function]] = []
        self._warned = False

    def apply(self, home: ModuleType) -> None:
        """Replace the function in its module and in every module that imported it by name.

        One warning, and nothing else, if the function has not the expected parameters.

        Args:
            home: The module, imported.
        """
        found = vars(home).get(self.name)
        if any(found is ours for _, ours in self._replaced):
            return
        problem = self._why_not(found)
        if problem or found is None:
            self._warn(problem)
            return
        for original, ours in self._replaced:
            if original is found:  # installed once more
                _swap(found, ours)
                return
        ours = self._wrap(home, found)
        self._replaced.append((found, ours))
        _swap(found, ours)

    def restore(self) -> None:
        """Bind every name of the replaced function to the original again."""
        for original, ours in self._replaced:
            _swap(ours, original)

    def _warn(self, problem: str | None) -> None:
        if not self._warned:
            self._warned = True
            package = self.module.partition(".")[0]
            logger.warning(
                "%s %s: %s.%s is not replaced: %s; paroquant_stream.load() loads ParoQuant models",
                *(package, _installed_version(package), self.module, self.name, problem),
            )

    def _why_not(self, found: Any) -> str | None:
        if not callable(found):
            return "there is no such function"
        try:
            parameters = list(inspect.signature(found).parameters)
        except (TypeError, ValueError):
            return "its parameters are unknown"
        if missing := [name for name in self._expected if name not in parameters]:
            return f"it takes ({', '.join(parameters)}), without {', '.join(missing)}"
        return None

    def _wrap(self, home: ModuleType, original: Function) -> Function:
        signature = inspect.signature(original)
        collected = next(
            (p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), ""
        )

        @wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if not self._active():  # kept by a program after `uninstall`
                return original(*args, **kwargs)
            try:
                passed, complete = (signature.bind(*args, **kwargs) for _ in range(2))
            except TypeError:
                return original(*args, **kwargs)  # says it in its own words
            complete.apply_defaults()
            arguments = dict(complete.arguments)
            more = arguments.pop(collected, {})
            return self._call(Call(home, original, arguments, more, passed))

        replaced.replaced_by = __package__  # type: ignore[attr-defined]
        return replaced


def _installed_version(package: str) -> str:
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return "(of unknown version)"


def _swap(old: object, new: object) -> None:
    """Bind every name of an object in any loaded module to another object."""
    for module in list(sys.modules.values()):
        try:  # not by getattr, at which a lazy module would import itself
            names = object.__getattribute__(module, "__dict__")
        except AttributeError:  # sys.modules may hold any object
            continue
        for name, value in list(names.items()):
            if value is old:
                names[name] = new
