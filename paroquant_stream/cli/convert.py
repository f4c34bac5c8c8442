"""COMMAND convert: a checkpoint into MLX-native cache entries, shard by shard."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversion.converter import convert_or_find
from ..conversion.report import IN_MODEL, Conversion, ShardReport
from ..conversion.request import Request, default_jobs, make_request
from ..errors import CheckpointError, ParoquantStreamError
from ..progress_bar import Progress
from ..store.location import IN_PLACE
from ..text import bytes_text, counted, shown
from ..trace import Trace, written_to
from .common import Terminated, complain, confirm, run_command
from .convert_options import EXAMPLES, configure_parser, parse

if TYPE_CHECKING:
    from concurrent.futures import Executor


__all__ = ["EXAMPLES", "configure_parser", "main"]
OPTIONS = ("cache_dir", "in_place", "force", "jobs", "revision", "drop_source", "dtype", "io_bits")
"""Arguments that are fields of `ConvertOptions`."""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parse(argv)
    return run_command(lambda: _run(arguments), "finished shards are kept, run again to resume")


def _run(arguments: argparse.Namespace) -> int:
    failed: dict[str, ParoquantStreamError] = {}
    requests = []
    with (
        written_to(arguments.trace) as trace,  # first: a wrong path is known before any work
        nullcontext() if arguments.dry_run else _executor(arguments) as executor,
    ):
        for model in dict.fromkeys(arguments.models):
            try:
                requests.append(_prepare(model, executor, arguments))
            except ParoquantStreamError as error:
                failed[model] = error
                if arguments.json:
                    print(json.dumps(_error_json(model, error)))
        failed |= (_dry_run if arguments.dry_run else _convert)(requests, arguments, trace)
    failed = {model: failed[model] for model in arguments.models if model in failed}
    if failed and len(arguments.models) > 1:
        from ..conversion.batch import some_failed

        raise some_failed(failed, len(arguments.models))
    for reason in failed.values():
        raise reason
    return 0


def _executor(arguments: argparse.Namespace) -> AbstractContextManager[Executor | None]:
    """Return where shards are converted; None for the choice by how much there is to do."""
    jobs = arguments.jobs or default_jobs()
    if arguments.executor == "thread":
        from concurrent.futures import ThreadPoolExecutor  # late, as it is slow to import

        return ThreadPoolExecutor(jobs, thread_name_prefix="worker")
    if arguments.executor == "process":
        from ..execution.processes import processes  # here, as the others need none of it

        return processes(jobs)
    if arguments.executor == "dask":
        from ..execution.dask import cluster

        return cluster(arguments.scheduler)
    return nullcontext()


def _prepare(model: str, executor: Executor | None, arguments: argparse.Namespace) -> Request:
    """Make the request for one model, and ask whether its shards may be removed."""
    given = {name: getattr(arguments, name) for name in OPTIONS}
    request = make_request(model, **given, executor=executor)
    if request.options.drop_source and not arguments.dry_run:
        if not (arguments.in_place or arguments.quiet):
            _note_drop(request)
        if request.source.remote is None and not arguments.yes:
            _confirm_drop(request)
    return request


def _dry_run(
    requests: Sequence[Request], arguments: argparse.Namespace, _trace: Trace
) -> dict[str, ParoquantStreamError]:
    """Print what would be done for each model; returns why some would fail."""
    failed = {}
    for request in requests:
        try:
            (_print_tree if arguments.tree else _print_survey)(request, arguments)
        except ParoquantStreamError as error:
            failed[request.source.name] = error
            if arguments.json:
                print(json.dumps(_error_json(request.source.name, error)))
    return failed


def _convert(
    requests: Sequence[Request], arguments: argparse.Namespace, trace: Trace
) -> dict[str, ParoquantStreamError]:
    """Convert the models and print each as it is done; returns why others were not."""
    failed = {}
    with Progress(arguments.quiet) as progress:
        try:
            for request, result in _results(requests, progress, trace):
                name = request.source.name
                if isinstance(result, ParoquantStreamError):
                    failed[name] = result
                    if arguments.json:
                        progress.say(json.dumps(_error_json(name, result)))
                elif arguments.json:
                    progress.say(json.dumps(_as_json(result)))
                elif not arguments.quiet:
                    progress.say(shown(_summary(request, result)))
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
            yield request, convert_or_find(request, progress, trace)
        except ParoquantStreamError as error:
            yield request, error


def _note_drop(request: Request) -> None:
    """Say which programs will not find the model, unless its shards are gone already."""
    source = request.source
    if source.remote or any(
        os.path.exists(source.directory / n) for n in source.config.shard_names
    ):
        complain(
            f"note: {shown(source.name)}: programs that look for weight files in a model's "
            "directory, like oMLX, will not list it after --drop-source into the cache; with "
            "--in-place they do"
        )


def _confirm_drop(request: Request) -> None:
    """Raise CheckpointError unless a person agrees to remove the model's own shards."""
    question = (
        f"{request.source.directory}: remove each shard once it is converted? "
        f"Only the conversion in {request.store.root} will be left."
    )
    confirm(question, CheckpointError("nothing was converted and nothing removed"))


def _error_json(model: str, error: ParoquantStreamError) -> dict[str, str]:
    return {"model": model, "error": type(error).__name__, "message": str(error)}


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
    import resource  # for --json on macOS alone

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def _summary(request: Request, conversion: Conversion) -> str:
    converted = [report for report in conversion.shards if report.action == "converted"]
    reused = len(conversion.shards) - len(converted)
    size = sum(report.bytes_out for report in converted)
    if any(report.why == IN_MODEL for report in conversion.shards):
        inside = request.source.directory / IN_PLACE
        return (
            f"{request.source.name}: its shards are gone, {inside} holds its conversion; "
            f"{_next_step(request, conversion)}"
        )
    return (
        f"{request.source.name}: {len(converted)} converted ({bytes_text(size)}), {reused} reused "
        f"in {conversion.seconds:.1f} s; {_next_step(request, conversion)}"
    )


def _next_step(request: Request, conversion: Conversion) -> str:
    """Tell how the model is loaded, and how many bytes of shards that load does not need."""
    options, text = request.options, f"load it with paroquant_stream.load({request.source.name!r}"
    if options.cache_dir:
        text += f", cache_dir={str(options.cache_dir)!r}"
    for name, default in (("dtype", "source"), ("io_bits", 4), ("revision", None)):
        if (value := getattr(options, name)) != default:
            text += f", {name}={value!r}"
    directory = request.source.directory
    left = [r.bytes_in for r in conversion.shards if os.path.exists(directory / r.shard)]
    return f"{text})" + (f"; --drop-source would free {bytes_text(sum(left))}" if left else "")


def _print_survey(request: Request, arguments: argparse.Namespace) -> None:
    """Print what would be done. Raises StoreError when there is too little space for it."""
    from ..conversion.pipeline import check_space  # here, as a run without work needs neither
    from ..conversion.planning import survey

    reports = survey(request)
    work = [report for report in reports if report.action == "converted"]
    dropped = _to_remove(request, reports)
    totals = {
        "bytes_to_read": sum(report.bytes_in for report in work),
        "bytes_to_write": sum(report.bytes_out for report in work),
        "bytes_to_remove": sum(report.bytes_in for report in dropped),
        "bytes_free": request.store.free_bytes(),
    }
    if arguments.json:
        print(json.dumps(_survey_json(request, reports, dropped) | totals))
    elif not arguments.quiet:
        for report in reports:
            print(shown(_survey_line(report)))
        print(
            f"{len(work)} of {counted(len(reports), 'shard')} to convert: "
            f"{bytes_text(totals['bytes_to_read'])} to read, "
            f"{bytes_text(totals['bytes_to_write'])} to write, "
            f"{bytes_text(totals['bytes_free'])} free"
        )
        for report in dropped:
            print(shown(f"remove   {report.shard}  {bytes_text(report.bytes_in)}"))
        if request.options.drop_source:
            size = bytes_text(totals["bytes_to_remove"])
            print(f"{counted(len(dropped), 'shard')} to remove once converted: {size}")
    check_space(request, [report.bytes_out for report in work])


def _to_remove(request: Request, reports: Sequence[ShardReport]) -> list[ShardReport]:
    """Return the shards that are there and that --drop-source would remove."""
    if not request.options.drop_source:
        return []
    return [r for r in reports if os.path.exists(request.source.directory / r.shard)]


def _survey_json(
    request: Request, reports: Sequence[ShardReport], dropped: Sequence[ShardReport]
) -> dict[str, Any]:
    return {
        "model": request.source.name,
        "dry_run": True,
        "shards": [asdict(report) for report in reports],
        "shards_to_remove": [report.shard for report in dropped],
    }


def _print_tree(request: Request, arguments: argparse.Namespace) -> None:
    import shutil  # all here, as in _print_survey

    from ..conversion.planning import plan_model
    from ..plan.lending import lending_json, lending_lines

    name, tasks = request.source.name, plan_model(request).plan.tasks
    if arguments.json:
        print(json.dumps({"model": name, "dry_run": True, "shards": lending_json(tasks)}))
    elif not arguments.quiet:
        lines = lending_lines(tasks, shutil.get_terminal_size().columns)
        print("\n".join(shown(line) for line in (f"{name}:", *lines)))


def _survey_line(report: ShardReport) -> str:
    verb = "convert" if report.action == "converted" else "reuse"
    sizes = f"{bytes_text(report.bytes_in)} -> {bytes_text(report.bytes_out)}"
    return f"{verb:7}  {report.shard}  {sizes}  {report.why}"
