"""`python -m paroquant_stream COMMAND ...`."""

from __future__ import annotations

import sys

COMMANDS = ("cache", "convert", "export")


def main(argv: list[str] | None = None) -> int:
    """Runs the command named first and returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] not in COMMANDS:
        print(
            f"usage: paroquant-stream {{{','.join(COMMANDS)}}} ...  (each takes --help)",
            file=sys.stderr,
        )
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    from importlib import import_module

    command = import_module(f".{arguments[0]}", __package__)
    code: int = command.main(arguments[1:])
    return code


if __name__ == "__main__":
    from .convert import exit_now

    exit_now(main())
