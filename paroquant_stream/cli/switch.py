"""COMMAND switch: let programs that others start load ParoQuant models by this loader."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import PackageNotFoundError, version

from ..integrations import switch
from .arguments import Parser, add_help, typed
from .common import run_command

DESCRIPTION = f"""\
For programs whose command you cannot change: services, launchers, wrappers. `on` writes one small
file into the site-packages of this Python: {switch.NAME}. It does nothing unless
{switch.VARIABLE}=1 is in a program's environment; then ParoQuant models are loaded as under
`run`, by paroquant, mlx_lm and mlx_vlm. {switch.CACHE}, {switch.JOBS},
{switch.DTYPE} and {switch.IO_BITS} stand for the options --cache-dir, --jobs,
--dtype and --io-bits of `run`.
Use the Python of the program: PYTHON -m paroquant_stream switch on. Then, for one:
  {switch.VARIABLE}=1 mlx_lm.server --model MODEL"""
EXAMPLES = (
    "paroquant-stream switch on",
    "paroquant-stream switch status",
    "paroquant-stream switch off",
)
PACKAGES = ("paroquant", "mlx-lm", "mlx-vlm")


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_help(parser, EXAMPLES)
    parser.add_argument(
        "action",
        choices=("on", "off", "status"),
        metavar="ACTION",
        help="on, off, or status: whether it is on, and which loaders are installed",
    )


def main(argv: list[str] | None = None) -> int:
    """Turn the switch on or off or show it, and return the exit code."""
    parser = Parser(typed("switch"), description=DESCRIPTION, allow_abbrev=False)
    configure_parser(parser)
    action = parser.parse_args(argv).action
    return run_command(lambda: _turn(action), "run `switch status` to see what was done")


def _turn(action: str) -> int:
    if action == "on":
        print(f"on: {switch.turn_on()}")
        print(f"Start the program with {switch.VARIABLE}=1 in its environment.")
    elif action == "off":
        removed = switch.turn_off()
        print("\n".join(f"removed {path}" for path in removed) or "was off")
    else:
        _print_status()
    return 0


def _print_status() -> None:
    found = switch.entries()
    value = os.environ.get(switch.VARIABLE)
    print(f"switch: {', '.join(map(str, found)) or 'off'}")
    print(f"{switch.VARIABLE}: {'not set here' if value is None else value}")
    print(f"python: {sys.executable}")
    print(f"loaders: {', '.join(filter(None, map(_installed, PACKAGES))) or 'none'}")


def _installed(package: str) -> str | None:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None
