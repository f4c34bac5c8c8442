"""A Dask cluster as an executor. The only module that imports `distributed`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import MissingExtraError, WorkersLostError
from ..text import install_text, one_line
from .threads import INTERRUPT_TIMEOUT

CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a scheduler to answer, and for its first worker."""


@contextmanager
def cluster(scheduler: str) -> Iterator[Executor]:
    """Connect to a Dask cluster and provide its executor.

    Args:
        scheduler: The address of the scheduler, "tcp://HOST:PORT".

    Raises:
        MissingExtraError: The package `distributed` is not installed.
        WorkersLostError: No scheduler answers.
    """
    import asyncio

    try:
        import distributed
    except ImportError as error:
        raise MissingExtraError(
            f"a Dask cluster needs distributed ({one_line(error)}): "
            f"{install_text('distributed', 'dask')}"
        ) from error
    # Dask's config sets the levels of two; tornado logs units that are cancelled while it waits
    for name in ("distributed", "distributed.client", "tornado.application"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # else they log tracebacks of our errors
    try:
        asyncio.run(_connect(scheduler))  # a client that finds no scheduler is slow to delete
        client = distributed.Client(scheduler, timeout=CONNECT_TIMEOUT, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise WorkersLostError(
            f"{scheduler}: no Dask scheduler answers ({one_line(error)})"
        ) from error
    try:
        yield client.get_executor(pure=False)
    finally:
        with suppress(OSError):  # TimeoutError; a lost scheduler was reported by the body
            client.close(timeout=INTERRUPT_TIMEOUT)


def client_of(executor: object) -> Any:
    """Return the client whose `get_executor` made this executor, or None if none did."""
    if "distributed" not in sys.modules:
        return None
    from distributed.cfexecutor import ClientExecutor

    return executor._client if isinstance(executor, ClientExecutor) else None


@contextmanager
def translate_errors(client: Any) -> Iterator[None]:
    """Raise WorkersLostError where the body finds that the cluster does not answer.

    Args:
        client: The client that the body calls.

    Raises:
        WorkersLostError: The scheduler or its workers do not answer.
    """
    try:
        yield
    except (OSError, RuntimeError, TimeoutError, CancelledError) as error:
        raise WorkersLostError(
            f"{client_name(client)} or its workers do not answer ({one_line(error)})"
        ) from error


def client_name(client: Any) -> str:
    """Name a Dask client by its scheduler's address, for messages."""
    address = getattr(client.scheduler, "address", "closed")  # None once the client is closed
    return f"the Dask scheduler ({address})"


async def _connect(scheduler: str) -> None:
    import distributed

    security = distributed.Security().get_connection_args("client")
    comm = await distributed.comm.connect(scheduler, timeout=CONNECT_TIMEOUT, **security)
    await comm.close()
