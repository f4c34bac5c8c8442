"""What a worker process runs: calls that come through its pipe, until that ends."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ..text import one_line
from .identity import identity

POLL_SECONDS = 1.0
"""Between checks that the parent lives."""
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def serve(fd: int) -> None:
    """Say what this process is, and answer calls, until the pipe is closed or the parent ends.

    Args:
        fd: Of the pipe.
    """
    pipe = Connection(fd)
    calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
    receiver = threading.Thread(target=_receive, args=(pipe, calls, os.getppid()), daemon=True)
    try:
        receiver.start()
        pipe.send_bytes(json.dumps(identity()).encode())
    except BrokenPipeError:  # the parent has ended, or has no work left
        os._exit(1)
    except Exception as error:
        sys.exit(f"worker process: {type(error).__name__}: {one_line(error)}")
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


def _receive(pipe: Connection, calls: queue.SimpleQueue[Call], parent: int) -> None:
    """Take calls from the pipe while a call runs, so that its end ends that call."""
    while True:
        try:
            while not pipe.poll(POLL_SECONDS):
                if os.getppid() != parent:
                    os._exit(1)
            calls.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(1)
        except Exception as error:  # a function of another version, or one that is not importable
            calls.put((_raise, (error,), {}))


def _raise(error: Exception) -> None:
    raise error
