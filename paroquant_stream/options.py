"""Checks of the options of public functions, made before anything is read or written."""

from __future__ import annotations

import os
from collections.abc import Iterable


def check(name: str, value: object, allowed: str, fits: bool) -> None:
    """Raise ValueError, which names the option, its value and what is allowed, unless it fits."""
    if not fits:
        raise ValueError(f"{name} is {allowed}, not {value!r}")


def check_flags(**flags: object) -> None:
    """Raise ValueError unless each is True or False: any text, also "no", would count as True."""
    for name, value in flags.items():
        check(name, value, "True or False", isinstance(value, bool))


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless the value is one of these texts."""
    choices = tuple(choices)
    fits = isinstance(value, str) and value in choices
    check(name, value, f"one of {', '.join(choices)}", fits)


def check_count(name: str, value: object, *, optional: bool = True) -> None:
    """Raise ValueError unless it is a whole number from 1, or, where optional, None."""
    fits = type(value) is int and value >= 1
    if optional:
        check(name, value, "a whole number, 1 or more, or None", fits or value is None)
    else:
        check(name, value, "a whole number, 1 or more", fits)


def check_path(name: str, value: object, *, optional: bool = True) -> None:
    """Raise ValueError unless it is text or a Path, or, where optional, None."""
    fits = isinstance(value, str) or (
        isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)
    )
    if optional:
        check(name, value, "a path or None", fits or value is None)
    else:
        check(name, value, "a path", fits)
