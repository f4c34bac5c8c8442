"""`paroquant-stream COMMAND ...`, which is `python -m paroquant_stream COMMAND ...`."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import NoReturn

from ..version import __version__
from .common import add_help, end_with

COMMANDS = ("cache", "convert", "env", "export", "run")
DESCRIPTION = "ParoQuant checkpoints as MLX-native cache entries: converted once, loaded fast."
EXAMPLES = (
    "paroquant-stream convert owner/name --jobs 8",
    "paroquant-stream cache ls",
    "paroquant-stream export path/to/model my-export",
    "paroquant-stream env",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command named first and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    first = arguments[0] if arguments else ""
    if first in COMMANDS:
        code: int = import_module(f".{first}", __package__).main(arguments[1:])
        return code
    if first == "--version":  # at once: help imports every command
        print(f"paroquant-stream {__version__}")
        return 0
    parser = make_parser()
    if first in ("-h", "--help"):
        print(parser.format_help(), end="")  # argparse would hide that nobody reads it
        return 0
    if first:
        print(f"error: no command {first!r}", file=sys.stderr)
    parser.print_help(sys.stderr)
    return 2


def make_parser(configured: bool = False) -> argparse.ArgumentParser:
    """Return the parser of all commands.

    Args:
        configured: Whether they have their arguments, not only their names.
    """
    parser = argparse.ArgumentParser("paroquant-stream", description=DESCRIPTION)
    add_help(parser, EXAMPLES)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands, each with its own --help")
    for name in COMMANDS:
        module = import_module(f".{name}", __package__)
        summary = (module.__doc__ or "").partition("\n")[0].partition(": ")[2]
        command = commands.add_parser(name, help=summary)
        if configured:
            module.configure_parser(command)
    return parser


def console() -> NoReturn:
    """Run the console script `paroquant-stream`."""
    end_with(main)
