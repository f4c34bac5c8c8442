"""COMMAND convert: a checkpoint into MLX-native cache entries, shard by shard."""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversion.converter import convert
from ..conversion.report import Conversion, ShardReport
from ..conversion.request import Request, default_jobs, make_request
from ..errors import CheckpointError, ParoquantStreamError
from ..text import bytes_text, shown
from ..trace import Trace, written_to
from .common import Terminated, confirm, run_command
from .convert_options import parse
from .progress_bar import Progress

if TYPE_CHECKING:
    from concurrent.futures import Executor


OPTIONS = ("cache_dir", "in_place", "force", "jobs", "revision", "drop_source", "dtype", "io_bits")
"""Arguments that are fields of `ConvertOptions`."""
_DROP_NOTE = (
    "note: programs that look for weight files in a model's directory, like oMLX, will not list it "
    "after --drop-source into the cache; with --in-place they do"
)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parse(argv)
    return run_command(lambda: _run(arguments), "finished shards are kept, run again to resume")


def _run(arguments: argparse.Namespace) -> int:
    failed: dict[str, ParoquantStreamError] = {}
    requests = []
    if arguments.drop_source and not (arguments.in_place or arguments.dry_run or arguments.quiet):
        print(_DROP_NOTE, file=sys.stderr)
    with nullcontext() if arguments.dry_run else _executor(arguments) as executor:
        for model in dict.fromkeys(arguments.models):
            try:
                requests.append(_prepare(model, executor, arguments))
            except ParoquantStreamError as error:
                failed[model] = error
        if not arguments.dry_run:
            failed |= _convert(requests, arguments)
    if failed and len(arguments.models) > 1:
        from ..conversion.batch import some_failed

        raise some_failed(failed, len(arguments.models))
    for reason in failed.values():
        raise reason
    return 0


def _executor(arguments: argparse.Namespace) -> AbstractContextManager[Executor | None]:
    """Return where shards are converted; None for threads of this process."""
    if arguments.executor == "process":
        from ..execution.processes import processes  # here, as the other two need none of it

        return processes(arguments.jobs or default_jobs())
    if arguments.executor == "dask":
        from ..execution.dask import cluster

        return cluster(arguments.scheduler)
    return nullcontext()


def _prepare(model: str, executor: Executor | None, arguments: argparse.Namespace) -> Request:
    """Make the request for one model; a dry run prints what it would do."""
    given = {name: getattr(arguments, name) for name in OPTIONS}
    request = make_request(model, **given, executor=executor)
    if arguments.dry_run:
        _print_survey(request, arguments)
    elif request.options.drop_source and request.source.remote is None and not arguments.yes:
        _confirm_drop(request)
    return request


def _convert(
    requests: Sequence[Request], arguments: argparse.Namespace
) -> dict[str, ParoquantStreamError]:
    """Convert the models and print each as it is done; returns why others were not."""
    failed = {}
    with written_to(arguments.trace) as trace, Progress(arguments.quiet) as progress:
        try:
            for request, result in _results(requests, progress, trace):
                if isinstance(result, ParoquantStreamError):
                    failed[request.source.name] = result
                elif arguments.json:
                    progress.say(json.dumps(_as_json(result)))
                elif not arguments.quiet:
                    progress.say(shown(_summary(result)))
        except (KeyboardInterrupt, Terminated):
            for request in requests:
                request.store.sweep(own=True)  # of workers that are still inside a system call
            raise
    return failed


def _results(
    requests: Sequence[Request], progress: Progress, trace: Trace
) -> Iterator[tuple[Request, Conversion | ParoquantStreamError]]:
    if len(requests) > 1:
        from ..conversion.batch import convert_all

        yield from convert_all(requests, progress, trace)
    for request in requests[: len(requests) == 1]:
        try:
            yield request, convert(request, progress, trace)
        except ParoquantStreamError as error:
            yield request, error


def _confirm_drop(request: Request) -> None:
    """Raise CheckpointError unless a person agrees to remove the model's own shards."""
    question = (
        f"{request.source.directory}: remove each shard once it is converted? "
        f"Only the conversion in {request.store.root} will be left."
    )
    confirm(question, CheckpointError("nothing was converted and nothing removed"))


def _as_json(conversion: Conversion) -> dict[str, Any]:
    return {
        "model": conversion.manifest.model,
        "manifest": str(conversion.manifest_path),
        "shards": [asdict(report) for report in conversion.shards],
        "seconds": conversion.seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def peak_rss_bytes() -> int:
    """Return the most memory that this process held so far, in bytes."""
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
    from ..conversion.planning import survey  # here, because a run without work needs none of it

    reports = survey(request)
    work = [report for report in reports if report.action == "converted"]
    totals = {
        "bytes_to_read": sum(report.bytes_in for report in work),
        "bytes_to_write": sum(report.bytes_out for report in work),
        "bytes_free": request.store.free_bytes(),
    }
    if arguments.json:
        shards = [asdict(report) for report in reports]
        print(
            json.dumps({"model": request.source.name, "dry_run": True, "shards": shards, **totals})
        )
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
