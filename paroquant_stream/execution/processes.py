"""Worker processes for a conversion, which end with the process that started them.

Unlike those of `multiprocessing` they do not import its main module again, so a program that loads
a model need not be written for that. A pipe leads to each; its end, however this process ends, is
the end of the worker. A child that this process forked may hold the pipe open, so a worker also
ends once it has another parent.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from weakref import WeakSet

from ..errors import WorkersUnfitError
from ..text import one_line
from .identity import difference, identity
from .threads import translate_refusals
from .worker import Call

ANSWER_SECONDS = 30.0
"""Until a worker has said what code it runs."""
END_SECONDS = 5.0
"""Until an idle worker has ended; then it is killed."""
_FLAGS = {
    "-I": "isolated",
    "-E": "ignore_environment",
    "-s": "no_user_site",
    "-P": "safe_path",
    "-S": "no_site",
    "-B": "dont_write_bytecode",
    "-O": "optimize",
}
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}  # numpy would start one per core, for no call
_START = """
import sys
sys.path[:] = sys.argv[2:]
try:
    import paroquant_stream
    del sys.path[0]
    from paroquant_stream.execution.worker import serve
except Exception as error:
    sys.exit(f"worker process: {type(error).__name__}: {error}")
serve(int(sys.argv[1]))
"""


_pipes: WeakSet[Connection] = WeakSet()
"""The ends of all workers' pipes in this process; a forked child closes its copies."""
_pools: WeakSet[Processes] = WeakSet()
_starting = threading.RLock()
"""Held while a worker starts: `Popen` would wait for the end of a child forked meanwhile."""


class Processes(Executor):
    """An executor whose workers are processes, all started at once."""

    def __init__(self, count: int) -> None:
        """Start the workers.

        Args:
            count: How many.

        Raises:
            OSError: The system starts no more processes.
            WorkersUnfitError: They do not answer, or would run other code than this process.
        """
        self._max_workers = count
        self._workers: list[Worker] = []
        self._idle: queue.SimpleQueue[Callable[[Call], Any]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="process")
        _pools.add(self)
        try:
            self._start(count)
        except BaseException:
            self.kill()
            raise

    def _start(self, count: int) -> None:
        """Start the workers, and wait until each has answered what it should."""
        self._workers += [Worker() for _ in range(count)]
        expected, until = identity(), time.monotonic() + ANSWER_SECONDS
        for worker in self._workers:
            worker.check(expected, until)
            self._idle.put(worker.call)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call a function in the next idle worker.

        Raises:
            ExecutionError: The system starts no more threads, or the program is ending.
        """
        with translate_refusals():
            return self._threads.submit(self._call, (fn, args, kwargs))

    def _call(self, call: Call) -> Any:
        work = self._idle.get()
        try:
            return work(call)
        finally:
            self._idle.put(work)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the workers once they are idle."""
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        for worker in self._workers:
            worker.hang_up()
        until = time.monotonic() + END_SECONDS
        for worker in self._workers:
            worker.end(until)

    def kill(self) -> None:
        """End the workers at once; what they write are temp files."""
        self._end_workers()
        self.shutdown(cancel_futures=True)

    def _end_workers(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.hang_up()  # no call waits, whoever holds the other end too

    def forget(self) -> None:
        """Leave the workers to the process that forked this one."""
        for worker in self._workers:
            worker.process.returncode = 0  # not a child of this process
        self._workers.clear()


class Worker:
    """A process that works, and the pipe to it."""

    def __init__(self) -> None:
        with _starting:
            self._open()

    def _open(self) -> None:
        self.pipe, theirs = Pipe()
        _pipes.add(self.pipe)
        with theirs:
            fd = theirs.fileno()
            root = str(Path(__file__).parents[2])  # first: finds this copy of the package alone
            self.process = subprocess.Popen(
                [sys.executable, *_flags(), "-c", _START, str(fd), root, *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # what is no Python might print there
                pass_fds=[fd],
                process_group=0,  # Ctrl-C reaches the group of the terminal alone
                env=os.environ | _ENVIRONMENT,
            )

    def check(self, expected: dict[str, Any], until: float) -> None:
        """Check that the process answers, and runs the code of this one.

        Args:
            expected: The identity of this process.
            until: When it must have answered, of `time.monotonic`.

        Raises:
            WorkersUnfitError: It does not.
        """
        try:
            if self.pipe.poll(max(0.0, until - time.monotonic())):
                found = difference(expected, self.pipe.recv_bytes(1 << 20))
            else:
                found = f"no answer in {ANSWER_SECONDS:.0f} s"
        except (EOFError, OSError) as error:
            found = f"it ended before it answered ({one_line(error) or 'no reason given'})"
        except Exception as error:
            found = f"it answers something else ({one_line(error)})"
        if found:
            raise WorkersUnfitError(
                f"{sys.executable}: a worker process does not run the code of this program "
                f"({found}); start the program again if the package was replaced meanwhile, or "
                "convert with threads"
            )

    def hang_up(self) -> None:
        """Let the process read the end of the pipe, also where a forked child holds it open."""
        with contextlib.suppress(OSError):  # it has ended
            with socket.socket(fileno=os.dup(self.pipe.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)

    def end(self, until: float) -> None:
        """Wait for the end of the process, and kill it when it lasts until then."""
        try:
            self.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.pipe.close()

    def call(self, call: Call) -> Any:
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
def processes(count: int, kind: type[Processes] = Processes) -> Iterator[Executor]:
    """Provide a pool of worker processes, which end with this process however it ends.

    Args:
        count: How many processes.
        kind: The class of the pool.

    Raises:
        OSError: The system starts no more processes.
        WorkersUnfitError: They do not answer, or would run other code than this process.
    """
    pool = kind(count)
    try:
        yield pool
        pool.shutdown(cancel_futures=True)
    except BaseException:  # an interrupt of the shutdown too
        pool.kill()
        raise


def _flags() -> list[str]:
    """Return the options of this interpreter that decide what code is found."""
    flags = [option for option, name in _FLAGS.items() for _ in range(getattr(sys.flags, name))]
    return [*flags, *(f"-W{each}" for each in sys.warnoptions)]


def _forget_in_child() -> None:
    """Close the copies of the pipes in a forked child, and leave the workers to the parent."""
    _starting.release()
    for pipe in list(_pipes):
        pipe.close()
    for pool in list(_pools):
        pool.forget()


os.register_at_fork(
    before=_starting.acquire,
    after_in_parent=_starting.release,
    after_in_child=_forget_in_child,
)
