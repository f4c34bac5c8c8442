"""One new directory outside of the store, whole or not there at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import UnwritableFileError
from .atomic_file import free_bytes, sync_directory


@contextlib.contextmanager
def new_directory(target: Path, needed: int) -> Iterator[Path]:
    """A new directory to fill, called `target` once the body is done and gone if it fails.

    `needed`: bytes that the body is going to write. The body makes its files durable itself. Raises
    UnwritableFileError.
    """
    temp = target.with_name(f".{target.name}.{os.urandom(8).hex()}")
    try:
        temp.mkdir()
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        _check_room(target, needed)
        yield temp
        _rename(temp, target)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _check_room(target: Path, needed: int) -> None:
    try:
        free = free_bytes(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    if free < needed:
        raise UnwritableFileError(
            f"{target}: {needed:,} bytes needed, {free:,} free; make room and run again"
        )


def _rename(temp: Path, target: Path) -> None:
    try:
        os.rename(temp, target)
        try:
            sync_directory(target.parent)
        except OSError:
            shutil.rmtree(target, ignore_errors=True)
            raise
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> UnwritableFileError:
    return UnwritableFileError(
        f"{target}: cannot be written: {error.strerror}; name a directory that can be"
    )
