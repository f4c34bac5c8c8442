"""A new directory that appears under its name complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import UnwritableFileError
from ..text import bytes_text
from .atomic_file import free_bytes, sync_directory


@contextlib.contextmanager
def new_directory(target: Path, needed: int) -> Iterator[Path]:
    """Yield an empty directory that is renamed to `target` after the body.

    When the body raises, the directory is removed. The body makes its own files durable.

    Args:
        target: The final path; nothing, or an empty directory, may be there.
        needed: Bytes that the body is going to write.

    Raises:
        UnwritableFileError: The directory cannot be made or renamed, or the disk is too full.
    """
    temp = target.with_name(f".{target.name}.{os.urandom(8).hex()}")
    try:
        temp.mkdir()
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        _check_free_space(target, needed)
        yield temp
        _rename(temp, target)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _check_free_space(target: Path, needed: int) -> None:
    """Raise UnwritableFileError unless `needed` bytes are free."""
    try:
        free = free_bytes(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    if free < needed:
        raise UnwritableFileError(
            f"{target}: {bytes_text(needed)} needed, {bytes_text(free)} free; free some "
            "space and run again"
        )


def _rename(temp: Path, target: Path) -> None:
    """Rename the directory and make the name durable; remove it when that fails."""
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
    """Return the error of a directory that cannot be written."""
    return UnwritableFileError(
        f"{target}: cannot be written: {error.strerror}; name a directory that can be"
    )
