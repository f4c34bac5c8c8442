"""The convert command's options, their help, and which belong together."""

from __future__ import annotations

import argparse

from ..store.format import DTYPES
from .arguments import Parser, add_cache_dir, add_help, add_io_bits, add_jobs, typed

DESCRIPTION = """\
Convert ParoQuant checkpoints into MLX-native entries in the cache. Only shards that changed are
converted; an interrupted conversion resumes. Several models share the workers, and one
that fails lets the others finish. Exit code: 0 done, 1 failed, 2 wrong usage, 130 or 143
interrupted."""
EXAMPLES = (
    "paroquant-stream convert owner/name --jobs 8",
    "paroquant-stream convert model-1 model-2 --dry-run",
    "paroquant-stream convert path/to/model --dry-run --tree",
    "paroquant-stream convert path/to/model --in-place",
    "paroquant-stream convert owner/name --drop-source",
    "paroquant-stream convert path/to/model --json",
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; ends the process with 2 when it is wrong."""
    parser = Parser(typed("convert"), description=DESCRIPTION)
    configure_parser(parser)
    arguments = parser.parse_args(argv)
    if (arguments.executor == "dask") != (arguments.scheduler is not None):
        parser.error("--executor dask and --scheduler ADDRESS go together")
    if arguments.revision and len(arguments.models) > 1:
        parser.error("--revision is for one MODEL")
    if arguments.tree and not arguments.dry_run:
        parser.error("--tree is a picture for --dry-run, which is not given")
    if arguments.yes and not arguments.drop_source:
        parser.error("-y answers the question of --drop-source, which is not given")
    if arguments.dry_run and arguments.trace:
        parser.error("--dry-run converts nothing that --trace could show")
    return arguments


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_help(parser, EXAMPLES)
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="a model directory, or a Hub repository id like owner/name",
    )
    parser.add_argument(
        "--revision", metavar="R", help="branch, tag or commit of a Hub repository (default: main)"
    )
    _configure_workers(parser)
    where = parser.add_mutually_exclusive_group()
    add_cache_dir(where)
    where.add_argument(
        "--in-place", action="store_true", help="convert into MODEL/mlx, to ship with the model"
    )
    parser.add_argument(
        "--drop-source",
        action="store_true",
        help="remove each shard, downloaded or local, once its entry is safe and nothing needs it",
    )
    parser.add_argument(
        "-y",
        "--yes",
        action="store_true",
        help="with --drop-source: remove a local model's shards without asking",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="source",
        metavar="D",
        help="float16 or bfloat16: one width for scales, biases, norms and all that meets "
        "activations (default: source, bit-identical to the public loader)",
    )
    add_io_bits(
        parser, "bits per weight of embedding and head, 4 or 8 (default: 4, as the public loader)"
    )
    parser.add_argument("--force", action="store_true", help="convert every shard again")
    _configure_output(parser)


def _configure_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be converted and why, and with --drop-source which shards would be "
        "removed; write nothing; exit code 1 when there is too little space",
    )
    parser.add_argument(
        "--tree",
        action="store_true",
        help="with --dry-run: instead show which shards lend tensors to which; reads only headers",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per model instead of the summary, also for one that failed",
    )
    parser.add_argument(
        "--trace", metavar="FILE", help="write the stages of every worker, for chrome://tracing"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _configure_workers(parser: argparse.ArgumentParser) -> None:
    add_jobs(
        parser,
        "workers (default: one per core, at most 16; all threads of a cluster)",
    )
    parser.add_argument(
        "--executor",
        choices=["auto", "thread", "process", "dask"],
        default="auto",
        metavar="E",
        help="where shards are converted: thread, process, dask for a Dask cluster, or auto "
        "(default): process for 1 GB and more, else thread",
    )
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="the cluster's scheduler, like tcp://host:8786"
    )
