"""COMMAND run: run a program with this loader in the place of paroquant's own."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from importlib.util import find_spec
from typing import Any

from ..api.install import install, uninstall
from ..errors import MissingExtraError, ParoquantStreamError, ProgramNotFoundError
from ..store.format import DTYPES, IO_BITS
from .common import add_cache_dir, add_jobs, print_error

USAGE = "python -m paroquant_stream.run [options] (-m MODULE | SCRIPT) [arguments of the program]"
DESCRIPTION = """\
Run a Python program in which paroquant's MLX loader is replaced by paroquant_stream's: its models
come from the cache and are converted first if they must be. Works for all that call
paroquant.inference.backends.mlx.load.load: paroquant's chat and serve commands, oMLX, scripts.
The program has its own arguments, __main__, sys.path and exit code; processes that it starts are
not changed."""
EPILOG = """\
examples:
  python -m paroquant_stream.run -m paroquant.cli.serve --model MODEL --port 8000
  python -m paroquant_stream.run --cache-dir /fast/cache script.py --an-option-of-the-script
  python -m paroquant_stream.run "$(command -v omlx)" serve"""


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_cache_dir(parser)
    add_jobs(parser, "workers (default: one per core, at most 8)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="source", help="the width of floating tensors"
    )
    parser.add_argument(
        "--io-bits", type=int, choices=IO_BITS, default=4, help="bits of embedding and head"
    )
    rest: Any = argparse.REMAINDER  # what follows belongs to the program, options too
    parser.add_argument("-m", dest="module", nargs=rest, help="run a module, as `python -m` does")
    parser.add_argument("script", nargs=rest, help="run a file, or a directory with __main__.py")


def main(argv: list[str] | None = None) -> int:
    """Run the program and return 0; its SystemExit and its other exceptions pass through."""
    parser = argparse.ArgumentParser(
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    configure_parser(parser)
    arguments = parser.parse_args(argv)
    program = arguments.module or arguments.script
    if not program:
        parser.error("which program? -m MODULE or SCRIPT")
    try:
        _run(program, arguments)
    except ParoquantStreamError as error:
        return print_error(error)
    return 0


def _run(program: list[str], arguments: argparse.Namespace) -> None:
    """Raise ProgramNotFoundError, LoaderMovedError, and what the program raises."""
    name, as_module = program[0], bool(arguments.module)
    _set_path(name, as_module)  # first: the program's own paroquant, if it has one, is the one
    try:
        install(
            cache_dir=arguments.cache_dir,
            jobs=arguments.jobs,
            dtype=arguments.dtype,
            io_bits=arguments.io_bits,
        )
    except MissingExtraError:
        print("note: paroquant is not installed, so no loader was replaced", file=sys.stderr)
    sys.argv = program
    try:
        if as_module:
            _find_module(name)
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            _find_script(name)
            runpy.run_path(name, run_name="__main__")
    finally:
        uninstall()


def _set_path(name: str, as_module: bool) -> None:
    """Set the first place of imports: the current directory for a module, else the script's."""
    if sys.flags.safe_path:  # python -P put none there
        return
    if as_module:
        sys.path[0] = os.getcwd()
    else:
        sys.path[0] = name if os.path.isdir(name) else os.path.dirname(os.path.realpath(name))


def _find_module(name: str) -> None:
    """Raise ProgramNotFoundError where `python -m` would say `No module named ...`."""
    try:
        spec = find_spec(name)
        package = spec is not None and spec.submodule_search_locations is not None
        found = find_spec(f"{name}.__main__") if package else spec
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # the parent package is there and lacks something that it needs
        found = None
    except ValueError:  # a name like `..x`
        found = None
    if found is None:
        raise ProgramNotFoundError(f"-m {name}: no such module, or a package without __main__")


def _find_script(name: str) -> None:
    path = os.path.join(name, "__main__.py") if os.path.isdir(name) else name
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ProgramNotFoundError(f"{path}: {error.strerror}") from error
