"""Worker processes for a conversion, which end with the process that started them.

Unlike those of `multiprocessing` they do not import its main module again, so a program that loads
a model need not be written for that. A pipe leads to each; its end, however this process ends, is
the end of the worker.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

_START = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from paroquant_stream.execution.processes import serve; serve(int(sys.argv[1]))"
)
_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Processes(Executor):
    """An executor whose workers are processes, all started at once."""

    def __init__(self, count: int) -> None:
        """Start the workers.

        Args:
            count: How many.

        Raises:
            OSError: The system starts no more processes.
        """
        self._max_workers = count
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="process")
        try:
            for _ in range(count):
                self._workers.append(_Worker())
                self._idle.put(self._workers[-1])
        except BaseException:
            self.kill()
            raise

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call a function in the next idle worker."""
        return self._threads.submit(self._call, (fn, args, kwargs))

    def _call(self, call: _Call) -> Any:
        worker = self._idle.get()
        try:
            return worker.call(call)
        finally:
            self._idle.put(worker)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the workers once they are idle."""
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            worker.process.wait()

    def kill(self) -> None:
        """End the workers at once; what they write are temp files."""
        for worker in self._workers:
            worker.process.kill()
        self.shutdown(cancel_futures=True)


class _Worker:
    """A process, and the pipe to it."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            fd = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, str(fd), *sys.path],
                stdin=subprocess.DEVNULL,
                pass_fds=[fd],
                process_group=0,  # Ctrl-C reaches the group of the terminal alone
            )

    def call(self, call: _Call) -> Any:
        """Call a function in the process and return its result, or raise its error.

        Raises:
            BrokenExecutor: The process has ended.
        """
        try:
            self.pipe.send(call)
            succeeded, result = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            code = self.process.wait()
            raise BrokenExecutor(f"a worker process ended with exit code {code}") from error
        if succeeded:
            return result
        raise result


@contextmanager
def processes(count: int) -> Iterator[Executor]:
    """Provide a pool of worker processes, which end with this process however it ends.

    Args:
        count: How many processes.

    Raises:
        OSError: The system starts no more processes.
    """
    pool = Processes(count)
    try:
        yield pool
    except BaseException:
        pool.kill()
        raise
    pool.shutdown(cancel_futures=True)


def serve(fd: int) -> None:
    """Answer the calls that come through a pipe, until it is closed.

    Args:
        fd: Of the pipe.
    """
    pipe = Connection(fd)
    calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, calls), daemon=True).start()
    while True:
        function, args, kwargs = calls.get()
        try:
            answer = True, function(*args, **kwargs)
        except Exception as error:
            answer = False, error
        try:
            pipe.send(answer)
        except OSError:
            os._exit(1)
        except Exception as error:  # it cannot be pickled
            pipe.send((False, RuntimeError(f"{answer[1]!r} cannot be returned: {error}")))


def _receive(pipe: Connection, calls: queue.SimpleQueue[_Call]) -> None:
    """Take calls from the pipe while a call runs, so that its end ends that call."""
    while True:
        try:
            calls.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(1)
        except Exception as error:  # a function of another version, or one that is not importable
            calls.put((_raise, (error,), {}))


def _raise(error: Exception) -> None:
    raise error
