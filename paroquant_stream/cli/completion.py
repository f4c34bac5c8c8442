"""Completion of the command line in a shell, by argcomplete: the shell runs the program, which
answers with what can follow instead of doing anything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from ..errors import ParoquantStreamError
from ..maintenance.inventory import take_inventory
from ..maintenance.listing import FIELDS, ORDERS
from ..maintenance.models import Model
from ..store.store import cache_store
from ..text import shown

_LISTED = ("ls", "path", "rm", "prune")  # they take names as `cache ls` shows them


def complete(parser: argparse.ArgumentParser) -> NoReturn:
    """Answer the shell and end the process; without argcomplete with nothing.

    Args:
        parser: Of the program, with all commands and their arguments.
    """
    try:
        import argcomplete
        from argcomplete.completers import ChoicesCompleter, DirectoriesCompleter, FilesCompleter
    except ImportError:
        sys.exit(1)  # not installed here, though the shell asks for it

    directories, files = DirectoriesCompleter(), FilesCompleter()

    def models(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
        names = [name for name in _sources(parsed_args) if name.startswith(prefix)]
        return [*names, *directories(prefix)]

    def listed(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
        names = [name for name in _names(parsed_args) if name.startswith(prefix)]
        return names or [*directories(prefix)]

    known = {
        "cache_dir": directories,
        "filter": lambda **_: [f"{field}=" for field in FIELDS],
        "keep": listed,
        "model": models,
        "models": models,
        "out": directories,
        "script": files,
        "sort": lambda **_: list(ORDERS),
        "trace": files,
    }
    for command, action in _actions(parser):
        if action.dest in known:
            of_cache = command in _LISTED and action.dest in ("model", "models")
            completer = listed if of_cache else known[action.dest]
            setattr(action, "completer", completer)  # noqa: B010 - where argcomplete looks
    argcomplete.autocomplete(
        parser, always_complete_options=False, default_completer=ChoicesCompleter({})
    )
    raise AssertionError("argcomplete ends the process")


def _actions(
    parser: argparse.ArgumentParser, name: str = ""
) -> Iterator[tuple[str, argparse.Action]]:
    """List the arguments of a parser and of its commands, each with its command's name."""
    for action in parser._actions:  # private: there is no public list
        if isinstance(action, argparse._SubParsersAction):
            for command, of_command in action.choices.items():
                yield from _actions(of_command, command)
        else:
            yield name, action


def _models(arguments: argparse.Namespace) -> tuple[Model, ...]:
    """Return the models of the cache that the command line names; none if it cannot be read."""
    try:
        return take_inventory(cache_store(getattr(arguments, "cache_dir", None))).models
    except (ParoquantStreamError, OSError):
        return ()


def _names(arguments: argparse.Namespace) -> list[str]:
    """Return the models' names as `cache ls` shows them."""
    return [shown(model.name) for model in _models(arguments)]


def _sources(arguments: argparse.Namespace) -> list[str]:
    """Return what `convert` takes for the models of the cache: directories and Hub ids."""
    found = [
        model.name.partition("@")[0]
        if model.directory.parent.name == "snapshots"
        else shown(model.directory)
        for model in _models(arguments)
        if model.directory
    ]
    return list(dict.fromkeys(found))
