"""Call functions on any `concurrent.futures.Executor`, that of a Dask cluster included.

The units of a shard have a thread of this process that waits for them, whatever the executor.
"""

from __future__ import annotations

import os
import pkgutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    wait,
)
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ..errors import WorkersLostError, WorkersUnfitError
from ..text import one_line
from .dask import CONNECT_TIMEOUT, client_name, client_of, translate_errors
from .identity import VERSIONS
from .threads import POLL_SECONDS, translate_refusals

_Result = TypeVar("_Result")


def call_all(
    executor: Executor,
    check: Callable[[], None],
    function: Callable[..., _Result],
    calls: Sequence[tuple[Any, ...]],
    ahead: Callable[[], int],
) -> Iterator[_Result]:
    """Call `function` on workers of the executor and yield the results as the calls finish.

    Args:
        executor: Where the function runs.
        check: Called every `POLL_SECONDS`; what it raises cancels the calls and is raised.
        function: Importable by the worker.
        calls: The arguments of each call, picklable.
        ahead: Returns how many may be queued or running, as several callers share the workers.

    Raises:
        ExecutionError: The executor cannot run the function, or the program is ending.
        Exception: What the function or `check` raised.
    """
    waiting = iter(calls)
    running: set[Future[_Result]] = set()
    client, asked = client_of(executor), time.monotonic()
    try:
        while True:
            count = max(1, ahead()) - len(running)
            with translate_refusals():
                running |= {executor.submit(function, *c) for c in islice(waiting, max(0, count))}
            if not running:
                return
            check()
            done, running = wait(running, POLL_SECONDS, FIRST_COMPLETED)
            yield from (future.result() for future in done)
            if done:
                asked = time.monotonic()
            elif client and time.monotonic() - asked > CONNECT_TIMEOUT:
                with translate_errors(client):  # a scheduler without workers waits forever
                    client.wait_for_workers(1, timeout=CONNECT_TIMEOUT)
                asked = time.monotonic()
    except Exception as error:
        if not _is_executor_error(error):
            raise
        who = client_name(client) if client else "the executor"
        raise WorkersLostError(
            f"{who} or its workers failed ({one_line(error)}); finished shards are kept, run "
            "again to resume"
        ) from error
    finally:
        for future in running:
            future.cancel()


def worker_count(executor: Executor) -> int | None:
    """Return how many jobs the executor runs at once, or None if that is unknown.

    No public attribute has it; `_max_workers` is that of the standard library's executors.

    Raises:
        WorkersLostError: A Dask cluster does not answer.
    """
    if client := client_of(executor):
        with translate_errors(client):
            client.wait_for_workers(1, timeout=CONNECT_TIMEOUT)
            threads: dict[str, int] = client.nthreads()
            return sum(threads.values())
    count: int | None = getattr(executor, "_max_workers", None)
    return count


def check_workers(executor: Executor, paths: Sequence[Path]) -> None:
    """Check that the workers have this version of the package and see the files.

    Of a Dask cluster every worker and the scheduler are checked, with functions of the standard
    library, which a worker without the package can run; other executors only for a forking pool.

    Args:
        executor: Whose workers.
        paths: Files that every worker must see in the same size.

    Raises:
        WorkersUnfitError: Some do not; the message lists each.
        WorkersLostError: The cluster does not answer.
    """
    context = getattr(executor, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise WorkersUnfitError(
            "a forked worker hangs once MLX or a thread was used before the fork: "
            "ProcessPoolExecutor(mp_context=multiprocessing.get_context('spawn'))"
        )
    if (client := client_of(executor)) is None:
        return
    defects: dict[str, str] = {}
    expected = [
        (pkgutil.resolve_name, name, pkgutil.resolve_name(name)) for name in VERSIONS.values()
    ]
    sizes = [(os.path.getsize, str(path), os.path.getsize(path)) for path in paths]
    with translate_errors(client):
        client.wait_for_workers(1, timeout=CONNECT_TIMEOUT)
        for resolve, name, version in expected:  # the scheduler unpickles what it passes on
            try:
                answer = client.run_on_scheduler(resolve, name)
            except ImportError as error:
                answer = error
            _compare(defects, client_name(client), name, version, answer)
        for ask, subject, value in (*expected, *sizes):
            answers = client.run(ask, subject, on_error="return")
            for worker, answer in answers.items():
                _compare(defects, worker, subject, value, answer)
    if defects:
        listed = "\n  ".join(f"{address}: {defect}" for address, defect in defects.items())
        raise WorkersUnfitError(
            "not every worker can convert; it needs this version of paroquant_stream, and the "
            f"model and the cache at the same paths of a shared file system:\n  {listed}"
        )


def _compare(
    defects: dict[str, str], address: str, subject: str, expected: Any, answer: Any
) -> None:
    """Note the first difference of a worker's answer from the expected one."""
    if answer != expected and address not in defects:
        found = one_line(answer) if isinstance(answer, BaseException) else answer
        size = " bytes" if isinstance(expected, int) else ""
        defects[address] = f"{subject}: expected {expected}{size}, found {found}"


def _is_executor_error(error: Exception) -> bool:
    """Tell an error of the executor from one of the function that it ran."""
    if isinstance(error, ImportError):  # a worker without the package cannot unpickle the job
        return (error.name or "").partition(".")[0] == "paroquant_stream"
    kinds = (BrokenExecutor, CancelledError)
    return isinstance(error, kinds) or type(error).__module__.partition(".")[0] == "distributed"
