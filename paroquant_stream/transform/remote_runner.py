"""One shard converted by a worker elsewhere: another process, perhaps on another host, that sees
the same files.

While a run wants its shards, a file of it lies in the store's `tmp`, its sign. A worker that does
not see it works on another store, and one from whose sight it goes stops: this needs neither a
lock nor a message, and so fits every executor.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import ParoquantStreamError, RunCancelledError, WorkersUnfitError
from ..execution.executors import call_elsewhere, check_workers
from ..execution.slots import Places, Worker
from ..store.store import Store
from .source import Tick
from .task_runner import Job, Outcome, run_task

LOOK = 0.2  # s between two looks at the sign; a network file system answers most from its cache
_thread = threading.local()


@contextmanager
def runner(
    executor: Executor | None, directory: Path, store: Store
) -> Iterator[Callable[[Job, Worker, Tick], Outcome]]:
    """`run_task`, here or on an executor.

    On an executor the tick is silent and the stages inside a shard are not traced. Raises
    WorkersUnfitError, before any work, when a worker lacks something.
    """
    if executor is None:
        yield run_task
        return
    directory = directory.absolute()  # a worker has a working directory of its own
    store, host = replace(store, root=store.root.absolute()), os.uname().nodename
    with store.new_file(0) as sign:
        check_workers(executor, [sign.path, directory / "config.json"])

        def run(job: Job, worker: Worker, _tick: Tick) -> Outcome:
            sent = replace(job, directory=directory, store=store)
            call = (run_elsewhere, sent, sign.path, host)
            return call_elsewhere(executor, worker.check, *call)

        yield run


def run_elsewhere(job: Job, sign: Path, host: str) -> Outcome:
    """What `run_task` gives, in a worker of an executor that the run on `host` uses.

    Raises what `run_task` raises, with the name of this host if it is another one; WorkersUnfitError
    when `sign` is not there; RunCancelledError soon after it went.
    """
    here, looked = os.uname().nodename, time.monotonic()

    def tick(_count: int) -> None:
        nonlocal looked
        if time.monotonic() - looked >= LOOK:
            looked = time.monotonic()
            if not _is_there(sign):
                raise RunCancelledError("the run that wanted this shard has ended")

    try:
        if not _is_there(sign):
            raise WorkersUnfitError(
                f"{sign}: not there for a worker on {here}; the cache must lie at the same path of "
                "one shared file system, or the run has ended"
            )
        worker = Worker(_places())
        try:
            return run_task(job, worker, tick)
        finally:
            worker.leave()
    except ParoquantStreamError as error:
        if here == host:
            raise
        raise type(error)(f"on {here}: {error}") from error


def _places() -> Places:
    """The place of this thread, whose memory stays from shard to shard.

    With new memory for each, a Dask worker grew to 918 MB in five runs, with this it stays at 250.
    """
    if not hasattr(_thread, "places"):
        _thread.places = Places(1)
    places: Places = _thread.places
    return places


def _is_there(sign: Path) -> bool:
    try:
        os.stat(sign)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    except OSError:  # a server that does not answer now is no sign that the run has ended
        return True
    return True
