"""The cache of huggingface_hub: its blobs, and which are still linked to."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..files.folder import Folder


class HubCache:
    """The repository of a Hub cache that a model directory is a snapshot of."""

    def __init__(self, repository: Path, blobs: Folder) -> None:
        self._repository, self._blobs = repository, identity(blobs.status())
        self._shared = None  # <hub>/blobs, whose files repositories share
        with contextlib.suppress(OSError), Folder.open(repository.parent) as hub:
            with hub.child("blobs") as shared:
                self._shared = identity(shared.status())

    @classmethod
    def of(cls, directory: Path) -> HubCache | None:
        """The repository, or None for a directory that is no snapshot of one."""
        snapshots = Path(os.path.realpath(directory)).parent
        repository = snapshots.parent
        if snapshots.name != "snapshots" or not repository.name.startswith("models--"):
            return None
        with contextlib.suppress(OSError), Folder.open(repository) as folder:
            with folder.child("blobs") as blobs:
                return cls(repository, blobs)
        return None

    def is_blob(self, folder: Folder) -> bool:
        """Whether a directory is the repository's `blobs`."""
        return identity(folder.status()) == self._blobs

    def holds(self, folder: Folder) -> bool:
        """Whether a directory is the repository's `blobs`, or one of the files that all share."""
        if self.is_blob(folder):
            return True
        above = identity(os.stat("..", dir_fd=folder.fd))
        return self._shared is not None and above == self._shared

    @property
    def blobs(self) -> Path:
        """The directory of the blobs."""
        return self._repository / "blobs"

    def sweep_shared(self, shared: tuple[Folder, str, os.stat_result]) -> None:
        """Remove a file that the Hub's client shares between repositories, if no other uses it."""
        with contextlib.suppress(ImportError):  # from release 2 on, see pull request 4498 there
            from huggingface_hub.utils._shared_blobs import sweep_shared_blob

            path = Path(os.path.realpath(shared[0].path / shared[1]))
            sweep_shared_blob(path, cache_dir=self._repository.parent)

    def is_used(self, blob: str, link: tuple[Folder, str, os.stat_result]) -> bool:
        """Whether a link other than `link` leads to a blob. Raises OSError."""
        own = identity(link[0].status()), link[1]
        for directory, _, names in os.walk(self._repository / "snapshots"):
            here = identity(os.stat(directory))
            for name in names:
                with contextlib.suppress(OSError):  # no link
                    parent, target = os.path.split(os.readlink(os.path.join(directory, name)))
                    there = identity(os.stat(os.path.join(directory, parent)))
                    if target == blob and there == self._blobs and (here, name) != own:
                        return True
        return False


def identity(status: os.stat_result) -> tuple[int, int]:
    """Tell one directory or file from every other: its device and inode."""
    return status.st_dev, status.st_ino
