"""Worker processes for a conversion, which end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from .threads import INTERRUPT_TIMEOUT


@contextmanager
def processes(count: int) -> Iterator[Executor]:
    """Provide a pool of worker processes, which end with this process however it ends.

    The workers are spawned: the state of MLX and of threads does not survive a fork.

    Args:
        count: How many processes.
    """
    pool = _Pool(count, multiprocessing.get_context("spawn"), _initialize_worker)
    shutdown = threading.Thread(target=partial(pool.shutdown, cancel_futures=True), daemon=True)
    timeout: float | None = None
    try:
        yield pool
    except Exception:
        raise
    except BaseException:  # Ctrl-C or SIGTERM
        timeout = INTERRUPT_TIMEOUT
        raise
    finally:
        shutdown.start()
        shutdown.join(timeout)


class _Pool(ProcessPoolExecutor):
    """A pool whose workers never see Ctrl-C, which a terminal sends to the whole group."""

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:  # starts workers
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by them
        try:
            return super().submit(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _initialize_worker() -> None:
    """Watch the parent process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
