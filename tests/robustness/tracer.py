"""Faults by strace: at a system call of the whole process, whatever language makes it.

Never with --seccomp-bpf: a KILL that is injected then does not fire, and says nothing. The numbers
of calls are counted for each thread by itself.
"""

from __future__ import annotations

import functools
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.robustness.harness import CONVERT, Ended, Model, process

CALLS = {
    "write": "write",
    "pwrite": "pwrite64",
    "fsync": "fsync|fdatasync",
    "rename": "rename|renameat|renameat2",
    "unlink": "unlink|unlinkat",
    "openat": "openat",
    "close": "close",
    "fallocate": "fallocate",
    "ftruncate": "ftruncate",
    "flock": "flock",
    "mkdir": "mkdir|mkdirat",
    "link": "link|linkat|symlink|symlinkat",
    "fcntl": "fcntl",
}


@functools.cache
def why_not() -> str:
    """Why strace cannot be used here; empty when it can."""
    if not shutil.which("strace"):
        return "strace is not installed"
    done = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True)
    return done.stderr.decode().strip() if done.returncode else ""


@dataclass(frozen=True)
class Point:
    """One system call of a thread."""

    call: str
    """Its own name."""
    number: int
    """Among all of that name in its thread."""
    line: str
    """As strace showed it."""


def drop_traced(model: Model, log: Path, call: str, rule: str = "") -> Ended:
    """A drop under strace, with the rule for this call; `log` is a prefix of files."""
    names = f"/^({CALLS.get(call, call)})$"
    under = ["strace", "-ff", "-y", "-qq", "-o", str(log), "-e", f"trace={names}"]
    if rule:
        under += ["-e", f"inject={names}:{rule}"]
    return process(CONVERT, *model.arguments("--drop-source", "-y"), under=under)


def points(model: Model, log: Path, call: str) -> list[Point]:
    """The calls on the model's files in an undisturbed drop, by number; the model is gone then."""
    done = drop_traced(model, log, call)
    assert done.code == 0, done.err
    found: dict[tuple[str, int], Point] = {}
    for file in logs(log):
        counts: dict[str, int] = {}
        for line in file.read_text(errors="replace").splitlines():
            if not (match := re.match(rf"({CALLS[call]})\(", line)):
                continue
            name = match[1]  # `unlink` and `unlinkat` are counted apart
            counts[name] = counts.get(name, 0) + 1
            shown = re.sub(r'<([^>"]*)>, "([^/"]+)"', r'<\1>, "\1/\2"', line)
            if f"{model.directory}" in shown or f"{model.root}" in shown:
                found.setdefault((name, counts[name]), Point(name, counts[name], shown))
    return [found[key] for key in sorted(found)]


def killed(model: Model, log: Path, point: Point) -> bool:
    """Drops until the call; whether the process was killed inside of it."""
    done = drop_traced(model, log, point.call, f"signal=KILL:when={point.number}")
    inside = any(re.search(r"= \?$", file.read_text(errors="replace"), re.M) for file in logs(log))
    return done.code == -signal.SIGKILL and inside


def failed(model: Model, log: Path, point: Point, error: str) -> Ended | None:
    """Drops with that call failing once; None when it did not fire."""
    done = drop_traced(model, log, point.call, f"error={error}:when={point.number}")
    fired = any("(INJECTED)" in file.read_text(errors="replace") for file in logs(log))
    return done if fired else None


def logs(log: Path) -> list[Path]:
    return sorted(log.parent.glob(f"{log.name}.*"))
