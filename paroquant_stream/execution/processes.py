"""Worker processes for a conversion, which end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial

from .threads import PATIENCE


@contextmanager
def processes(count: int) -> Iterator[Executor]:
    """`count` worker processes, which end with this one, whatever ends it.

    Fresh interpreters: what MLX and threads have in memory does not survive a fork.
    """
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin_worker)
    end = threading.Thread(target=partial(pool.shutdown, cancel_futures=True), daemon=True)
    patience: float | None = None
    try:
        yield pool
    except Exception:
        raise
    except BaseException:  # Ctrl-C or SIGTERM
        patience = PATIENCE
        raise
    finally:
        end.start()
        end.join(patience)


def _begin_worker() -> None:
    """Leaves Ctrl-C, which a terminal sends to the whole group, to the parent; ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
