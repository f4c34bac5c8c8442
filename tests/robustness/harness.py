"""Models and runs, from outside: what is asked of a command, how it ended, what it left.

A model can be completed when one more run of the same command ends with 0 and `load` gives the
parameters of the model that nothing disturbed, nothing is left in tmp, and a further run does
nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from tests.helpers.paths import ROOT

CONVERT, CACHE, LOAD = (
    "paroquant_stream.convert",
    "paroquant_stream.cache",
    "tests.robustness.loading",
)
HUNG = 120.0  # s after which a run of a tiny model will never end
Fault = dict[str, Any]
Parameters = dict[str, list[Any]]
"""Name -> dtype, shape and SHA-256 of every parameter of a loaded model."""


def clean_environment() -> dict[str, str]:
    """The variables of a run: this tree's package, one thread for arithmetic."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OPENBLAS_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    """The exit code; of a run that a signal ended, the signal's number below zero."""
    out: str
    err: str
    fired: tuple[str, ...] = ()
    """What the fault noted each time that it fired."""

    @property
    def message(self) -> str:
        """The last line of stderr, for people."""
        return (self.err.strip().splitlines() or [f"exit code {self.code}"])[-1][:300]


class Running:
    """A run that was begun."""

    def __init__(self, zygote: Zygote, number: int) -> None:
        self._zygote, self._number = zygote, number
        self.place = zygote.place / str(number)
        self._begun, self._ended = threading.Event(), threading.Event()
        self._pid, self._code = 0, 0

    def hear(self, answer: Mapping[str, int]) -> None:
        """Takes what the zygote says of this run."""
        if "pid" in answer:
            self._pid = answer["pid"]
            self._begun.set()
        else:
            self._code = answer["code"]
            self._ended.set()

    @property
    def pid(self) -> int:
        assert self._begun.wait(HUNG)
        return self._pid

    @property
    def is_over(self) -> bool:
        return self._ended.is_set()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, if the run is not over."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def has_fired(self) -> bool:
        """Whether the fault has fired by now."""
        return os.path.exists(f"{self.place}.fired")

    def wait_for_fault(self) -> bool:
        """Whether the fault fired before the run was over; returns as soon as that is known."""
        while not self._ended.wait(0.003):
            if self.has_fired():
                return True
        return self.has_fired()

    def wait(self, seconds: float = HUNG) -> Ended:
        """How it ended. Fails when it does not."""
        if not self._ended.wait(seconds):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._ended.wait(10)
            raise AssertionError(f"did not end in {seconds:.0f} s; {self._text('err')[-2000:]}")
        fired = tuple(self._text("fired").splitlines())
        ended = Ended(self._code, self._text("out"), self._text("err"), fired)
        for kind in ("out", "err", "fired"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.place}.{kind}")
        self._zygote.forget(self._number)
        return ended

    def _text(self, kind: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            return Path(f"{self.place}.{kind}").read_text(errors="surrogateescape")
        return ""


class Zygote:
    """The process that forks runs; see zygote.py."""

    def __init__(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="runs-"))
        self._numbers = itertools.count(1)
        self._running: dict[int, Running] = {}
        self._lock = threading.Lock()
        self._errors = (self.place / "zygote").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-B", "-m", "tests.robustness.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=ROOT,
            env=clean_environment(),
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def start(self, module: str, *argv: object, fault: Fault | None = None) -> Running:
        """Begins `python -m module argv`."""
        with self._lock:
            number = next(self._numbers)
            running = self._running[number] = Running(self, number)
            if fault is not None:
                fault = {"fired": f"{running.place}.fired", **fault}
            request = {
                "id": number,
                "module": module,
                "argv": [os.fspath(a) if isinstance(a, os.PathLike) else str(a) for a in argv],
                "env": clean_environment(),
                "cwd": os.getcwd(),
                "out": f"{running.place}.out",
                "err": f"{running.place}.err",
                "fault": fault,
            }
            stdin = self._process.stdin
            assert stdin
            stdin.write(json.dumps(request, default=os.fspath).encode() + b"\n")
            stdin.flush()
        return running

    def forget(self, number: int) -> None:
        with self._lock:
            del self._running[number]

    def _listen(self) -> None:
        stdout = self._process.stdout
        assert stdout
        for line in stdout:
            answer = json.loads(line)
            self._running[answer["id"]].hear(answer)

    def close(self) -> None:
        """Ends it, and with it every run that it began."""
        for running in list(self._running.values()):
            running.send(signal.SIGKILL)
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._listener.join()
        self._process.stdout.close()
        self._errors.close()
        shutil.rmtree(self.place)


_zygotes: list[Zygote] = []


def zygote() -> Zygote:
    """This process's zygote."""
    if not _zygotes:
        _zygotes.append(Zygote())
    return _zygotes[0]


def close_zygote() -> None:
    """Ends this process's zygote, if it has one."""
    while _zygotes:
        _zygotes.pop().close()


def process(module: str, *argv: object, under: Sequence[str] = (), **variables: str) -> Ended:
    """`python -m module argv` as a process of its own, perhaps under another program."""
    done = subprocess.run(
        [*under, sys.executable, "-B", "-m", module, *map(str, argv)],
        env={**clean_environment(), **variables},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=HUNG,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def faulty(module: str, *argv: object, fault: Fault, **variables: str) -> Ended:
    """`python -m module argv` as a process of its own that suffers the fault."""
    with tempfile.TemporaryDirectory(prefix="fired-") as place:
        path = Path(place, "fired")
        what = json.dumps({"fired": str(path), **fault}, default=os.fspath)
        ended = process("tests.robustness.faults", what, module, *argv, **variables)
        fired = path.read_text().splitlines() if path.exists() else []
        return replace(ended, fired=tuple(fired))


def in_zygote(module: str, *argv: object, fault: Fault | None = None) -> Ended:
    """`python -m module argv`, at once."""
    return zygote().start(module, *argv, fault=fault).wait()


@dataclass(frozen=True)
class Model:
    """A model directory, where it is converted to, and how it is asked for."""

    directory: Path
    cache: Path | None
    """None: in place, into the directory itself."""
    jobs: int = 1
    options: tuple[str, ...] = ()
    """More of `convert`, as `--dtype float16`; `load` gets the dtype, too."""

    @property
    def _where(self) -> list[str]:
        return ["--in-place"] if self.cache is None else ["--cache-dir", str(self.cache)]

    @property
    def root(self) -> Path:
        """The cache, or the tree beside the model."""
        return self.cache or self.directory / "mlx"

    def arguments(self, *more: str) -> list[str]:
        """Those of `convert`."""
        options = [*self._where, "--jobs", str(self.jobs), "--json", *self.options, *more]
        return [str(self.directory), *options]

    def start(self, *more: str, fault: Fault | None = None) -> Running:
        """Begins `convert`."""
        return zygote().start(CONVERT, *self.arguments(*more), fault=fault)

    def convert(self, *more: str, fault: Fault | None = None) -> Ended:
        return self.start(*more, fault=fault).wait()

    def start_drop(self, fault: Fault | None = None) -> Running:
        """Begins `convert --drop-source -y`."""
        return self.start("--drop-source", "-y", fault=fault)

    def drop(self, fault: Fault | None = None) -> Ended:
        return self.start_drop(fault).wait()

    def start_load(self, *more: str, fault: Fault | None = None) -> Running:
        options = ["--cache-dir", self.cache] if self.cache else []
        if "--dtype" in self.options:
            at = self.options.index("--dtype")
            options += self.options[at : at + 2]
        return zygote().start(LOAD, self.directory, *options, *more, fault=fault)

    def load(self, *more: str, fault: Fault | None = None) -> Ended:
        return self.start_load(*more, fault=fault).wait()

    def command(self, *argv: object, fault: Fault | None = None) -> Ended:
        """`cache ARGV` in this model's cache; nothing is asked."""
        return self.start_command(*argv, fault=fault).wait()

    def start_command(self, *argv: object, fault: Fault | None = None) -> Running:
        """Begins `cache ARGV`."""
        assert self.cache
        name, *rest = argv
        more = ["-y"] if name in ("rm", "prune") else []
        return zygote().start(CACHE, name, *rest, "--cache-dir", self.cache, *more, fault=fault)

    def moved(self, directory: Path) -> Self:
        """The same model after its directory was renamed."""
        os.rename(self.directory, directory)
        return replace(self, directory=directory)

    @property
    def sources(self) -> list[str]:
        """The names of the shards that are there."""
        found = self.directory.glob("*.safetensors")
        return sorted(path.name for path in found if path.name != "converted_mlx.safetensors")

    @property
    def entries(self) -> list[Path]:
        """The entries of the whole cache."""
        return sorted(self.root.glob("v1/entries/*/*.safetensors"))

    @property
    def temps(self) -> list[str]:
        """What lies in any directory called tmp."""
        return [str(p) for p in self.root.rglob("tmp/**/*") if not p.is_dir() or p.is_symlink()]

    def watched(self, **fault: Any) -> Fault:
        """A fault among the calls on this model's files."""
        in_a_hub = self.directory.parent.name == "snapshots"
        beside = [self.directory.parent.parent / "blobs"] if in_a_hub else []
        return {"under": [self.directory, self.root, *beside], **fault}


def parameters(ended: Ended) -> Parameters | None:
    """What a load printed; None when it failed."""
    return json.loads(ended.out) if ended.code == 0 else None


def undisturbed(model: Model) -> Parameters:
    """The parameters of a copy that is converted into a cache of its own."""
    with tempfile.TemporaryDirectory(prefix="undisturbed-") as place:
        copy = replace(
            model,
            directory=Path(shutil.copytree(model.directory, Path(place, "model"))),
            cache=Path(place, "cache"),
        )
        done = copy.convert()
        assert done.code == 0, done.err
        loaded = copy.load()
        found = parameters(loaded)
        assert found, loaded.err
        return found


@dataclass(frozen=True)
class Verdict:
    """Whether a model can be completed, and why not."""

    why: str = ""
    lost: bool = False
    """That no run brings it back: shards are gone whose tensors no load gives."""

    def __bool__(self) -> bool:
        return not self.why


def completes(model: Model, right: Parameters, *more: str) -> Verdict:
    """Whether one more run of the drop completes the model, and one more does nothing."""
    options = more or ("--drop-source", "-y")
    rerun = model.convert(*options)
    if rerun.code:
        return Verdict(f"the rerun fails: {one_line(rerun)}", lost=not loads_right(model, right))
    if why := differs(model, right):
        return Verdict(why, lost=True)
    if "--drop-source" in options and model.sources:
        return Verdict(f"the rerun left {model.sources}")
    if model.temps:
        return Verdict(f"left in tmp: {model.temps}")
    before = states(model.entries)
    again = model.convert(*options)
    if again.code:
        return Verdict(f"the second rerun fails: {one_line(again)}")
    actions = {shard["action"] for shard in json.loads(again.out)["shards"]}
    if actions != {"reused"} or states(model.entries) != before:
        return Verdict(f"the second rerun has work: {actions}")
    return Verdict()


def loads_right(model: Model, right: Parameters) -> bool:
    return parameters(model.load()) == right


def differs(model: Model, right: Parameters) -> str:
    """Why a load does not give these parameters; empty when it does."""
    loaded = model.load()
    found = parameters(loaded)
    if found is None:
        return f"load fails: {one_line(loaded)}"
    wrong = [n for n in right.keys() | found.keys() if right.get(n) != found.get(n)]
    return f"{len(wrong)} of {len(right)} parameters are WRONG, {min(wrong)}" if wrong else ""


def assert_loads(model: Model, right: Parameters) -> None:
    """A load gives these parameters, bit for bit."""
    why = differs(model, right)
    assert not why, why


def assert_completes(model: Model, right: Parameters) -> None:
    """One more run of the drop completes the model."""
    why = completes(model, right).why
    assert not why, why


def one_line(ended: Ended) -> str:
    """The exit code and the error message, on a line."""
    lines = [line.strip() for line in ended.err.splitlines()]
    errors = [i for i, line in enumerate(lines) if line.startswith(("error:", "Traceback"))]
    kept = lines[errors[-1] :] if errors else lines[-3:]
    return f"({ended.code}) {' | '.join(kept)}"[:600]


def states(paths: Sequence[Path]) -> dict[str, tuple[int, int, int]]:
    """Inode, size and mtime of each file."""
    found = {}
    for path in paths:
        status = os.lstat(path)
        found[str(path)] = status.st_ino, status.st_size, status.st_mtime_ns
    return found


def snapshot(directory: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below a directory and itself: kind, mode, size, times and bytes; no link is
    followed.
    """
    found = {}
    for path in (directory, *sorted(directory.rglob("*"))):
        status = os.lstat(path)
        content = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = sha256(path)
        times = status.st_mtime_ns, status.st_ctime_ns
        found[str(path)] = status.st_ino, status.st_mode, status.st_size, times, content
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def holds(directory: Path, digest: str) -> bool:
    """Whether some file below a directory has these bytes."""
    return any(
        sha256(path) == digest
        for path in directory.rglob("*")
        if path.is_file() and not path.is_symlink()
    )


def flip(path: Path, at: float = 0.5, bit: int = 0) -> None:
    """Flips one bit of a file in place; `at`: where, as a part of its size."""
    with path.open("r+b") as file:
        offset = min(int(path.stat().st_size * at), path.stat().st_size - 1)
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def prune(model: Model, *rules: str) -> Ended:
    """`cache prune` two hours from now: what is spared because it is young is not spared."""
    return model.command("prune", *rules, fault={"clock": 7200})


def put_back(model: Model, backup: Path) -> None:
    """Copies the shards back that the model's directory lacks."""
    for path in backup.glob("*.safetensors"):
        if not (model.directory / path.name).exists():
            shutil.copy2(path, model.directory / path.name)


@functools.cache
def fast_place() -> Path | None:
    """A directory in memory, for runs that no power cut can reach; None where there is none."""
    place = Path("/dev/shm")
    return place if place.is_dir() and os.access(place, os.W_OK) else None


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory for the body, in memory where that is possible."""
    with tempfile.TemporaryDirectory(prefix="robustness-", dir=fast_place()) as place:
        yield Path(place)
