"""The directories that paroquant's own MLX cache (its pull request 50) leaves under the same root.

    <root>/<16 hex>/converted_mlx.safetensors

Only directories of exactly this form are listed: 16 hex digits, no link, in it that file and at
most some JSON, all of them regular files. Anything else in the root is the user's own.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .scan import Found, regular_files

FILE_NAME = "converted_mlx.safetensors"
_NAME = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class Foreign:
    """One directory of that cache."""

    path: Path
    files: tuple[Found, ...]

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.files)

    @property
    def last_used(self) -> float:
        """When it was written: nothing notes when it is read."""
        return max(file.mtime_ns for file in self.files) / 1e9


def foreign_directories(root: Path) -> Iterator[Foreign]:
    """List the directories of that cache under a root, by name."""
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                foreign = _foreign_at(Path(entry.path))
                if foreign:
                    yield foreign


def _foreign_at(path: Path) -> Foreign | None:
    try:
        names = sorted(os.listdir(path))
    except OSError:
        return None
    files = tuple(regular_files(path))
    form = FILE_NAME in names and all(n == FILE_NAME or n.endswith(".json") for n in names)
    return Foreign(path, files) if form and [f.path.name for f in files] == names else None


def remove_foreign(foreign: Foreign) -> int:
    """Remove the directory if it still has the form and the files it was found with.

    Works on a descriptor of the directory, so a link put in its place meanwhile is not followed.

    Returns:
        The bytes freed.

    Raises:
        OSError: It cannot be removed.
    """
    if _foreign_at(foreign.path) != foreign:
        return 0
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(foreign.path, flags)
    try:
        for file in foreign.files:
            os.unlink(file.path.name, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(foreign.path)
    return foreign.size
