"""Start processes that are sent signals."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def default_sigint() -> Iterator[None]:
    """Let processes that the body starts be interrupted by SIGINT.

    A process inherits an ignored SIGINT, which is how a shell starts jobs in the background.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
