"""The store: reads, writes and publishes entries and manifests.

    <root>/
      CACHEDIR.TAG                                   backup programs skip the cache
      v1/entries/ab/<64 hex key>.safetensors         immutable; ab: the key's first two digits
      v1/entries/ab/<64 hex key>.digest              the writer's digest, see `entry_digest`
      v1/manifests/<64 hex model id>.msgpack         in place: model-<16 hex>.msgpack
      v1/manifests/<model id>.msgpack.removed        until the model's last entry is removed
      v1/dropped/<64 hex id>.{first,second}.msgpack  see drop_record.py
      v1/damaged/<key>.<number>.safetensors          damaged, but cannot be made again
      v1/memo/<size>-<device>-<inode>                digests of files, see digest_cache.py
      v1/locks/<name>.lock                           never deleted, or two runs could hold it
      v1/tmp/<temp name>                             files that are being written

Below the root no link is followed, and every directory must belong to the owner of the root. Locks
only save double work: correctness comes from content keys, unique temp names and atomic renames.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from ..errors import ManifestError
from ..files import temp_files
from ..files.digest_cache import DigestCache
from .entry_store import EntryStore
from .location import user_cache_root
from .lock import conversion_lock, directory_lock, locks_exclude, removal_lock
from .manifest import MAX_BYTES, Manifest


class Store(EntryStore):  # frozen as its base, which has all the fields
    """A directory of immutable entries and of the manifests that name them."""

    @property
    def digest_cache(self) -> DigestCache:
        """Return the digest cache."""
        return DigestCache(self.folder("memo"), self.read_only, partial(self.opened, "memo"))

    def manifest_path(self, name: str) -> Path:
        """Return the path of a manifest, which may be absent."""
        return self.folder("manifests") / f"{name}.msgpack"

    def load_manifest(self, name: str) -> Manifest | None:
        """Read a manifest; one that is absent or has any defect is None."""
        data = self.read_file("manifests", f"{name}.msgpack", MAX_BYTES)
        try:
            return Manifest.decode(data) if data is not None else None
        except ManifestError:
            return None

    def write_manifest(self, name: str, manifest: Manifest) -> None:
        """Publish a manifest durably.

        Raises:
            StoreError: It cannot be written.
        """
        self.write_file("manifests", f"{name}.msgpack", manifest.encode())

    def manifest_names(self) -> list[str]:
        """List the names of all manifests."""
        names = self.file_names("manifests")
        return [name.removesuffix(".msgpack") for name in names if name.endswith(".msgpack")]

    def touch_manifest(self, name: str) -> None:
        """Set a manifest's mtime to now, by which `cache prune` knows when a model was used."""
        with contextlib.suppress(OSError):  # a cache that cannot be written is still readable
            with self.opened("manifests") as folder:
                os.utime(f"{name}.msgpack", dir_fd=folder.fd, follow_symlinks=False)

    def sweep(self, own: bool = False) -> int:
        """Remove the temp files of runs that have ended.

        Args:
            own: Remove those of this process too.

        Returns:
            The bytes freed.
        """
        with contextlib.suppress(OSError), self.opened("tmp") as tmp:
            return temp_files.sweep(tmp, locks_exclude(tmp), own)
        return 0

    def locks_work(self) -> bool:
        """Return whether locks exclude other runs on this file system.

        Raises:
            StoreError: A directory of the store is a link or others could write into it.
        """
        with contextlib.suppress(OSError), self.opened("manifests", create=True) as folder:
            return locks_exclude(folder)
        return False

    def lock(self, name: str) -> AbstractContextManager[object]:
        """Return a context that holds the lock of a model's conversions.

        A store in a model directory has one lock for all of them.

        Args:
            name: The name of the model's manifest.
        """
        if not self.private:
            return directory_lock(partial(self.opened, "manifests"), exclusive=True, required=False)
        locks = self._locks()
        return conversion_lock(locks, name, self._modes[1]) if locks else nullcontext()

    def removal(self) -> AbstractContextManager[None]:
        """Return a context in which no conversion starts in this store.

        Entering it raises StoreError if another removal holds it too long.
        """
        locks = self._locks()
        return removal_lock(locks, self._modes[1]) if locks else nullcontext()

    def _locks(self) -> Path | None:
        """Return the checked directory of the lock files; None, to run without, if it is absent."""
        with contextlib.suppress(OSError), self.opened("locks") as folder:
            return folder.path
        return None


def cache_store(cache_dir: str | Path | None = None) -> Store:
    """Return the cache in a directory, by default the user's cache."""
    return Store(Path(cache_dir).expanduser() if cache_dir else user_cache_root())
