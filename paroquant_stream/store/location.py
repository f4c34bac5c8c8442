"""The location of a store, and checks that only its owner can write into its directories."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ..errors import StoreError
from ..files import atomic_file
from ..files.folder import Folder

IN_PLACE = "mlx"
"""The subdirectory of a model directory for a conversion that is shipped with the model."""
_CACHEDIR_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Created by paroquant_stream.\n"


def user_cache_root() -> Path:
    """Return the user's cache: $PAROQUANT_STREAM_CACHE, or under $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("PAROQUANT_STREAM_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "paroquant" / "mlx_cache"


def mark_as_cache(root: Path) -> None:
    """Write the tag by which backup programs skip a cache, unless it exists.

    Args:
        root: The directory of the cache.

    Raises:
        OSError: The tag cannot be written.
    """
    tag = root / "CACHEDIR.TAG"
    if not (tag.exists() and tag.stat().st_size == len(_CACHEDIR_TAG)):
        tag.write_text(_CACHEDIR_TAG)


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that contains or would contain a path.

    Args:
        path: It may be absent; then its nearest existing parent counts.

    Raises:
        StoreError: The free space cannot be determined.
    """
    try:
        return atomic_file.free_bytes(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot determine the free space: {error.strerror}") from error


def open_child(folder: Folder, name: str, create: int | None) -> Folder:
    """Open a subdirectory without following a link.

    Args:
        folder: The parent.
        name: The name of the subdirectory.
        create: The mode to create it with if it is absent; None to require it.

    Returns:
        The subdirectory, which the caller closes.

    Raises:
        StoreError: It is a link or not a directory.
        OSError: It cannot be opened or created.
    """
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
    """Check that no other user could write into a directory.

    Args:
        folder: The directory.
        trusted: The status of a directory whose owner, and whose group or others if they can write
            into it, are trusted too; None to trust the user alone.

    Raises:
        StoreError: It belongs to another user, or another user can write into it.
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
            f"{folder.path}: others can write into it (mode {status.st_mode & 0o777:03o}); "
            f"run `chmod go-w {folder.path}` if you trust its contents, else remove it"
        )
