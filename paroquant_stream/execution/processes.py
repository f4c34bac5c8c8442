"""Worker processes for a conversion, which end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial

from .threads import INTERRUPT_TIMEOUT


@contextmanager
def processes(count: int) -> Iterator[Executor]:
    """Provide a pool of worker processes, which end with this process however it ends.

    The workers are spawned: the state of MLX and of threads does not survive a fork.

    Args:
        count: How many processes.
    """
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _initialize_worker)
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


def _initialize_worker() -> None:
    """Ignore Ctrl-C, which a terminal sends to the whole group, and watch the parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
