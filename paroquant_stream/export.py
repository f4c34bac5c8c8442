"""COMMAND export: a converted model as a directory for MLX programs."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from types import FrameType

from .convert import Terminated, exit_now
from .errors import ParoquantStreamError
from .report import shown

DESCRIPTION = """\
Write a ParoQuant model as an MLX model directory OUT: safetensors files, index, config, tokenizer.
What is not converted yet is converted first. paroquant_stream.load(OUT) reads it. With
--self-contained it holds one Python file too, by which mlx_lm.generate and mlx_lm.server run it
without this package; they run that file only with --trust-remote-code. Of a vision model the text
part is written. OUT appears complete or not at all. Exit code: 0 done, 1 failed, 2 wrong usage, 130
or 143 interrupted."""
_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("model", help="a model directory, or a Hub repository id like owner/name")
    parser.add_argument("out", metavar="OUT", help="the directory to write; it must not exist")
    parser.add_argument(
        "--self-contained",
        action="store_true",
        help="add the code by which mlx-lm runs it without this package",
    )
    parser.add_argument(
        "--shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="the most a file holds, like 500MB (default: 5GB); a larger tensor has its own file",
    )
    parser.add_argument(
        "--revision", metavar="R", help="branch, tag or commit of a Hub repository (default: main)"
    )
    parser.add_argument(
        "--jobs", type=_positive, metavar="N", help="workers (default: one a core, at most 8)"
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="the cache (default: ~/.cache/paroquant/mlx_cache)"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([kKMGT]?B?)", text)
    if not match or match[2] not in _UNITS or float(match[1]) * _UNITS[match[2]] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 500MB or 5GB")
    return int(float(match[1]) * _UNITS[match[2]])


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,3}", text):
        raise argparse.ArgumentTypeError("must be a number, 1 or more")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser("python -m paroquant_stream.export", description=DESCRIPTION)
    configure_parser(parser)
    arguments = parser.parse_args(argv)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(arguments)
    except ParoquantStreamError as error:
        print(f"error: {shown(error, keep=chr(10))}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Terminated) as stop:
        print("interrupted; nothing was exported, run again", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def _run(arguments: argparse.Namespace) -> int:
    from .mlx_directory import MODEL_FILE, export_model  # with MLX, which --help does not need

    export = export_model(
        arguments.model,
        arguments.out,
        self_contained=arguments.self_contained,
        shard_size=arguments.shard_size,
        cache_dir=arguments.cache_dir,
        jobs=arguments.jobs,
        revision=arguments.revision,
    )
    if arguments.quiet:
        return 0
    noun = "file" if export.files == 1 else "files"
    print(shown(f"{export.directory}: {export.files} {noun}, {export.nbytes:,} bytes"))
    if export.text_only:
        print("its text part only: the vision and audio towers are left out")
    if arguments.self_contained:
        print(f"it contains code, {MODEL_FILE}, that mlx-lm runs only with --trust-remote-code")
    return 0


if __name__ == "__main__":
    exit_now(main())
