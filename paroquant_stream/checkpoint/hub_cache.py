"""The cache of huggingface_hub: its blobs, and which of them are still linked to."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..files.folder import Folder


class HubCache:
    """The repository in a Hub cache of which a model directory is a snapshot."""

    def __init__(self, repository: Path, blobs: Folder) -> None:
        self._repository, self._blobs = repository, identity(blobs.status())
        self._shared = None  # <hub>/blobs, for files that several repositories share
        with contextlib.suppress(OSError), Folder.open(repository.parent) as hub:
            with hub.child("blobs") as shared:
                self._shared = identity(shared.status())

    @classmethod
    def of(cls, directory: Path) -> HubCache | None:
        """Find the repository of a model directory.

        Args:
            directory: The model directory, perhaps reached by a link.

        Returns:
            The repository; None if the directory is not a snapshot in a Hub cache.
        """
        snapshots = Path(os.path.realpath(directory)).parent
        repository = snapshots.parent
        if snapshots.name != "snapshots" or not repository.name.startswith("models--"):
            return None
        with contextlib.suppress(OSError), Folder.open(repository) as folder:
            with folder.child("blobs") as blobs:
                return cls(repository, blobs)
        return None

    def is_blob(self, folder: Folder) -> bool:
        """Return whether an open directory is the repository's `blobs`."""
        return identity(folder.status()) == self._blobs

    def holds(self, folder: Folder) -> bool:
        """Return whether an open directory is the repository's `blobs` or holds shared blobs."""
        if self.is_blob(folder):
            return True
        above = identity(os.stat("..", dir_fd=folder.fd))
        return self._shared is not None and above == self._shared

    @property
    def blobs(self) -> Path:
        """Return the path of the repository's blobs."""
        return self._repository / "blobs"

    def sweep_shared(self, shared: tuple[Folder, str, os.stat_result]) -> None:
        """Remove a blob that repositories share, unless another repository uses it.

        Args:
            shared: The blob's directory, name and status.
        """
        with contextlib.suppress(ImportError):  # from huggingface_hub 2 on, see its PR 4498
            from huggingface_hub.utils._shared_blobs import sweep_shared_blob

            path = Path(os.path.realpath(shared[0].path / shared[1]))
            sweep_shared_blob(path, cache_dir=self._repository.parent)

    def is_used(self, blob: str, link: tuple[Folder, str, os.stat_result]) -> bool:
        """Return whether a snapshot has another link to a blob.

        Args:
            blob: The blob's name.
            link: The directory, name and status of the link that does not count.

        Raises:
            OSError: A directory of the snapshots cannot be examined.
        """
        own = identity(link[0].status()), link[1]
        for directory, _, names in os.walk(self._repository / "snapshots"):
            here = identity(os.stat(directory))
            for name in names:
                with contextlib.suppress(OSError):  # not a link
                    parent, target = os.path.split(os.readlink(os.path.join(directory, name)))
                    there = identity(os.stat(os.path.join(directory, parent)))
                    if target == blob and there == self._blobs and (here, name) != own:
                        return True
        return False


def identity(status: os.stat_result) -> tuple[int, int]:
    """Return the device and inode, which identify a file or directory."""
    return status.st_dev, status.st_ino
