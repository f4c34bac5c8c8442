"""`paroquant-stream COMMAND ...`, which is `python -m paroquant_stream COMMAND ...`."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NoReturn

from ..version import __version__
from .common import end_with

COMMANDS = ("cache", "convert", "export", "run", "switch")


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
        if first:
            print(f"error: no command {first!r}", file=sys.stderr)
        print(_help(), file=sys.stderr)
        return 2
    code: int = import_module(f".{first}", __package__).main(arguments[1:])
    return code


def _help() -> str:
    """Return the help: each command with the first line of its module's docstring."""
    lines = []
    for name in COMMANDS:
        text = (import_module(f".{name}", __package__).__doc__ or "").partition("\n")[0]
        lines.append(f"  {name:9} {text.partition(': ')[2]}")
    return (
        "usage: paroquant-stream COMMAND ...\n\n"
        "ParoQuant checkpoints as MLX-native cache entries: converted once, loaded fast.\n\n"
        "commands, each with its own --help:\n" + "\n".join(lines) + "\n\n"
        "  -h, --help  show this\n  --version   show the version"
    )


def console() -> NoReturn:
    """Run the console script `paroquant-stream`."""
    end_with(main)
