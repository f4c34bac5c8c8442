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
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MalformedFileError, ManifestError, StoreError
from ..files import temp_files
from ..files.descriptor import FileStamp, closing, make_durable
from ..files.digest_cache import DigestCache
from ..files.folder import Folder
from ..files.tensor_header import TensorSpec
from .directories import StoreDirectories
from .location import open_child, user_cache_root
from .lock import conversion_lock, directory_lock, locks_exclude, removal_lock
from .manifest import MAX_BYTES, Manifest

if TYPE_CHECKING:
    from ..files.new_file import NewFile
    from .entry_file import EntryFile

_DIGEST = re.compile(rb"xxh3-128 ((?:tree:)?[0-9a-f]{32}) (\d{1,19})\n")


@dataclass(frozen=True)
class Store(StoreDirectories):
    """A directory of immutable entries and of the manifests that name them."""

    @property
    def digest_cache(self) -> DigestCache:
        """Return the digest cache."""
        return DigestCache(self.folder("memo"), self.read_only, partial(self.opened, "memo"))

    def entry_path(self, key: str) -> Path:
        """Return the path of an entry, which may be absent."""
        return self.folder("entries") / key[:2] / f"{key}.safetensors"

    def manifest_path(self, name: str) -> Path:
        """Return the path of a manifest, which may be absent."""
        return self.folder("manifests") / f"{name}.msgpack"

    def entry_size(self, key: str) -> int | None:
        """Return the bytes of an entry, or None if it is absent.

        Raises:
            StoreError: A directory of the store is a link or others could write into it.
        """
        try:
            with self.opened("entries", key[:2]) as folder:
                return folder.stat(f"{key}.safetensors").st_size
        except OSError:
            return None

    def entry_digest(self, key: str) -> str | None:
        """Return the digest that the writer of an entry stored in its `.digest` file.

        An entry without a manifest is used only with this digest, since hashing the present bytes
        would accept any damage.

        Args:
            key: The entry's key.

        Returns:
            As `entry_digest.FORM`; None if the file is absent, malformed or of another size.
        """
        absent = contextlib.suppress(OSError, MalformedFileError)
        with absent, self.opened("entries", key[:2]) as folder:
            with os.fdopen(folder.open_file(f"{key}.digest"), "rb") as file:
                found = _DIGEST.fullmatch(file.read(64))
            size = folder.stat(f"{key}.safetensors").st_size
            return found[1].decode() if found and int(found[2]) == size else None
        return None

    def publish_entry(self, file: EntryFile, key: str) -> FileStamp:
        """Publish an entry durably, after its digest file.

        Args:
            file: The written file, from `new_entry`.
            key: The entry's key.

        Returns:
            The stamp of the published file.

        Raises:
            StoreError: The entry cannot be published.
        """
        text = _digest_text(file.digest, file.size)
        with self._writing("entries") as entries, self._writing("entries", key[:2]) as folder:
            self._publish(folder, f"{key}.digest", text)
            stamp = file.publish(folder, f"{key}.safetensors")
            entries.sync()  # the directory of the key may be new
            return stamp

    def write_digest(self, key: str, digest: str, size: int) -> None:
        """Replace the digest file of an entry by one of this version, if it can be written.

        Args:
            key: The entry's key.
            digest: Its digest.
            size: Its bytes.
        """
        with contextlib.suppress(StoreError), self._writing("entries", key[:2]) as folder:
            self._publish(folder, f"{key}.digest", _digest_text(digest, size))

    def sync_entry(self, key: str) -> None:
        """Make an entry, its digest file and their names durable, whoever wrote them and how.

        Raises:
            StoreError: They cannot be made durable.
        """
        try:
            with self.opened("entries") as entries:
                with open_child(entries, key[:2], None) as folder:
                    for name in (f"{key}.digest", f"{key}.safetensors"):
                        with contextlib.suppress(FileNotFoundError):  # old entries have no digest
                            with closing(folder.open_file(name)) as fd:
                                make_durable(fd)
                    folder.sync()
                entries.sync()
        except (OSError, MalformedFileError) as error:
            raise StoreError(f"{self.entry_path(key)}: cannot be made durable: {error}") from error

    def open_entry(self, key: str) -> int:
        """Open an entry for reading.

        Args:
            key: The entry's key.

        Returns:
            A descriptor, which the caller closes.

        Raises:
            StoreError: The entry is absent, not a regular file or cannot be opened.
        """
        try:
            with self.opened("entries", key[:2]) as folder:
                return folder.open_file(f"{key}.safetensors")
        except OSError as error:
            path = self.entry_path(key)
            raise StoreError(f"{path}: the entry cannot be opened: {error.strerror}") from error
        except MalformedFileError as error:  # it names the path
            raise StoreError(str(error)) from error

    def write_file(self, kind: str, name: str, data: bytes) -> None:
        """Publish a small file durably.

        Args:
            kind: The directory, as for `folder`.
            name: The file's name; an existing file is replaced.
            data: All of its bytes.

        Raises:
            StoreError: The file cannot be written.
        """
        with self._writing(kind) as folder:
            self._publish(folder, name, data)

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

    def _publish(self, folder: Folder, name: str, data: bytes) -> None:
        with self.new_file(len(data)) as file:
            file.write(memoryview(data))
            file.publish(folder, name)

    @contextlib.contextmanager
    def new_file(self, size: int) -> Iterator[NewFile]:
        """Create a temp file, which is removed after the `with` block unless it was published.

        Args:
            size: The bytes that will be written.

        Yields:
            The file.

        Raises:
            StoreError: The file cannot be created, written or published.
        """
        from ..files.new_file import NewFile  # late: a run without work writes nothing

        with self._writing("tmp") as folder:
            file = NewFile(folder, temp_files.temp_name(), size, self._modes[1])
            try:
                yield file
            finally:
                file.discard()

    @contextlib.contextmanager
    def new_entry(self, specs: Sequence[TensorSpec]) -> Iterator[EntryFile]:
        """Create the temp file of an entry, removed after the `with` block unless published.

        Args:
            specs: The tensors of the entry.

        Yields:
            The file.

        Raises:
            StoreError: The file cannot be created, written or published.
        """
        from .entry_file import EntryFile  # late: a run without work writes nothing

        with self._writing("tmp") as folder:
            file = EntryFile(folder, temp_files.temp_name(), specs, self._modes[1])
            try:
                yield file
            finally:
                file.discard()

    def discard_entry(self, key: str) -> None:
        """Move an entry that can be made again to `tmp`, where the next sweep removes it."""
        if self.read_only:
            return
        with contextlib.suppress(OSError), self.opened("entries", key[:2]) as folder:
            with self.opened("tmp", create=True) as tmp:
                folder.replace(f"{key}.safetensors", tmp, temp_files.temp_name())

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


def _digest_text(digest: str, size: int) -> bytes:
    return f"xxh3-128 {digest} {size}\n".encode()
