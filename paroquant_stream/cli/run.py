"""COMMAND run: run a program that loads ParoQuant models by this loader."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from importlib.util import MAGIC_NUMBER, find_spec
from typing import Any

from ..api.install import install, uninstall
from ..errors import MissingExtraError, ParoquantStreamError, ProgramNotFoundError
from ..integrations.switch import VARIABLE, VARIABLES, child_environment
from ..store.format import DTYPES
from .arguments import Parser, add_cache_dir, add_help, add_io_bits, add_jobs, typed
from .common import print_error

USAGE = """\
%(prog)s [options]
       (-m MODULE | SCRIPT) [arguments of the program]"""
DESCRIPTION = """\
Run a Python program in which ParoQuant models are loaded by paroquant_stream: they come from the
cache and are converted first if they must be. Works for all that load by paroquant, mlx_lm or
mlx_vlm: their generate, chat and server commands, oMLX, scripts. Other models load as always.
The program has its own arguments, __main__, sys.path and exit code. Python processes that it starts
are changed too, by variables of the environment, unless they ignore it (python -E, -I).
What starts by itself, or is no Python file: see `paroquant-stream switch --help`."""
EXAMPLES = (
    "paroquant-stream run -m mlx_lm generate --model MODEL",
    "paroquant-stream run -m mlx_vlm server --model MODEL",
    "paroquant-stream run --jobs 4 script.py --its-option",
    'paroquant-stream run "$(command -v omlx)" serve',
)


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_help(parser, EXAMPLES)
    add_cache_dir(parser)
    add_jobs(parser, "workers (default: one per core, at most 16)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="source",
        metavar="D",
        help="the width of floating tensors: source (default), float16 or bfloat16",
    )
    add_io_bits(parser, "bits of embedding and head: 4 (default) or 8")
    rest: Any = argparse.REMAINDER  # what follows belongs to the program, options too
    parser.add_argument("-m", dest="module", nargs=rest, help="run a module, as `python -m` does")
    parser.add_argument("script", nargs=rest, help="run a file, or a directory with __main__.py")


def main(argv: list[str] | None = None) -> int:
    """Run the program and return 0; its SystemExit and its other exceptions pass through."""
    parser = Parser(
        typed("run"),
        usage=USAGE,
        description=DESCRIPTION,
        allow_abbrev=False,
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
    """Raise ProgramNotFoundError, and what the program raises."""
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
        print(
            "note: neither paroquant nor mlx-lm nor mlx-vlm is installed: no loader was replaced",
            file=sys.stderr,
        )
    sys.argv = program
    before = dict(os.environ)
    how = (arguments.cache_dir, arguments.jobs, arguments.dtype, arguments.io_bits)
    os.environ.update(child_environment(*how))
    try:
        if as_module:
            _find_module(name)
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            _find_script(name)
            runpy.run_path(name, run_name="__main__")
    finally:
        for variable in VARIABLES:
            os.environ.pop(variable, None)
        os.environ.update({k: v for k, v in before.items() if k in VARIABLES})
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
        with open(path, "rb") as file:
            start = file.read(1024)
    except OSError as error:
        raise ProgramNotFoundError(f"{path}: {error.strerror}") from error
    if (kind := _other_kind(start)) is not None:
        raise ProgramNotFoundError(
            f"{path}: {kind}, not Python: run the Python program that it starts, or start it as "
            f"always with {VARIABLE}=1, once `switch on` was called for its Python "
            "(paroquant-stream switch --help)"
        )


def _other_kind(start: bytes) -> str | None:
    """Return what a file is if it is certainly no Python program, by its first bytes."""
    first, _, rest = start.partition(b"\n")
    if first.startswith(b"#!"):
        words = [os.path.basename(word) for word in os.fsdecode(first[2:]).split()]
        names = [word for word in words if word != "env" and not word.startswith("-")]
        name = names[0] if names else "nothing"
        # pip's launchers begin as a shell script where the path of Python is long
        is_python = any(part in name for part in ("python", "pypy")) or rest.startswith(b"'''")
        return None if is_python else f"a script for {name}"
    archive_or_code = start.startswith((b"PK", MAGIC_NUMBER))
    return "a binary program" if b"\0" in start and not archive_or_code else None
