"""What befalls a run, from inside of its own process: `install` puts itself around the calls of
`os` that touch files below some directories, and reacts to the one given to it.

    do        at the N-th call that counts
    log       nothing; the calls are listed all the same
    kill      SIGKILL, before the call
    tear      half of what was to be written is written, then SIGKILL; elsewhere like `kill`
    signal    that signal, then the call
    fail      the call raises an OSError, once or from then on
    pause     waits until a file is there, then the call
    run       Python source, before or after the call, once or at every call
    turns     waits now and then until another run has made some calls, which its own log tells

`python -m tests.robustness.faults JSON MODULE ARGV` is `python -m MODULE ARGV` with that fault, in
a process of its own. Each reaction appends a line to the file `fired`. Python's own file objects
call no function of `os` when they write: what they do is seen by `tracer` alone.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import importlib.abc
import io
import json
import os
import random
import re
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

NAMES = ("replace", "rename", "link", "symlink", "unlink", "remove", "rmdir", "mkdir", "truncate")
NAMES += ("utime",)
DATA = ("write", "pwrite", "writev", "pwritev", "posix_fallocate", "ftruncate", "sendfile")
CHANGES = (*NAMES, *DATA, "open for writing", "flock")
"""Between two of these a process may die anywhere: the files are the same."""
CALLS = (*CHANGES, "open", "fsync", "fdatasync", "close")
NEVER_FAIL = ("close", "flock")
"""Calls that a full or failing disk does not make fail."""
READS = ("read", "pread", "preadv", "readv")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_REAL = {name: getattr(os, name) for name in dir(os) if callable(getattr(os, name))}
_flock = fcntl.flock


def install(fault: dict[str, Any] | None) -> None:
    """Makes this process suffer the fault."""
    if not fault:
        return
    if fault.get("no_locks"):
        _forget_locks(fault)
    if fault.get("no_fsync"):
        os.fsync = os.fdatasync = lambda _: note(fault, "an fsync that is none")
    if seconds := fault.get("clock"):
        _move_clock(seconds)
    if modules := fault.get("blocked"):
        sys.meta_path.insert(0, _Blocker(modules))
    if fault.get("do"):
        Watch(fault).install()
    if fault.get("bad_read"):
        BadRead(fault).install()


def note(fault: dict[str, Any], text: str) -> None:
    """Proves that a fault fired."""
    if path := fault.get("fired"):
        fd = _REAL["open"](path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        _REAL["write"](fd, f"{text}\n".encode(errors="surrogateescape"))
        _REAL["close"](fd)


class Places:
    """Which files a call is about, and whether they lie below the directories that count."""

    def __init__(self, under: Sequence[str]) -> None:
        self._under = tuple(os.path.realpath(path) for path in under)
        self._open: dict[int, str] = {}

    def opened(self, fd: int, path: str) -> None:
        self._open[fd] = path

    def closed(self, fd: int) -> None:
        self._open.pop(fd, None)

    def of(self, what: Any, dir_fd: int | None = None) -> str:
        """The absolute path of a file given as a path or a descriptor."""
        if isinstance(what, int):
            if what in self._open:
                return self._open[what]
            with contextlib.suppress(OSError):
                return str(_REAL["readlink"](f"/proc/self/fd/{what}"))
            return ""
        path = os.fsdecode(what)
        if dir_fd is not None:
            path = os.path.join(self.of(dir_fd), path)
        return os.path.abspath(path)

    def count(self, paths: Sequence[str]) -> bool:
        """Whether any of the paths is below a directory that counts."""
        return any(f"{path}/".startswith(f"{root}/") for path in paths for root in self._under)


class Watch:
    """Counts the calls, and reacts."""

    def __init__(self, fault: dict[str, Any]) -> None:
        self._fault, self._places = fault, Places(fault["under"])
        self._calls = frozenset(fault.get("calls") or CHANGES)
        self._pattern = re.compile(fault.get("match") or "")
        self._lock, self._inside = threading.RLock(), threading.local()
        self._number = 0
        self._random = random.Random(fault.get("seed", 0))
        self._react: Callable[[_Event], None] = getattr(self, "_" + fault["do"])

    def install(self) -> None:
        for name in (*NAMES, *DATA, "open", "fsync", "fdatasync", "close"):
            if hasattr(os, name):
                setattr(os, name, self._around(name, getattr(os, name)))
        fcntl.flock = self._around("flock", fcntl.flock)

    def _around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if getattr(self._inside, "yes", False):
                return real(*arguments, **options)
            event = _Event(name, real, arguments, options)
            with self._lock:
                event.paths = self._paths(event)
                if counts := self._counts(event):
                    self._number += 1
                    event.number = self._number
            self._inside.yes = True
            try:
                if counts:
                    self._list(event)
                    self._react(event)
                if not event.done:
                    event.call()
            finally:
                self._inside.yes = False
                if name == "close":
                    self._places.closed(arguments[0])
            if name == "open":
                self._places.opened(event.result, event.paths[0])
            if counts and event.afterwards:
                self._inside.yes = True
                try:
                    event.afterwards()
                finally:
                    self._inside.yes = False
            return event.result

        return call

    def _paths(self, event: _Event) -> list[str]:
        given, options = event.arguments, event.options
        if event.name in ("replace", "rename", "link", "symlink"):
            first = options.get("src_dir_fd")
            second = options.get("dst_dir_fd", options.get("dir_fd"))
            return [self._places.of(given[0], first), self._places.of(given[1], second)]
        return [self._places.of(given[0], options.get("dir_fd"))] if given else []

    def _counts(self, event: _Event) -> bool:
        kind = event.name
        if kind == "open":
            flags = event.arguments[1] if len(event.arguments) > 1 else 0
            kind = "open for writing" if flags & _WRITING else "open"
        if kind not in self._calls or not self._places.count(event.paths):
            return False
        return bool(self._pattern.search(f"{event.name} {' '.join(event.paths)}"))

    def _list(self, event: _Event) -> None:
        if path := self._fault.get("log"):
            line = f"{time.monotonic():.6f}\t{event.name}\t" + "\t".join(event.paths)
            note({"fired": path}, line)

    def _is_it(self, event: _Event) -> bool:
        at = self._fault.get("at", 0)
        return event.number == at or bool(self._fault.get("forever") and event.number > at)

    def _fire(self, event: _Event) -> None:
        note(self._fault, f"{event.number} {event.name} {' '.join(event.paths)}")

    def _kill(self, event: _Event) -> None:
        if self._is_it(event):
            self._fire(event)
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    def _tear(self, event: _Event) -> None:
        if self._is_it(event):
            if event.name in ("write", "pwrite"):
                data = memoryview(event.arguments[1]).cast("B")
                event.real(event.arguments[0], data[: len(data) // 2], *event.arguments[2:])
            self._kill(event)

    def _signal(self, event: _Event) -> None:
        if self._is_it(event):
            self._fire(event)
            os.kill(os.getpid(), getattr(signal, self._fault["signal"]))

    def _fail(self, event: _Event) -> None:
        if self._is_it(event) and event.name not in NEVER_FAIL:
            self._fire(event)
            number = getattr(errno, self._fault["errno"])
            raise OSError(number, os.strerror(number), event.paths[0] if event.paths else None)

    def _pause(self, event: _Event) -> None:
        if self._is_it(event):
            self._fire(event)
            while not os.path.exists(self._fault["until"]):
                time.sleep(0.005)

    def _run(self, event: _Event) -> None:
        if self._fault.get("at") and not self._is_it(event):
            return

        def act() -> None:
            self._fire(event)
            with self._lock:
                exec(self._fault["script"], {"event": event, "os": os})

        if self._fault.get("after"):
            event.afterwards = act
        else:
            act()

    def _turns(self, _event: _Event) -> None:
        with self._lock:
            wait = self._random.random() < self._fault.get("often", 0.2)
            count = self._random.randrange(1, 60)
        other = self._fault["other"]
        began = size = _size(other)
        seen = time.monotonic()
        while wait and size < began + count * 60 and time.monotonic() - seen < 0.08:
            time.sleep(0.002)
            if _size(other) > size:
                size, seen = _size(other), time.monotonic()

    def _log(self, event: _Event) -> None:
        """Every call is listed as it is."""


class _Event:
    """A call that is about to be made."""

    def __init__(
        self,
        name: str,
        real: Callable[..., Any],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        self.name, self.real, self.arguments, self.options = name, real, arguments, options
        self.paths: list[str] = []
        self.number = 0
        self.done, self.result = False, None
        self.afterwards: Callable[[], None] | None = None

    def call(self) -> None:
        self.done, self.result = True, self.real(*self.arguments, **self.options)


def _size(path: str) -> int:
    """Bytes of a file that grows, 60 or so for each call in it."""
    with contextlib.suppress(FileNotFoundError):
        return _REAL["stat"](path).st_size
    return 0


class BadRead:
    """One bit of what one read gives is wrong; the file is sound, and so is every other read."""

    def __init__(self, fault: dict[str, Any]) -> None:
        self._fault, self._places = fault, Places(fault["under"])
        self._at, self._number = fault["bad_read"], 0
        self._lock = threading.Lock()

    def install(self) -> None:
        for name in READS:
            setattr(os, name, self._around(name, getattr(os, name)))
        builtins.open = io.open = self._opened(builtins.open)
        os.fdopen = self._opened(os.fdopen)

    def _due(self, what: Any, count: int) -> bool:
        path = self._places.of(what)
        if not count or not self._places.count([path]):
            return False
        with self._lock:
            self._number += 1
            due = self._number == self._at
        if due:
            note(self._fault, f"{self._number} {path}")
        return due

    def _around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: int, what: Any, *rest: Any) -> Any:
            result = real(fd, what, *rest)
            if name in ("read", "pread"):
                return _flipped(result) if self._due(fd, len(result)) else result
            if self._due(fd, result):
                view = memoryview(what[0]).cast("B")
                view[min(result, len(view)) // 2] ^= 4
            return result

        return call

    def _opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opening(*arguments: Any, **options: Any) -> Any:
            file = real(*arguments, **options)
            mode = options.get("mode", arguments[1] if len(arguments) > 1 else "r")
            return _Reader(file, self._due) if "b" in mode else file

        return opening


class _Reader:
    """A file object that was opened in binary mode, its `read` under watch."""

    def __init__(self, file: Any, due: Callable[[Any, int], bool]) -> None:
        self._file, self._due = file, due

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._file)

    def read(self, *arguments: Any) -> bytes:
        data: bytes = self._file.read(*arguments)
        return _flipped(data) if self._due(self._file.fileno(), len(data)) else data


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def _forget_locks(fault: dict[str, Any]) -> None:
    """Locks that everybody gets at once, as some network file systems give them."""
    control = fcntl.fcntl
    locking = {
        getattr(fcntl, name, None)
        for name in ("F_SETLK", "F_SETLKW", "F_OFD_SETLK", "F_OFD_SETLKW")
    }

    def granted(*_: Any) -> None:
        note(fault, "a lock that is none")

    fcntl.flock = fcntl.lockf = granted
    fcntl.fcntl = lambda fd, command, *rest: (
        granted() if command in locking else control(fd, command, *rest)
    )


def _move_clock(seconds: float) -> None:
    """Every file of this minute counts as left alone for long."""
    clock, clock_ns = time.time, time.time_ns
    time.time = lambda: clock() + seconds
    time.time_ns = lambda: clock_ns() + int(seconds * 1e9)


class _Blocker(importlib.abc.MetaPathFinder):
    """Packages that are not installed."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        for module in [m for m in sys.modules if m.partition(".")[0] in self._names]:
            del sys.modules[module]

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] in self._names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    _, what, module, *rest = sys.argv
    sys.argv = [module, *rest]
    install(json.loads(what))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
