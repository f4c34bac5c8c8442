"""A process that forks while a thread of it converts: no child hangs, nothing is lost."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.robustness.cuts import CUTS, write_tiny
from tests.robustness.harness import (
    HUNG,
    Model,
    assert_completes,
    clean_environment,
    undisturbed,
)

FORK = """
import os, signal, sys, threading, time
from paroquant_stream import convert_checkpoint

model, cache, drops = sys.argv[1], sys.argv[2], sys.argv[3] == "drop"
inside, go_on = threading.Event(), threading.Event()

def on_progress(*_):
    inside.set()
    go_on.wait(60)

def work():
    convert_checkpoint(model, cache_dir=cache, jobs=1, drop_source=drops, progress=on_progress)

thread = threading.Thread(target=work)
thread.start()
assert inside.wait(60), "the thread never came to work"
pid = os.fork()
if pid == 0:
    signal.alarm(30)  # a child that hangs is ended by it
    try:
        convert_checkpoint(model, cache_dir=cache, jobs=1, drop_source=drops)
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
time.sleep(0.3)
go_on.set()
thread.join()
_, status = os.waitpid(pid, 0)
print(os.waitstatus_to_exitcode(status))
"""


def child_of_a_thread(model: Model, what: str) -> tuple[int, str]:
    """The exit code of a child that was forked while a thread held what a conversion holds."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", FORK, model.directory, model.cache, what],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=HUNG,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout), done.stderr


@pytest.mark.long
def test_a_child_forked_while_a_thread_converts_does_not_hang(place):
    model = Model(write_tiny(place / "model", CUTS["between linears"]), place / "cache")
    code, err = child_of_a_thread(model, "convert")
    assert code != -14, "the child hung"
    assert code in (0, 1), err


def test_a_child_forked_during_a_drop_does_not_hang(place):
    model = Model(write_tiny(place / "model", CUTS["a chain"]), place / "cache")
    right = undisturbed(model)
    code, err = child_of_a_thread(model, "drop")
    assert code != -14, "the child hung"
    assert code in (0, 1), err
    assert_completes(model, right)
