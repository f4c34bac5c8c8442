"""A Dask scheduler and its workers, each a process of its own, on loopback; no dashboards, no
fixed ports.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.paths import ROOT

FAULT = """
import os
from paroquant_stream.transform import source
real = source.Source._count
def count(self, size):
    real(self, size)
    try:
        os.rename("armed", "firing")
    except FileNotFoundError:
        return
    with open("firing") as file:
        target, number = map(int, file.read().split())
    target = target or os.getpid()
    tmp = self._digest_cache.directory.parent / "tmp"
    temps = [name for name in os.listdir(tmp) if f"-{os.getpid()}-" in name]
    with open("firing", "w") as file:
        file.write(f"{target} {temps}")
    os.rename("firing", "fired")
    os.kill(target, number)
source.Source._count = count
"""
SCHEDULER = "from distributed.cli.dask_scheduler import main; main()"
WORKER = "from distributed.cli.dask_worker import main; main()"


class LoopbackCluster:
    """A context; ends every process when it is left."""

    def __init__(self, directory: Path, workers: int = 2, prelude: str = "") -> None:
        """`prelude` runs in the scheduler's process before it listens."""
        self.directory, self._count, self._prelude = directory, workers, prelude
        self._file = directory / "scheduler.json"
        self._log = directory / "log"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.address = ""

    def __enter__(self) -> LoopbackCluster:
        try:
            options = ["--port", "0", "--no-dashboard", "--scheduler-file", str(self._file)]
            self.scheduler = self._start(f"{self._prelude}\n{SCHEDULER}", *options)
            self.address = self._written()["address"]
            for _ in range(self._count):
                self.add_worker()
            if self._count:
                self.wait(self._count)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def arm(self, target: int = 0, number: int = signal.SIGKILL) -> None:
        """The first worker that is in the middle of a shard signals `target`, else itself."""
        (self.directory / "fired").unlink(missing_ok=True)
        (self.directory / "armed").write_text(f"{target} {int(number)}")

    def fired(self) -> str:
        """Who was signalled, and the temps that the worker was writing then."""
        return (self.directory / "fired").read_text()

    def add_worker(self, prelude: str = FAULT) -> subprocess.Popen[bytes]:
        """A worker of one thread, without a nanny that would start it again; `prelude` runs before
        it connects.
        """
        options = ["--no-nanny", "--nthreads", "1", "--no-dashboard"]
        options += ["--local-directory", str(self.directory)]
        return self._start(f"{prelude}\n{WORKER}", self.address, *options)

    def wait(self, workers: int) -> None:
        """Returns when so many workers are there."""
        from distributed import Client

        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=30)

    def _start(self, code: str, *arguments: str) -> subprocess.Popen[bytes]:
        paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", code, "--host", "127.0.0.1", *arguments],
                env=environment, cwd=self.directory, stdout=log, stderr=log,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def _written(self) -> dict[str, str]:
        """What the scheduler writes once it listens."""
        until = time.monotonic() + 30
        while time.monotonic() < until and self.scheduler.poll() is None:
            try:
                return json.loads(self._file.read_text())
            except (OSError, ValueError):
                time.sleep(0.02)
        raise AssertionError(self._log.read_text())
