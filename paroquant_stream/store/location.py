"""Where a store lies, and whether its directories are ones that only their owner can write into."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StoreError
from ..files import atomic_file
from ..files.folder import Folder

if TYPE_CHECKING:
    pass

_CACHEDIR_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Created by paroquant_stream.\n"


def user_cache_root() -> Path:
    """The user's cache: $PAROQUANT_STREAM_CACHE, else under $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("PAROQUANT_STREAM_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "paroquant" / "mlx_cache"


def mark_as_cache(root: Path) -> None:
    """Leave the tag by which backup programs skip a cache. Raises OSError."""
    tag = root / "CACHEDIR.TAG"
    if not (tag.exists() and tag.stat().st_size == len(_CACHEDIR_TAG)):
        tag.write_text(_CACHEDIR_TAG)


def free_bytes(path: Path) -> int:
    """Return the bytes free where a path lies or would lie. Raises StoreError."""
    try:
        return atomic_file.free_bytes(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot tell its free space: {error.strerror}") from error


def step_into(folder: Folder, name: str, create: int | None) -> Folder:
    """Open a directory below. Raises StoreError when it is a link or no directory, OSError."""
    try:
        return folder.child(name, create)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise StoreError(
            f"{folder.path / name}: expected a directory, found a link or a file; links below "
            f"{folder.path} are not followed: remove it"
        ) from error


def check_owner(folder: Folder, trusted: os.stat_result | None) -> None:
    """Raises StoreError when others than the user, or than may write into the `trusted` directory,
    could write into this one.
    """
    status, user = folder.status(), os.geteuid()
    owners, writable = {user}, 0o022
    if trusted:
        owners, writable = owners | {trusted.st_uid}, writable & ~trusted.st_mode
    if status.st_uid not in owners:
        raise StoreError(
            f"{folder.path}: owned by user {status.st_uid}, not by you ({user}); choose a "
            "cache of your own with --cache-dir"
        )
    if status.st_mode & writable:
        raise StoreError(
            f"{folder.path}: others can write into it (mode {status.st_mode & 0o777:03o}); run "
            f"`chmod go-w {folder.path}` if you trust what is in it, else remove it"
        )


IN_PLACE = "mlx"
"""The directory inside a model directory in which a conversion can be shipped with the model."""
