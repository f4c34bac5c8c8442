"""What code a process runs, so that a worker process with other code is found before it works.

A program has its code in memory while a worker reads it from disk, where another version may lie by
now. Compared are digests of functions and constants, not of files, which say nothing of memory.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import pkgutil
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

_UNITS = "paroquant_stream.transform.unit_pool"  # imports all that a unit needs
_DECIDES = re.compile(r"paroquant_stream\.(files|plan|store|transform)\.")
VERSIONS = {
    "version": "paroquant_stream:__version__",
    "transform": "paroquant_stream.store.format:TRANSFORM",
}


def identity() -> dict[str, Any]:
    """Return what this process would convert with, as values of JSON.

    Returns:
        The version of Python, that of the package and its transform, its directory, and a digest of
        each module that decides the bytes of an entry.
    """
    importlib.import_module(_UNITS)
    found = {name: pkgutil.resolve_name(where) for name, where in VERSIONS.items()}
    path = os.path.realpath(os.path.dirname(sys.modules["paroquant_stream"].__file__ or ""))
    names = sorted(name for name in sys.modules if _DECIDES.match(name))
    modules = {name: _digest(sys.modules[name]) for name in names}
    return {"python": sys.version, **found, "path": path, "modules": modules}


def difference(expected: dict[str, Any], answer: bytes) -> str | None:
    """Return how the identity of a worker differs from the expected one.

    Args:
        expected: The identity of this process, which may have more modules.
        answer: The identity of the worker, in JSON.

    Returns:
        What was expected and found, or None if the worker runs the same code.
    """
    try:
        found = json.loads(answer)
        modules = dict(found["modules"])
        for name in ("python", *VERSIONS, "path"):
            if found[name] != expected[name]:
                return f"{name}: expected {expected[name]}, found {found[name]}"
    except (ValueError, TypeError, KeyError):
        return "it answers something else"
    for name in sorted({_UNITS, *modules}):
        if modules.get(name) != expected["modules"].get(name):
            return f"{name} is not what this program has in memory"
    return None


def _digest(module: types.ModuleType) -> str:
    """Return a digest of the functions, classes and constants that a module defines."""
    digest = hashlib.sha256()
    for name, value in sorted(vars(module).items()):
        own = getattr(value, "__module__", None) == module.__name__ and callable(value)
        if own or name.isupper() or isinstance(value, functools.partial):
            digest.update(f"{name} {' '.join(_words(value, module.__name__))}\n".encode())
    return digest.hexdigest()


def _words(value: Any, home: str) -> Iterator[str]:
    """Yield a canonical form of a value; of what is of no module `home`, the name alone."""
    if isinstance(value, types.CodeType):
        yield value.co_code.hex()
        yield repr((value.co_argcount, value.co_kwonlyargcount, value.co_names))
        yield from _words(value.co_consts, home)
    elif isinstance(value, (tuple, list)):
        yield f"({len(value)}"
        for item in value:
            yield from _words(item, home)
    elif isinstance(value, dict):
        yield f"{{{len(value)}"
        for item in value.items():
            yield from _words(item, home)
    elif isinstance(value, (set, frozenset)):  # in another order in every process
        yield repr(sorted(" ".join(_words(item, home)) for item in value))
    elif isinstance(value, (str, bytes, int, float, complex, re.Pattern)):
        yield repr(value)
    elif getattr(value, "__module__", None) == home and isinstance(value, type):
        yield from (base.__qualname__ for base in value.__mro__)
        for name, member in sorted(vars(value).items()):
            if not name.startswith("__") or callable(member):
                yield name
                yield from _members(member, home)
    else:
        yield from _members(value, home)


def _members(value: Any, home: str) -> Iterator[str]:
    """Yield a canonical form of a function, or of what a decorator made of one."""
    if isinstance(value, types.FunctionType):
        yield value.__qualname__
        if value.__module__ == home:
            yield from _words((value.__code__, value.__defaults__, value.__kwdefaults__), home)
        if hasattr(value, "__wrapped__"):
            yield from _members(value.__wrapped__, home)
    elif isinstance(value, (staticmethod, classmethod)):
        yield from _members(value.__func__, home)
    elif isinstance(value, property):
        yield from _words((value.fget, value.fset), home)
    elif isinstance(value, functools.cached_property):
        yield from _members(value.func, home)
    elif isinstance(value, functools.partial):
        yield from _words((value.func, value.args, value.keywords), home)
    elif hasattr(value, "__wrapped__"):  # of functools.cache
        yield from _members(value.__wrapped__, home)
    elif isinstance(value, (str, bytes, int, float)):
        yield repr(value)
    else:
        yield getattr(value, "__qualname__", type(value).__qualname__)
