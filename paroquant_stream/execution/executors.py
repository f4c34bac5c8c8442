"""Where jobs run: inline, in threads of this process, or on any `concurrent.futures.Executor`, a
Dask cluster's too; results come as they finish.

Threads and processes were even on 2 cores (numpy and hashlib release the interpreter's lock), and
threads start at once, so threads are the default. One job runs inline, for a traceback that a
person can read. A job on an executor has a thread here that waits for it, so that the flow is one.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ..errors import MissingExtra, WorkersLost, WorkersUnfit
from ..trace import SILENCE, Trace
from .slots import Places, Worker

PATIENCE = 1.0
"""Seconds an interrupted run waits for its workers; an fsync of gigabytes cannot be cut short."""
LOOK = 0.2  # s between looks at whether to stop, while a job runs elsewhere
CONNECT = 10.0  # s for a scheduler to answer, and for the first of its workers to come
_PACKAGE = ("paroquant_stream:__version__", "paroquant_stream.plan.task:TRANSFORM")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def run_all(
    function: Callable[[_Item, Worker], _Result],
    items: Sequence[_Item],
    jobs: int,
    trace: Trace = SILENCE,
    places: Places | None = None,
) -> Iterator[_Result]:
    """`function(item, worker)` of every item, as they finish, at most `jobs` at work at once.

    `worker.check()` raises Cancelled once another job has failed or the caller was interrupted; a
    job calls it after every chunk. The first error is raised when every running job has ended;
    an interrupt after `PATIENCE`, with jobs perhaps still running. `places`: a share of places
    that other runs use too; the end of this run stops it.
    """
    places = places or Places(jobs, len(items))

    def work(item: _Item) -> _Result:
        worker = Worker(places, trace)
        try:
            return function(item, worker)
        finally:
            worker.leave()

    if jobs == 1 or len(items) <= 1:
        yield from (work(item) for item in items)
        return
    pool = ThreadPoolExecutor(min(jobs, len(items)), thread_name_prefix="worker")
    futures: list[Future[_Result]] = []
    patience: float | None = None
    try:
        futures += [pool.submit(work, item) for item in items]
        for future in as_completed(futures):
            yield future.result()
    except Exception:
        raise
    except BaseException:  # Ctrl-C, SIGTERM, or a caller that stopped listening
        patience = PATIENCE
        raise
    finally:
        places.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        # a future cancelled in the queue never counts as done, so waiting for it would never end
        wait([future for future in futures if not future.cancelled()], patience)


def call_elsewhere(
    executor: Executor,
    check: Callable[[], None],
    function: Callable[..., _Result],
    *arguments: object,
) -> _Result:
    """`function(*arguments)` of a worker of the executor; `check()` may raise meanwhile.

    Raises what the function raised, and WorkersLost when the executor cannot run it.
    """
    future: Future[_Result] | None = None
    client, looked = _client_of(executor), time.monotonic()
    try:
        future = executor.submit(function, *arguments)
        while not future.done():
            check()
            wait([future], LOOK)
            if client and time.monotonic() - looked > CONNECT:
                with _asking(client):  # a scheduler without workers waits for some for ever
                    client.wait_for_workers(1, timeout=CONNECT)
                looked = time.monotonic()
        return future.result()
    except Exception as error:
        if not _is_of_executor(error):
            raise
        who = _name(client) if client else "the executor"
        raise WorkersLost(
            f"{who} or its workers failed ({_one_line(error)}); finished shards are kept, run "
            "again to go on"
        ) from error
    finally:
        if future:
            future.cancel()


def width(executor: Executor) -> int | None:
    """How many jobs the executor runs at once; None where it does not tell.

    No executor tells it in public; `_max_workers` is what those of the standard library have.
    """
    if client := _client_of(executor):
        with _asking(client):
            client.wait_for_workers(1, timeout=CONNECT)
            threads: dict[str, int] = client.nthreads()
            return sum(threads.values())
    told: int | None = getattr(executor, "_max_workers", None)
    return told


def check_workers(executor: Executor, paths: Sequence[Path]) -> None:
    """Raises WorkersUnfit when a worker that can be asked lacks this version of the package or one
    of the files; names each worker. Of a Dask cluster every worker and the scheduler are asked.

    The questions are functions of the standard library, which a worker without us can answer.
    """
    context = getattr(executor, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise WorkersUnfit(
            "a forked worker hangs once MLX or a thread was used before the fork: "
            "ProcessPoolExecutor(mp_context=multiprocessing.get_context('spawn'))"
        )
    if (client := _client_of(executor)) is None:
        return
    defects: dict[str, str] = {}
    with _asking(client):
        client.wait_for_workers(1, timeout=CONNECT)
        for name in _PACKAGE:  # the scheduler unpickles what it passes on
            try:
                answer = client.run_on_scheduler(pkgutil.resolve_name, name)
            except ImportError as error:
                answer = error
            _compare(defects, _name(client), name, pkgutil.resolve_name(name), answer)
        for ask, what in [
            *((pkgutil.resolve_name, name) for name in _PACKAGE),
            *((os.path.getsize, str(path)) for path in paths),
        ]:
            answers = client.run(ask, what, on_error="return")
            for worker, answer in answers.items():
                _compare(defects, worker, what, ask(what), answer)
    if defects:
        listed = "\n  ".join(f"{address}: {defect}" for address, defect in defects.items())
        raise WorkersUnfit(
            "not every worker can convert; it needs this version of paroquant_stream, and the "
            f"model and the cache at the same paths of a shared file system:\n  {listed}"
        )


def _compare(defects: dict[str, str], address: str, what: str, here: Any, answer: Any) -> None:
    if answer != here and address not in defects:
        found = _one_line(answer) if isinstance(answer, BaseException) else answer
        size = " bytes" if isinstance(here, int) else ""
        defects[address] = f"{what}: expected {here}{size}, found {found}"


@contextmanager
def cluster(scheduler: str) -> Iterator[Executor]:
    """The workers of the Dask scheduler at this address. Raises WorkersLost, MissingExtra."""
    import asyncio

    try:
        import distributed
    except ImportError as error:
        raise MissingExtra(
            f"a Dask cluster needs its client: pip install 'paroquant_stream[dask]' ({error})"
        ) from error
    for name in ("distributed", "distributed.client"):  # the two that its own config sets a level
        logging.getLogger(name).setLevel(logging.CRITICAL)  # else tracebacks of what we say
    try:
        asyncio.run(_reach(scheduler))  # a client that finds nobody takes 20 s to be deleted
        client = distributed.Client(scheduler, timeout=CONNECT, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise WorkersLost(f"{scheduler}: no Dask scheduler answers ({_one_line(error)})") from error
    try:
        yield client.get_executor(pure=False)
    finally:
        with suppress(OSError):  # TimeoutError: what is to be said was said
            client.close(timeout=PATIENCE)


async def _reach(scheduler: str) -> None:
    import distributed

    security = distributed.Security().get_connection_args("client")
    comm = await distributed.comm.connect(scheduler, timeout=CONNECT, **security)
    await comm.close()


def _client_of(executor: Executor) -> Any:
    """The client of an executor that `distributed.Client.get_executor` made, else None."""
    if "distributed" not in sys.modules:
        return None
    from distributed.cfexecutor import ClientExecutor

    return executor._client if isinstance(executor, ClientExecutor) else None


@contextmanager
def _asking(client: Any) -> Iterator[None]:
    """Raises WorkersLost where the scheduler or its workers do not answer."""
    try:
        yield
    except (OSError, RuntimeError, TimeoutError, CancelledError) as error:
        raise WorkersLost(
            f"{_name(client)} or its workers do not answer ({_one_line(error)})"
        ) from error


def _name(client: Any) -> str:
    address = getattr(client.scheduler, "address", "closed")  # None once the client is closed
    return f"the Dask scheduler ({address})"


def _is_of_executor(error: Exception) -> bool:
    """Whether an error is the executor's own, and not one of the function that it ran."""
    kinds = (BrokenExecutor, CancelledError, ImportError)
    return isinstance(error, kinds) or type(error).__module__.partition(".")[0] == "distributed"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
