"""A Dask scheduler and its workers as processes on loopback, without dashboards and fixed ports."""

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
from paroquant_stream.transform import unit_pool, unit_runner
def run_unit(unit, tick, *rest, **options):
    def count(size):
        tick(size)
        try:
            if unit.path:
                os.rename("armed", "firing")
            else:
                return
        except FileNotFoundError:
            return
        with open("firing") as file:
            target, number = map(int, file.read().split())
        target = target or os.getpid()
        with open("firing", "w") as file:
            file.write(f"{target} {[unit.path.name]}")
        os.rename("firing", "fired")
        os.kill(target, number)
    return unit_runner.run_unit(unit, count, *rest, **options)
unit_pool.run_unit = run_unit
"""
SCHEDULER = "from distributed.cli.dask_scheduler import main; main()"
WORKER = "from distributed.cli.dask_worker import main; main()"


class LoopbackCluster:
    """A context manager that starts the processes and kills them."""

    def __init__(self, directory: Path, workers: int = 2, prelude: str = "") -> None:
        """Set up the cluster; `prelude` is code that the scheduler runs before it listens."""
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
        """Let the next worker that is writing an entry send a signal to `target`, or to itself."""
        (self.directory / "fired").unlink(missing_ok=True)
        (self.directory / "armed").write_text(f"{target} {int(number)}")

    def fired(self) -> str:
        """Return the process that was signalled, and what the worker was writing then."""
        return (self.directory / "fired").read_text()

    def add_worker(self, prelude: str = FAULT) -> subprocess.Popen[bytes]:
        """Start a worker of one thread that is not restarted; `prelude` runs before it connects."""
        options = ["--no-nanny", "--nthreads", "1", "--no-dashboard"]
        options += ["--local-directory", str(self.directory)]
        return self._start(f"{prelude}\n{WORKER}", self.address, *options)

    def wait(self, workers: int) -> None:
        """Wait for this many workers."""
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
        """Wait for the file that the scheduler writes once it listens, and read it."""
        until = time.monotonic() + 30
        while time.monotonic() < until and self.scheduler.poll() is None:
            try:
                return json.loads(self._file.read_text())
            except (OSError, ValueError):
                time.sleep(0.02)
        raise AssertionError(self._log.read_text())
