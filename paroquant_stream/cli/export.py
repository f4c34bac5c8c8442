"""COMMAND export: a converted model as a directory for MLX programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..conversion.request import make_request
from ..exports.single_file import NAME
from ..text import bytes_text, parse_size, shown
from .common import add_cache_dir, add_jobs, option_type, run_command
from .progress_bar import Progress

DESCRIPTION = """\
Write a ParoQuant model as an MLX model directory OUT: safetensors files, index, config, tokenizer.
What is not converted yet is converted first. paroquant_stream.load(OUT) reads it. With
--self-contained it holds one Python file too, by which mlx_lm.generate and mlx_lm.server run it
without this package; they run that file only with --trust-remote-code. Of a vision model the text
part is written. OUT appears complete or not at all. --single-file writes one file that load() finds
in a model directory. Exit code: 0 done, 1 failed, 2 wrong usage, 130
or 143 interrupted."""


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", help="a model directory, or a Hub repository id like owner/name")
    parser.add_argument(
        "out",
        metavar="OUT",
        nargs="?",
        help="the directory to write, which must not exist; with --single-file a file or a "
        "directory (default: the model's own)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--self-contained",
        action="store_true",
        help="add the code by which mlx-lm runs it without this package",
    )
    what.add_argument(
        "--single-file",
        action="store_true",
        help=f"write one {NAME} instead, which load() finds beside config.json",
    )
    parser.add_argument(
        "--beside-shards",
        action="store_true",
        help="write the single file even where shards lie: programs that read every .safetensors "
        "file of a directory then see the model twice",
    )
    parser.add_argument(
        "--shard-size",
        type=option_type(parse_size),
        default="5GB",
        metavar="SIZE",
        help="the largest file, like 500MB (default: 5GB); a larger tensor has its own file",
    )
    parser.add_argument(
        "--revision", metavar="R", help="branch, tag or commit of a Hub repository (default: main)"
    )
    add_jobs(parser, "workers (default: one per core, at most 8)")
    add_cache_dir(parser)
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser("python -m paroquant_stream.export", description=DESCRIPTION)
    configure_parser(parser)
    arguments = parser.parse_args(argv)
    if arguments.out is None and not arguments.single_file:
        parser.error("OUT is needed, unless --single-file writes into the model directory")
    if arguments.beside_shards and not arguments.single_file:
        parser.error("--beside-shards is for --single-file")
    write = _write_single if arguments.single_file else _write_directory
    return run_command(lambda: write(arguments), "nothing was exported, run again")


def _write_single(arguments: argparse.Namespace) -> int:
    from ..exports.single_file_writer import export_single_file

    request = make_request(
        arguments.model,
        cache_dir=arguments.cache_dir,
        jobs=arguments.jobs,
        revision=arguments.revision,
    )
    out = Path(arguments.out).expanduser() if arguments.out else None
    with Progress(arguments.quiet) as progress:
        path, size = export_single_file(
            request, out, progress, beside_shards=arguments.beside_shards
        )
    if not arguments.quiet:
        print(shown(f"{path}: {bytes_text(size)}"))
    return 0


def _write_directory(arguments: argparse.Namespace) -> int:
    from ..exports.mlx_directory_writer import MODEL_FILE, export_model

    with Progress(arguments.quiet) as progress:
        export = export_model(
            arguments.model,
            arguments.out,
            self_contained=arguments.self_contained,
            shard_size=arguments.shard_size,
            cache_dir=arguments.cache_dir,
            jobs=arguments.jobs,
            revision=arguments.revision,
            progress=progress,
        )
    if arguments.quiet:
        return 0
    noun = "file" if export.files == 1 else "files"
    print(shown(f"{export.directory}: {export.files} {noun}, {bytes_text(export.nbytes)}"))
    if export.text_only:
        print("its text part only: the vision and audio towers are left out")
    if arguments.self_contained:
        print(f"it contains code, {MODEL_FILE}, that mlx-lm runs only with --trust-remote-code")
    return 0
