"""Worker processes beside this one, which is the first to work: no call waits until they start."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from multiprocessing import connection
from typing import Any

from ..errors import WorkersUnfitError
from . import processes
from .identity import identity
from .processes import Processes, Worker
from .threads import INTERRUPT_TIMEOUT, translate_refusals
from .worker import Call

logger = logging.getLogger(__name__)


class EagerProcesses(Processes):
    """An executor whose workers are this process and others, each from its answer on.

    Where one of the others does not answer what it should, another thread works here.
    """

    def __init__(self, count: int) -> None:
        """Start the other processes.

        Args:
            count: How many work, this one included.

        Raises:
            OSError: The system starts no more processes.
            ExecutionError: The system starts no more threads, or the program is ending.
        """
        self._here: list[Executor] = []
        self._running: set[Future[Any]] = set()
        """Calls in this process."""
        self._silent: dict[Any, Worker] = {}
        self._lock, self._is_warned = threading.Lock(), False
        self._ending = False
        self._left: Future[None] = Future()
        """Done once `kill` waits no longer for a call that runs here."""
        self._greeter = ThreadPoolExecutor(1, thread_name_prefix="greeter")
        super().__init__(count)

    def _start(self, count: int) -> None:
        self._work_here()
        for _ in range(count - 1):
            self._workers.append(Worker())
            self._silent[self._workers[-1].pipe] = self._workers[-1]
        with translate_refusals():
            self._greeter.submit(self._greet, identity(), list(self._silent))

    def _work_here(self) -> None:
        """Let one more thread of this process work."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="worker")  # one that keeps its buffers
        self._here.append(thread)

        def work(call: Call) -> Any:
            function, args, kwargs = call
            with self._lock, translate_refusals():
                if self._ending:  # it waited for a worker
                    raise BrokenExecutor("the pool of this call was ended")
                future = thread.submit(function, *args, **kwargs)
                self._running.add(future)
            try:
                wait((future, self._left), return_when=FIRST_COMPLETED)
                if not future.done():
                    raise BrokenExecutor("the pool of this call was ended while it ran")
                return future.result()
            finally:
                self._running.discard(future)

        self._idle.put(work)

    def _greet(self, expected: dict[str, Any], pipes: Iterable[connection.Connection]) -> None:
        """Let each process work once it has answered."""
        waiting, until = set(pipes), time.monotonic() + processes.ANSWER_SECONDS
        while waiting:
            ready = connection.wait(waiting, max(0.0, until - time.monotonic())) or list(waiting)
            for pipe in ready:
                waiting.discard(pipe)
                with self._lock:
                    worker = self._silent.pop(pipe, None)
                if worker:
                    self._admit(worker, expected, until)

    def _admit(self, worker: Worker, expected: dict[str, Any], until: float) -> None:
        try:
            worker.check(expected, until)
        except WorkersUnfitError as error:
            worker.process.kill()
            if self._ending:
                return
            if not self._is_warned:
                logger.warning("no worker processes, so threads convert: %s", error)
            self._is_warned = True
            self._work_here()
        else:
            self._idle.put(worker.call)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the workers once they are idle; those that have not answered yet at once."""
        with self._lock:
            silent = list(self._silent.values())
            self._silent.clear()
        for worker in silent:
            worker.process.kill()
            worker.hang_up()  # ends the wait for its answer
        self._greeter.shutdown(cancel_futures=True)
        super().shutdown(wait, cancel_futures=cancel_futures)
        for thread in self._here:
            thread.shutdown(wait and not self._ending, cancel_futures=cancel_futures)

    def kill(self) -> None:
        """End the workers at once; a call that runs here has a moment, as it cannot be ended."""
        with self._lock:
            self._ending, running = True, list(self._running)
        self._end_workers()
        wait(running, INTERRUPT_TIMEOUT)
        if not self._left.done():
            self._left.set_result(None)
        self.shutdown(cancel_futures=True)

    def forget(self) -> None:
        """Leave the workers to the process that forked this one."""
        super().forget()
        self._running.clear()  # the child has no threads that run them, or that hold the lock
        self._lock = threading.Lock()
