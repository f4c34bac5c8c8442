"""COMMAND convert: a checkpoint into MLX-native cache entries, shard by shard."""

from __future__ import annotations

import argparse
import json
import resource
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

from .api import make_request
from .conversion import convert
from .errors import CheckpointError, ParoquantStreamError
from .exits import end_with
from .progress import Progress
from .report import Conversion, ShardReport, bytes_text, shown
from .request import Request
from .task import DTYPES
from .trace import written_to

DESCRIPTION = """\
Convert a ParoQuant checkpoint into MLX-native entries in the cache. Only shards that changed are
converted; an interrupted conversion goes on where it was. Exit code: 0 done, 1 failed, 2 wrong
usage, 130 or 143 interrupted."""


class Terminated(BaseException):
    """SIGTERM arrived; raised in the main thread so that temps are removed on the way out."""


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("model", help="a model directory, or a Hub repository id like owner/name")
    parser.add_argument(
        "--revision", metavar="R", help="branch, tag or commit of a Hub repository (default: main)"
    )
    parser.add_argument(
        "--jobs", type=_positive, metavar="N", help="workers (default: one a core, at most 8)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--cache-dir", metavar="DIR", help="the cache (default: ~/.cache/paroquant/mlx_cache)"
    )
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
    parser.add_argument("--force", action="store_true", help="convert every shard again")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be converted and why; write nothing"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the summary"
    )
    parser.add_argument(
        "--trace", metavar="FILE", help="write the stages of every worker, for chrome://tracing"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser("paroquant-stream convert", description=DESCRIPTION)
    configure_parser(parser)
    arguments = parser.parse_args(argv)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(arguments)
    except ParoquantStreamError as error:
        print(f"error: {shown(error, keep=chr(10))}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Terminated) as stop:
        print("interrupted; finished shards are kept, run again to go on", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def _run(arguments: argparse.Namespace) -> int:
    request = make_request(
        arguments.model,
        cache_dir=arguments.cache_dir,
        in_place=arguments.in_place,
        force=arguments.force,
        jobs=arguments.jobs,
        revision=arguments.revision,
        drop_source=arguments.drop_source,
        dtype=arguments.dtype,
    )
    if arguments.dry_run:
        _print_survey(request, arguments)
        return 0
    if request.drop_source and request.remote is None and not arguments.yes:
        _ask(request)
    with written_to(arguments.trace) as trace, Progress(arguments.quiet) as progress:
        try:
            conversion = convert(request, progress, trace)
        except (KeyboardInterrupt, Terminated):
            request.store.sweep(own=True)  # of workers that are still inside a system call
            raise
    if arguments.json:
        print(json.dumps(_as_json(conversion)))
    elif not arguments.quiet:
        print(shown(_summary(conversion)))
    return 0


def _ask(request: Request) -> None:
    """Raises CheckpointError unless a person says that the model's own shards may go."""
    question = (
        f"{request.directory}: remove each shard once it is converted? "
        f"Only the conversion in {request.store.root} will be left."
    )
    if not sys.stdin.isatty():
        raise CheckpointError(f"{question} There is no terminal to ask on; say so with -y")
    print(f"{shown(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CheckpointError("nothing was converted and nothing removed")


def _as_json(conversion: Conversion) -> dict[str, Any]:
    return {
        "model": conversion.manifest.model,
        "manifest": str(conversion.manifest_path),
        "shards": [asdict(report) for report in conversion.shards],
        "seconds": conversion.seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def peak_rss_bytes() -> int:
    """The most memory that this process held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss counts the parent's memory before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def _summary(conversion: Conversion) -> str:
    converted = [report for report in conversion.shards if report.action == "converted"]
    reused = len(conversion.shards) - len(converted)
    size = sum(report.bytes_out for report in converted)
    return (
        f"{conversion.manifest.model}: "
        f"{len(converted)} converted ({bytes_text(size)}), {reused} reused "
        f"in {conversion.seconds:.1f} s; {conversion.manifest_path}"
    )


def _print_survey(request: Request, arguments: argparse.Namespace) -> None:
    from .survey import survey  # here, because a run without work needs none of it

    reports = survey(replace(request, force=arguments.force))
    work = [report for report in reports if report.action == "converted"]
    totals = {
        "bytes_to_read": sum(report.bytes_in for report in work),
        "bytes_to_write": sum(report.bytes_out for report in work),
        "bytes_free": request.store.free_bytes(),
    }
    if arguments.json:
        shards = [asdict(report) for report in reports]
        print(json.dumps({"model": request.model, "dry_run": True, "shards": shards, **totals}))
    elif not arguments.quiet:
        for report in reports:
            print(shown(_survey_line(report)))
        print(
            f"{len(work)} of {len(reports)} shards to convert: "
            f"{bytes_text(totals['bytes_to_read'])} to read, "
            f"{bytes_text(totals['bytes_to_write'])} to write, "
            f"{bytes_text(totals['bytes_free'])} free"
        )


def _survey_line(report: ShardReport) -> str:
    verb = "convert" if report.action == "converted" else "reuse"
    sizes = f"{bytes_text(report.bytes_in)} -> {bytes_text(report.bytes_out)}"
    return f"{verb:7}  {report.shard}  {sizes}  {report.why}"


if __name__ == "__main__":
    end_with(main)
