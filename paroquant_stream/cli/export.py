"""COMMAND export: a converted model as a directory for MLX programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..api.export import SHARD_SIZE, export_model
from ..conversion.in_place import dtypes_converted
from ..conversion.request import make_request
from ..exports.single_file import NAME
from ..progress_bar import reported
from ..store.format import DTYPES, Dtype
from ..text import bytes_text, parse_size, shown
from .arguments import Parser, add_cache_dir, add_help, add_jobs, option_type, typed
from .common import complain, run_command

DESCRIPTION = """\
Write a ParoQuant model as an MLX model directory OUT: safetensors files, index, config, tokenizer.
What is not converted yet is converted first. paroquant_stream.load(OUT) reads it. With
--self-contained it holds one Python file too, by which mlx_lm.generate and mlx_lm.server run it
without this package; they run that file only with --trust-remote-code. Of a vision model the text
part is written; with --vision its towers too, and two Python files by which mlx-vlm 0.6.16 or newer
runs it, without asking. OUT appears complete or not at all. --single-file writes one file that
load() finds in a model directory. Exit code: 0 done, 1 failed, 2 wrong usage, 130 or 143
interrupted."""
EXAMPLES = (
    "paroquant-stream export path/to/model my-export",
    "paroquant-stream export owner/name out --self-contained",
    "paroquant-stream export vision/model out --vision",
    "paroquant-stream export path/to/model --single-file",
)


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_help(parser, EXAMPLES)
    parser.add_argument(
        "model", metavar="MODEL", help="a model directory, or a Hub repository id like owner/name"
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        nargs="?",
        help="the directory to write, which must not exist; with --single-file a file or a "
        "directory (default: the model's own)",
    )
    _add_kinds(parser)
    parser.add_argument(
        "--shard-size",
        type=option_type(_parse_shard_size),
        metavar="SIZE",
        help="the largest file, like 500MB (default: 5GB); a larger tensor has its own file",
    )
    parser.add_argument(
        "--revision", metavar="R", help="branch, tag or commit of a Hub repository (default: main)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="which conversion to write (default: source, or the only one that there is)",
    )
    add_jobs(parser, "workers (default: one per core, at most 16)")
    add_cache_dir(parser)
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_kinds(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is written."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--self-contained",
        action="store_true",
        help="add the code by which mlx-lm runs it without this package",
    )
    what.add_argument(
        "--vision",
        action="store_true",
        help="write a vision model with its towers and the code by which mlx-vlm runs it",
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


def _parse_shard_size(text: str) -> int:
    if (size := parse_size(text)) == 0:
        raise ValueError("a file holds at least one byte")
    return size


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(typed("export"), description=DESCRIPTION)
    configure_parser(parser)
    arguments = parser.parse_args(argv)
    if arguments.single_file and arguments.shard_size is not None:
        parser.error("--single-file writes one file, whatever --shard-size says")
    if arguments.single_file and arguments.dtype not in (None, "source"):
        parser.error("--single-file takes no --dtype: load() takes that file for the source's bits")
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
    with reported(not arguments.quiet) as phase:
        path, size = export_single_file(request, out, phase, beside_shards=arguments.beside_shards)
    if not arguments.quiet:
        print(shown(f"{path}: {bytes_text(size)}"))
    return 0


def _converted_dtype(arguments: argparse.Namespace) -> Dtype:
    """Return the dtype to which the model is converted; "source" where there is a choice."""
    request = make_request(
        arguments.model, cache_dir=arguments.cache_dir, revision=arguments.revision
    )
    found = dtypes_converted(request)
    if len(found) != 1 or found == ["source"]:
        return "source"
    if not arguments.quiet:
        complain(
            f"note: writes its one conversion, --dtype {found[0]}; --dtype source makes another"
        )
    return found[0]


def _write_directory(arguments: argparse.Namespace) -> int:
    export = export_model(
        arguments.model,
        arguments.out,
        self_contained=arguments.self_contained,
        vision=arguments.vision,
        shard_size=arguments.shard_size or SHARD_SIZE,
        cache_dir=arguments.cache_dir,
        jobs=arguments.jobs,
        revision=arguments.revision,
        dtype=arguments.dtype or _converted_dtype(arguments),
        progress=not arguments.quiet,
    )
    if arguments.quiet:
        return 0
    noun = "file" if export.files == 1 else "files"
    print(shown(f"{export.directory}: {export.files} {noun}, {bytes_text(export.nbytes)}"))
    if export.text_only:
        print("its text part only: the vision and audio towers are left out (--vision keeps them)")
    from ..exports.exported_config import MODEL_FILE, VISION_FILE  # brings MLX

    if arguments.self_contained:
        print(f"it contains code, {MODEL_FILE}, that mlx-lm runs only with --trust-remote-code")
    if arguments.vision:
        print(f"it contains code, {VISION_FILE} and {MODEL_FILE}, that mlx-vlm runs without asking")
    return 0
