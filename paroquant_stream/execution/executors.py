"""Where jobs run: inline, in threads of this process, or on any `concurrent.futures.Executor`, a
Dask cluster's too; results come as they finish.

Threads and processes were even on 2 cores (numpy and hashlib release the interpreter's lock), and
threads start at once, so threads are the default. One job runs inline, for a traceback that a
person can read. A job on an executor has a thread here that waits for it, so that the flow is one.
"""

from __future__ import annotations

import os
import pkgutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    wait,
)
from pathlib import Path
from typing import Any, TypeVar

from ..errors import WorkersLostError, WorkersUnfitError
from ..text import one_line
from .dask import CONNECT, asking, client_name, client_of

LOOK = 0.2  # s between looks at whether to stop, while a job runs elsewhere
_PACKAGE = ("paroquant_stream:__version__", "paroquant_stream.store.format:TRANSFORM")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def call_elsewhere(
    executor: Executor,
    check: Callable[[], None],
    function: Callable[..., _Result],
    *arguments: object,
) -> _Result:
    """`function(*arguments)` of a worker of the executor; `check()` may raise meanwhile.

    Raises what the function raised, and WorkersLostError when the executor cannot run it.
    """
    future: Future[_Result] | None = None
    client, looked = client_of(executor), time.monotonic()
    try:
        future = executor.submit(function, *arguments)
        while not future.done():
            check()
            wait([future], LOOK)
            if client and time.monotonic() - looked > CONNECT:
                with asking(client):  # a scheduler without workers waits for some for ever
                    client.wait_for_workers(1, timeout=CONNECT)
                looked = time.monotonic()
        return future.result()
    except Exception as error:
        if not _is_of_executor(error):
            raise
        who = client_name(client) if client else "the executor"
        raise WorkersLostError(
            f"{who} or its workers failed ({one_line(error)}); finished shards are kept, run "
            "again to go on"
        ) from error
    finally:
        if future:
            future.cancel()


def width(executor: Executor) -> int | None:
    """How many jobs the executor runs at once; None where it does not tell.

    No executor tells it in public; `_max_workers` is what those of the standard library have.
    """
    if client := client_of(executor):
        with asking(client):
            client.wait_for_workers(1, timeout=CONNECT)
            threads: dict[str, int] = client.nthreads()
            return sum(threads.values())
    told: int | None = getattr(executor, "_max_workers", None)
    return told


def check_workers(executor: Executor, paths: Sequence[Path]) -> None:
    """Raises WorkersUnfitError when a worker that can be asked lacks this version of the package or one
    of the files; names each worker. Of a Dask cluster every worker and the scheduler are asked.

    The questions are functions of the standard library, which a worker without us can answer.
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
    with asking(client):
        client.wait_for_workers(1, timeout=CONNECT)
        for name in _PACKAGE:  # the scheduler unpickles what it passes on
            try:
                answer = client.run_on_scheduler(pkgutil.resolve_name, name)
            except ImportError as error:
                answer = error
            _compare(defects, client_name(client), name, pkgutil.resolve_name(name), answer)
        for ask, what in [
            *((pkgutil.resolve_name, name) for name in _PACKAGE),
            *((os.path.getsize, str(path)) for path in paths),
        ]:
            answers = client.run(ask, what, on_error="return")
            for worker, answer in answers.items():
                _compare(defects, worker, what, ask(what), answer)
    if defects:
        listed = "\n  ".join(f"{address}: {defect}" for address, defect in defects.items())
        raise WorkersUnfitError(
            "not every worker can convert; it needs this version of paroquant_stream, and the "
            f"model and the cache at the same paths of a shared file system:\n  {listed}"
        )


def _compare(defects: dict[str, str], address: str, what: str, here: Any, answer: Any) -> None:
    if answer != here and address not in defects:
        found = one_line(answer) if isinstance(answer, BaseException) else answer
        size = " bytes" if isinstance(here, int) else ""
        defects[address] = f"{what}: expected {here}{size}, found {found}"


def _is_of_executor(error: Exception) -> bool:
    """Whether an error is the executor's own, and not one of the function that it ran."""
    kinds = (BrokenExecutor, CancelledError, ImportError)
    return isinstance(error, kinds) or type(error).__module__.partition(".")[0] == "distributed"
