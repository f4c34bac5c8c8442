"""COMMAND cache: look after the cache. `verify` reads every byte of it."""

from __future__ import annotations

import argparse
import json
import sys

from .api import cache_store, make_request
from .errors import ParoquantStreamError
from .report import shown
from .verify import verify_model, verify_store

DESCRIPTION = """\
verify: read every entry of MODEL, or of all models, and with --sources its shards too, and compare
their hashes with those taken when they were written. Prints `path: expected X, got Y` for each that
differs. Exit code: 0 all right, 1 something differs or failed, 2 wrong usage."""


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", description=DESCRIPTION)
    verify.add_argument(
        "model", nargs="?", help="a model directory or Hub id (default: all models)"
    )
    where = verify.add_mutually_exclusive_group()
    where.add_argument("--cache-dir", metavar="DIR", help="the cache")
    where.add_argument("--in-place", action="store_true", help="the conversion in MODEL/mlx")
    verify.add_argument("--sources", action="store_true", help="read MODEL's shards too")
    verify.add_argument("--json", action="store_true", help="print one JSON object")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser("python -m paroquant_stream.cache")
    configure_parser(parser)
    arguments = parser.parse_args(argv)
    if arguments.model is None and (arguments.sources or arguments.in_place):
        parser.error("--sources and --in-place need a MODEL")
    try:
        return _verify(arguments)
    except ParoquantStreamError as error:
        print(f"error: {shown(error, keep=chr(10))}", file=sys.stderr)
        return 1


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.model is None:
        count, problems = verify_store(cache_store(arguments.cache_dir))
    else:
        request = make_request(
            arguments.model, cache_dir=arguments.cache_dir, in_place=arguments.in_place
        )
        count, problems = verify_model(request, arguments.sources)
    if arguments.json:
        listed = [{"path": str(p.path), "expected": p.expected, "found": p.found} for p in problems]
        print(json.dumps({"files": count, "problems": listed}))
    else:
        for problem in problems:
            print(shown(problem))
        print(f"{count} files read, {len(problems)} differ")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
