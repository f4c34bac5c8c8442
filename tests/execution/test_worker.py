"""A worker answers what it is and then calls, until its pipe or its parent ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from multiprocessing.connection import Pipe

import pytest

from paroquant_stream.execution.identity import difference, identity
from paroquant_stream.execution.processes import processes
from tests.helpers.pool_calls import LIMIT

pytestmark = pytest.mark.slow  # each starts a process
SERVE = "import sys; from paroquant_stream.execution import worker; worker.serve(int(sys.argv[1]))"


@pytest.fixture
def start(request):
    """Start a worker, and return it and the other end of its pipe."""

    def start(script: str = SERVE):
        ours, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", script, str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stderr=subprocess.PIPE,
            )  # fmt: skip
        request.addfinalizer(ours.close)
        request.addfinalizer(process.kill)
        return process, ours

    return start


def test_a_worker_says_what_it_is_and_answers_calls(start):
    process, pipe = start()
    answer = pipe.recv_bytes()
    assert json.loads(answer)["python"] == sys.version
    assert difference(identity(), answer) is None
    pipe.send((abs, (-1,), {}))
    assert pipe.recv() == (True, 1)
    pipe.send((int, ("x",), {}))
    succeeded, error = pipe.recv()
    assert (succeeded, type(error)) == (False, ValueError)
    pipe.close()
    assert process.communicate(timeout=LIMIT)[1] == b""
    assert process.returncode == 1


LATE = """
import select, sys
from paroquant_stream.execution import worker
worker._receive = lambda *_: None  # it may end the process first
select.select([int(sys.argv[1])], [], [])
worker.serve(int(sys.argv[1]))
"""


def test_a_worker_without_a_reader_ends_silently(start):
    """Those that still start when a short run ends would each print an error."""
    process, pipe = start(LATE)  # it answers once the pipe has ended
    pipe.close()
    assert process.communicate(timeout=LIMIT)[1] == b""
    assert process.returncode == 1


def test_a_worker_that_cannot_say_what_it_is_says_why(start):
    broken = "from paroquant_stream.execution import worker\n"
    broken += "def fail():\n    raise ValueError('two\\nlines')\nworker.identity = fail\n"
    process, pipe = start(broken + SERVE)
    with pytest.raises(EOFError):
        pipe.recv_bytes()
    assert process.communicate(timeout=LIMIT)[1].count(b"\n") == 1
    assert process.returncode == 1


def test_a_worker_starts_no_threads_of_openblas():
    with processes(1) as pool:
        assert pool.submit(os.getenv, "OPENBLAS_NUM_THREADS").result(LIMIT) == "1"
        assert pool.submit(os.getenv, "PATH").result(LIMIT) == os.environ["PATH"]
