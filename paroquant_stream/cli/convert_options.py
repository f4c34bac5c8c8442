"""The convert command's options, their help, and which belong together."""

from __future__ import annotations

import argparse

from ..store.format import DTYPES, IO_BITS
from .common import add_cache_dir, add_jobs

DESCRIPTION = """\
Convert ParoQuant checkpoints into MLX-native entries in the cache. Only shards that changed are
converted; an interrupted conversion resumes. Several models share the workers, and one
that fails lets the others finish. Exit code: 0 done, 1 failed, 2 wrong usage, 130 or 143
interrupted."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; ends the process with 2 when it is wrong."""
    parser = argparse.ArgumentParser("paroquant-stream convert", description=DESCRIPTION)
    _configure(parser)
    arguments = parser.parse_args(argv)
    if (arguments.executor == "dask") != (arguments.scheduler is not None):
        parser.error("--executor dask and --scheduler ADDRESS go together")
    if arguments.revision and len(arguments.models) > 1:
        parser.error("--revision is for one MODEL")
    return arguments


def _configure(parser: argparse.ArgumentParser) -> None:
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
        "-y", "--yes", action="store_true", help="remove a local model's shards without asking"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="source",
        help="one width for scales, biases, norms and all that meets activations "
        "(default: source, bit-identical to the public loader)",
    )
    parser.add_argument(
        "--io-bits",
        type=int,
        choices=IO_BITS,
        default=4,
        help="bits per weight of embedding and head (default: 4, as the public loader)",
    )
    parser.add_argument("--force", action="store_true", help="convert every shard again")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be converted and why; write nothing"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per model instead of the summary"
    )
    parser.add_argument(
        "--trace", metavar="FILE", help="write the stages of every worker, for chrome://tracing"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _configure_workers(parser: argparse.ArgumentParser) -> None:
    add_jobs(
        parser,
        "shards converted at once (default: one per core, at most 8; all threads of a cluster)",
    )
    parser.add_argument(
        "--executor",
        choices=["thread", "process", "dask"],
        default="thread",
        help="where shards are converted: threads (default), processes, or a Dask cluster",
    )
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="the cluster's scheduler, like tcp://host:8786"
    )
