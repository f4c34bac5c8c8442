"""What all commands share: help and option types, the question before a removal, exit codes."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn, TypeVar

from ..errors import ParoquantStreamError
from ..text import shown
from ..version import __version__

NO_READER = 141  # what a shell gives for a program that SIGPIPE ended, 128 + 13
_Value = TypeVar("_Value")


class Terminated(BaseException):
    """SIGTERM arrived; raised in the main thread so that temps are removed on the way out."""


def run_command(body: Callable[[], int], interrupted: str) -> int:
    """Run a command's body and turn what it raises into a message and an exit code.

    Args:
        body: Does the work and returns the exit code.
        interrupted: What to print after Ctrl-C or SIGTERM.

    Returns:
        The body's code, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return body()
    except ParoquantStreamError as error:
        return print_error(error)
    except (KeyboardInterrupt, Terminated) as stop:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, before)


def print_error(error: ParoquantStreamError) -> int:
    """Print an error's message, its control characters escaped, and return the exit code 1."""
    print(f"error: {shown(error, keep=chr(10))}", file=sys.stderr)
    return 1


def confirm(question: str, refused: ParoquantStreamError) -> None:
    """Ask a person on the terminal. Raises `refused` unless the answer is yes."""
    if not sys.stdin.isatty():
        raise type(refused)(f"{refused}: {question} There is no terminal to ask on; add -y")
    print(f"{shown(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise refused


def add_cache_dir(parser: argparse._ActionsContainer) -> None:
    """Add the option --cache-dir."""
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="the cache (default: ~/.cache/paroquant/mlx_cache)"
    )


def add_jobs(parser: argparse._ActionsContainer, text: str) -> None:
    """Add the option --jobs, a whole number from 1, with its help text."""
    parser.add_argument("--jobs", type=option_type(_parse_jobs), metavar="N", help=text)


def option_type(parse: Callable[[str], _Value]) -> Callable[[str], _Value]:
    """Make an option's type of a parser that raises ValueError; its message is kept."""

    def read(text: str) -> _Value:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _parse_jobs(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise ValueError("must be a whole number from 1 to 9999")
    return int(text)


CACHE_VARIABLES = {
    "PAROQUANT_STREAM_CACHE": "the cache, unless --cache-dir names one",
    "XDG_CACHE_HOME": "else it is paroquant/mlx_cache in here (default: ~/.cache)",
}
HUB_VARIABLES = {
    "HF_TOKEN": "for models of the Hub that are not public",
    "HF_HOME, HF_HUB_CACHE": "where the Hub's files lie (default: ~/.cache/huggingface)",
    "HF_ENDPOINT": "another Hub than huggingface.co",
    "HF_HUB_OFFLINE": "1: ask no Hub, use what is on the disk",
}
TERMINAL_VARIABLES = {
    "COLUMNS": "the width of help and lists (default: the terminal's)",
    "NO_COLOR": "no colors in help, which Python has from 3.14",
}


def add_help(parser: argparse.ArgumentParser, examples: Sequence[str], hub: bool = True) -> None:
    """Add --version, and examples and environment variables at the end of the help.

    Args:
        parser: Of a command.
        examples: Command lines of at most 58 characters.
        hub: Whether the command can use models of the Hub.
    """
    parser.formatter_class = HelpFormatter
    variables = CACHE_VARIABLES | (HUB_VARIABLES if hub else {}) | TERMINAL_VARIABLES
    parser.epilog = "\n".join(
        [
            "examples:",
            *(f"  {example}" for example in examples),
            "",
            "environment:",
            *(f"  {name}\t{text}" for name, text in variables.items()),
        ]
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"paroquant-stream {__version__}",
        help="print the version",
    )


class HelpFormatter(argparse.HelpFormatter):
    """Wraps help at the terminal's width and at most 100 columns; lines that begin with spaces stay
    as they are, and after a tab stands a second column.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        width = min(shutil.get_terminal_size().columns, 100) - 2
        super().__init__(
            prog, **{"width": width, "max_help_position": min(24, width // 3)} | options
        )

    # private, both: argparse has no public way
    def _format_usage(self, *arguments: Any) -> str:
        text = super()._format_usage(*arguments)
        too_long = max(map(len, text.splitlines())) > self._width  # words like [--a A | --b] stay
        return re.sub(r"\n {8,}", f"\n{' ' * 7}", text) if too_long else text

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for paragraph in re.split(r"\n(?=\n|  )", text):
            if paragraph.startswith("  "):
                name, _, rest = paragraph.partition("\t")
                lines += (
                    textwrap.wrap(f"{name:26}{rest}", width, subsequent_indent=" " * 26)
                    if rest
                    else [name]
                )
            else:
                lines += ["", *textwrap.wrap(" ".join(paragraph.split()), width)]
        return "\n".join(lines).strip("\n")


def end_with(main: Callable[[], int]) -> NoReturn:
    """Run a command and end the process with its code.

    A reader of its output that went away (`| head -1`) ends it quietly with 141. After an interrupt
    it does not wait for workers that are still inside a system call.
    """
    try:
        code = _run(main)
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = NO_READER
        _drop_output()
    if threading.active_count() > 1 and code in (130, 143):
        os._exit(code)
    sys.exit(code)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def _run(main: Callable[[], int]) -> int:
    try:
        return main()
    except SystemExit as stop:  # argparse, after --help or wrong usage
        return stop.code if isinstance(stop.code, int) else 0


def _drop_output() -> None:
    """Give what is still buffered a place to go: the interpreter flushes once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
