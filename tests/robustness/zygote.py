"""A process that has imported everything once and forks a copy of itself for every run.

A line of JSON asks for a run, `{"id", "module", "argv", "env", "cwd", "out", "err", "fault"}`; the
answers are `{"id", "pid"}` when it was begun and `{"id", "code"}` when it ended, as `waitpid` tells
it. A run is `python -m MODULE ARGV`, without its second of imports.

MLX may be imported here and never used: a child of a process that has evaluated something hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import sys
import threading
import traceback
import warnings
from typing import NoReturn

THEIRS = ("mlx.core", "mlx_lm.models.llama", "mlx_lm.utils", "mlx_vlm.utils", "transformers")


def preload() -> None:
    """Imports every module of the package and what loading a model imports."""
    import paroquant_stream

    found = pkgutil.walk_packages(paroquant_stream.__path__, "paroquant_stream.")
    ours = [module.name for module in found if not module.name.endswith("__main__")]
    for name in (*ours, *THEIRS, "tests.robustness.faults", "tests.robustness.loading"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else a child's first collection writes to, and so copies, every page


def serve() -> None:
    """Answers requests until stdin ends."""
    answers = os.dup(1)
    os.set_inheritable(answers, False)
    wakeup, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running: dict[int, int] = {}
    rest = b""

    def say(**answer: int) -> None:
        os.write(answers, json.dumps(answer).encode() + b"\n")

    while True:
        ready, _, _ = select.select([0, wakeup], [], [])
        if wakeup in ready:
            os.read(wakeup, 4096)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            say(id=running.pop(pid), code=os.waitstatus_to_exitcode(status))
        if 0 in ready:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if not pid:
                    for fd in (answers, wakeup, woken):
                        os.close(fd)
                    run(request)
                running[pid] = request["id"]
                say(id=request["id"], pid=pid)


def run(request: dict[str, object]) -> NoReturn:
    """Becomes the run that is asked for."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no run outlives its test
    for fd, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, request["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        os.dup2(os.open(name, flags, 0o600), fd)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    os._exit(outcome(request["module"], request["argv"], request["fault"]))


def outcome(module: str, argv: list[str], fault: dict[str, object] | None) -> int:
    """The exit code of `python -m module argv`, its threads waited for as an interpreter does."""
    from tests.robustness import faults

    code = 70
    try:
        sys.argv = [module, *argv]
        faults.install(fault)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the module is imported already
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


if __name__ == "__main__":
    preload()
    serve()
