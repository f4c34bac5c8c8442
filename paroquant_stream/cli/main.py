"""`paroquant-stream COMMAND ...`, which is `python -m paroquant_stream COMMAND ...`."""
# PYTHON_ARGCOMPLETE_OK: what argcomplete's completion for all programs looks for

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection
from importlib import import_module
from typing import NoReturn

from ..version import __version__
from .arguments import Parser, add_help, near, typed, usage_error
from .common import complain, end_with, print_refusal

COMMANDS = {
    "cache": "list, verify and remove converted models",
    "convert": "convert checkpoints into MLX-native cache entries, shard by shard",
    "env": "print what a bug report needs: versions, MLX's device, the cache",
    "export": "write a converted model as a directory for MLX programs",
    "run": "run a program in which ParoQuant models are loaded by this loader",
    "switch": "the same for programs that others start, such as services",
}
"""What each command does; its module is imported when it is called."""
DESCRIPTION = "ParoQuant checkpoints as MLX-native cache entries: converted once, loaded fast."
EXAMPLES = (
    "paroquant-stream convert owner/name --jobs 8",
    "paroquant-stream cache ls",
    "paroquant-stream export path/to/model my-export",
    "paroquant-stream run -m mlx_lm server --model MODEL",
    "paroquant-stream env",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command named first and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    first = arguments[0] if arguments else ""
    if first in COMMANDS:
        try:
            command = import_module(f".{first}", __package__)
        except (OSError, ImportError) as error:
            return print_refusal(error)
        code: int = command.main(arguments[1:])
        return code
    if first == "--version":
        print(f"paroquant-stream {__version__}")
        return 0
    parser = make_parser()
    if first in ("-h", "--help"):
        print(parser.format_help(), end="")  # argparse would hide that nobody reads it
        return 0
    wrong = usage_error(f"no command {first!r}{near(first, COMMANDS)}", typed())
    complain(wrong if first else parser.format_help())
    return 2


def make_parser(configured: Collection[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of all commands.

    Args:
        configured: Those that have their arguments too; the others only have their names.
    """
    parser = Parser(typed(), description=DESCRIPTION)
    add_help(parser, EXAMPLES)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands, each with its own --help")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name in configured:
            import_module(f".{name}", __package__).configure_parser(command)
    return parser


def console() -> NoReturn:
    """Run the console script `paroquant-stream`, or answer a shell that asks what can follow."""
    if "_ARGCOMPLETE" in os.environ:
        from .completion import complete  # here, as nothing else needs it

        complete(make_parser(os.environ.get("COMP_LINE", "").split()))
    end_with(main)
