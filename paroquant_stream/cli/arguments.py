"""What the commands' parsers share: one-line errors, help with examples, option types."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

from ..store.format import IO_BITS
from ..text import shown
from ..version import __version__

_Value = TypeVar("_Value", int, float, str)
_CHOICE = (
    r"(?P<where>.*)invalid choice: ['\"]?(?P<word>.*?)['\"]?,? .*\(choose from (?P<choices>.*)\)"
)
"""What argparse says of a wrong word; its quotes differ between versions of Python."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest word to one that it does not know."""

    def __init__(self, prog: str, **keywords: Any) -> None:
        # from the start: its own formatter imports shutil, for the width, with the first argument
        super().__init__(prog, formatter_class=HelpFormatter, **keywords)

    def parse_known_args(self, *arguments: Any, **keywords: Any) -> Any:
        """Parse; ends the process with 2 for a word that no argument takes."""
        found, unknown = super().parse_known_args(*arguments, **keywords)
        if unknown:
            option = unknown[0].partition("=")[0]
            if not option.startswith("-"):
                self.error(f"unexpected word {option!r}; options stand before or after the names")
            self.error(f"no option {option!r}{near(option, list(self._option_string_actions))}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print one line that says what is wrong, and end the process with 2."""
        if match := re.fullmatch(_CHOICE, message):
            choices = re.findall(r"[^\s',]+", match["choices"])
            message = (
                f"{match['where']}{match['word']!r} is none of {', '.join(choices)}"
                f"{near(match['word'], choices)}"
            )
        self.exit(2, f"{usage_error(message, self.prog)}\n")


def usage_error(message: str, prog: str) -> str:
    """Return the line that says what is wrong with a command line, and where its help is."""
    see = " See" if message.endswith("?") else "; see"
    return f"error: {shown(message)}{see} `{prog} --help`"


def near(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the known word that is most like this one, if one is."""
    from difflib import get_close_matches  # for a wrong word alone

    found = get_close_matches(word, [*known], 1)
    return f"; did you mean {found[0]}?" if found else ""


def typed(command: str = "") -> str:
    """Return how a person calls a command, in the way in which this process was called."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    package, _, module = (spec.name if spec else "").partition(".")
    if package != __package__.partition(".")[0]:
        return f"paroquant-stream {command}".rstrip()
    python = f"{_quoted(sys.orig_argv[0])} -m {package}"
    return f"{python} {command}".rstrip() if module == "__main__" else f"{python}.{command}"


def _quoted(path: str) -> str:
    """Quote a word for a shell, if it must be."""
    if path.isascii() and path.translate(dict.fromkeys(map(ord, "/._-"))).isalnum():
        return path
    from shlex import quote  # for rare names of Python

    return quote(path)


def add_cache_dir(parser: argparse._ActionsContainer) -> None:
    """Add the option --cache-dir."""
    parser.add_argument(
        "--cache-dir",
        type=option_type(_parse_directory),
        metavar="DIR",
        help="the cache (default: ~/.cache/paroquant/mlx_cache)",
    )


def add_jobs(parser: argparse._ActionsContainer, text: str) -> None:
    """Add the option --jobs, a whole number from 1, with its help text."""
    parser.add_argument("--jobs", type=option_type(_parse_jobs), metavar="N", help=text)


def add_io_bits(parser: argparse._ActionsContainer, text: str) -> None:
    """Add the option --io-bits, 4 or 8, with its help text."""
    parser.add_argument("--io-bits", type=int, choices=IO_BITS, default=4, metavar="B", help=text)


def option_type(parse: Callable[[str], _Value]) -> Callable[[str], _Value]:
    """Make an option's type of a parser that raises ValueError; its message is kept."""

    def read(text: str) -> _Value:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _parse_directory(text: str) -> str:
    if not text.strip():
        raise ValueError("the name of a directory is empty")
    return text


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


def _columns() -> int:
    """Return the terminal's width as shutil does, which takes 2 ms to import."""
    with contextlib.suppress(ValueError):
        if (width := int(os.environ.get("COLUMNS", "0"))) > 0:
            return width
    with contextlib.suppress(ValueError, OSError):  # closed, or no terminal
        if sys.__stdout__ and (width := os.get_terminal_size(sys.__stdout__.fileno()).columns):
            return width
    return 80


class HelpFormatter(argparse.HelpFormatter):
    """Wraps help at the terminal's width and at most 100 columns; lines that begin with spaces stay
    as they are, and after a tab stands a second column.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        width = min(_columns(), 100) - 2
        super().__init__(
            prog, **{"width": width, "max_help_position": min(24, width // 3)} | options
        )

    # private, both: argparse has no public way
    def _format_usage(self, *arguments: Any) -> str:
        text = super()._format_usage(*arguments)
        too_long = max(map(len, text.splitlines())) > self._width  # words like [--a A | --b] stay
        return re.sub(r"\n {8,}", f"\n{' ' * 7}", text) if too_long else text

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        from textwrap import wrap  # for help alone

        lines: list[str] = []
        for paragraph in re.split(r"\n(?=\n|  )", text):
            if paragraph.startswith("  "):
                name, _, rest = paragraph.partition("\t")
                lines += (
                    wrap(f"{name:26}{rest}", width, subsequent_indent=" " * 26) if rest else [name]
                )
            else:
                lines += ["", *wrap(" ".join(paragraph.split()), width)]
        return "\n".join(lines).strip("\n")
