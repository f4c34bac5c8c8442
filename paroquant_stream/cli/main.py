"""`paroquant-stream COMMAND ...`, which is `python -m paroquant_stream COMMAND ...`."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NoReturn

from ..version import __version__
from .common import complain, end_with, near, print_refusal, typed, usage_error

COMMANDS = ("cache", "convert", "export", "run")


def main(argv: list[str] | None = None) -> int:
    """Run the command named first and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        print(_help())
        return 0
    if first == "--version":
        print(f"paroquant-stream {__version__}")
        return 0
    if first not in COMMANDS:
        wrong = usage_error(f"no command {first!r}{near(first, COMMANDS)}", typed())
        complain(wrong if first else _help())
        return 2
    try:
        command = import_module(f".{first}", __package__)
    except (OSError, ImportError) as error:
        return print_refusal(error)
    code: int = command.main(arguments[1:])
    return code


def _help() -> str:
    """Return the help: each command with the first line of its module's docstring."""
    lines = []
    for name in COMMANDS:
        text = (import_module(f".{name}", __package__).__doc__ or "").partition("\n")[0]
        lines.append(f"  {name:9} {text.partition(': ')[2]}")
    return (
        f"usage: {typed()} COMMAND ...\n\n"
        "ParoQuant checkpoints as MLX-native cache entries: converted once, loaded fast.\n\n"
        "commands, each with its own --help:\n" + "\n".join(lines) + "\n\n"
        "  -h, --help  show this\n  --version   show the version"
    )


def console() -> NoReturn:
    """Run the console script `paroquant-stream`."""
    end_with(main)
