"""A Dask cluster as an executor."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import MissingExtraError, WorkersLostError
from ..text import one_line
from .threads import PATIENCE

CONNECT = 10.0  # s for a scheduler to answer, and for the first of its workers to come


@contextmanager
def cluster(scheduler: str) -> Iterator[Executor]:
    """The workers of the Dask scheduler at this address. Raises WorkersLostError, MissingExtraError."""
    import asyncio

    try:
        import distributed
    except ImportError as error:
        raise MissingExtraError(
            f"a Dask cluster needs its client: pip install 'paroquant_stream[dask]' ({error})"
        ) from error
    for name in ("distributed", "distributed.client"):  # the two that its own config sets a level
        logging.getLogger(name).setLevel(logging.CRITICAL)  # else tracebacks of what we say
    try:
        asyncio.run(_reach(scheduler))  # a client that finds nobody takes 20 s to be deleted
        client = distributed.Client(scheduler, timeout=CONNECT, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise WorkersLostError(
            f"{scheduler}: no Dask scheduler answers ({one_line(error)})"
        ) from error
    try:
        yield client.get_executor(pure=False)
    finally:
        with suppress(OSError):  # TimeoutError: what is to be said was said
            client.close(timeout=PATIENCE)


def client_of(executor: Executor) -> Any:
    """The client of an executor that `distributed.Client.get_executor` made, else None."""
    if "distributed" not in sys.modules:
        return None
    from distributed.cfexecutor import ClientExecutor

    return executor._client if isinstance(executor, ClientExecutor) else None


@contextmanager
def asking(client: Any) -> Iterator[None]:
    """Raises WorkersLostError where the scheduler or its workers do not answer."""
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


async def _reach(scheduler: str) -> None:
    import distributed

    security = distributed.Security().get_connection_args("client")
    comm = await distributed.comm.connect(scheduler, timeout=CONNECT, **security)
    await comm.close()
