"""Processes that are stopped at a chosen point."""

from __future__ import annotations

import time

from paroquant_stream.files import temp_files
from tests.helpers.pool_calls import LIMIT

ENDS = """
import sys, threading, time
from concurrent.futures import thread
from paroquant_stream import ExecutionError, convert_checkpoint

def wait_for_the_end(*_):
    while not thread._shutdown:  # no more calls are taken: the main thread has ended
        time.sleep(0.001)

def work():
    try:
        convert_checkpoint(sys.argv[1], cache_dir=sys.argv[2], jobs=2, progress=wait_for_the_end)
    except ExecutionError as error:
        print(error)

threading.Thread(target=work).start()
"""
"""A program that ends while a thread of it converts."""


def killed_at(*calls: str, setup: str = "") -> str:
    """Return a script that converts and is killed before the n-th of these calls of `os`.

    Its arguments are n and those of the convert command; `setup` runs before.
    """
    return (
        setup
        + f"""
import os, signal, sys
from paroquant_stream.cli import convert
step, calls = int(sys.argv[1]), 0
def deadly(real):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call
for name in {calls!r}:
    setattr(os, name, deadly(getattr(os, name)))
sys.exit(convert.main(sys.argv[2:]))
"""
    )


def wait_for_the_end_of(names: list[str]) -> None:
    """Wait until init has reaped the processes that these temporary files are named after."""
    for name in names:
        until = time.monotonic() + LIMIT
        pid = int(name.split("-")[3])
        while temp_files._is_running(pid):  # private: what decides whether a leftover is removed
            assert time.monotonic() < until
            time.sleep(0.01)
