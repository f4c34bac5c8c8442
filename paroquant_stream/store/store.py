"""The store: where entries and manifests lie, and how they come to lie there.

    <root>/
      CACHEDIR.TAG                                   backup programs skip the cache
      v1/entries/ab/<64 hex key>.safetensors         immutable; ab: the key's first two digits
      v1/entries/ab/<64 hex key>.digest              what its writer hashed, see `entry_digest`
      v1/manifests/<64 hex model id>.msgpack         in place: model-<16 hex>.msgpack
      v1/manifests/<model id>.msgpack.removed        until the last entry of that model is gone
      v1/dropped/<64 hex id>.{first,second}.msgpack  of sources that were removed, see dropped.py
      v1/damaged/<key>.<number>.safetensors          damaged, and nothing can make them again
      v1/memo/<size>-<device>-<inode>                digests by stat, see digest_cache.py
      v1/locks/<name>.lock                           never deleted: deleting one lets two in
      v1/tmp/<temp name>                             what a run writes before it publishes

Below the root every directory is opened by name, is no link, and belongs to the root's owner.
A lock saves double work: correctness comes from content keys, unique temp names and rename.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import MalformedFileError, ManifestError, StoreError
from ..files import temp_files
from ..files.atomic_file import sync_directory
from ..files.descriptor import FileStamp
from ..files.digest_cache import DigestCache
from ..files.folder import Folder
from ..files.new_file import NewFile
from ..trace import NO_TRACE, Trace
from .location import check_owner, free_bytes, mark_as_cache, step_into, user_cache_root
from .lock import conversion_lock, directory_lock, excludes, removal_lock
from .manifest import MAX_BYTES, Manifest

_KINDS = ("entries", "manifests", "dropped", "memo", "tmp", "locks")
_DIGEST = re.compile(rb"xxh3-128 ([0-9a-f]{32}) (\d{1,19})\n")


@dataclass(frozen=True)
class Store:
    """A directory of immutable entries and of the manifests that name them."""

    root: Path
    private: bool = True
    """A user's cache: directories 0700 and files 0600 whatever the umask, its root may be a link.
    Else the tree beside a model, which follows the umask and the model directory's owner."""
    read_only: bool = False
    """Nothing is written: for a look at what would be done, and for somebody else's tree."""

    @property
    def digest_cache(self) -> DigestCache:
        """The digests known by stat."""
        return DigestCache(self.folder("memo"), self.read_only, partial(self.opened, "memo"))

    def folder(self, kind: str) -> Path:
        """Where files of a kind lie: one of `_KINDS`, or `damaged`; for messages and listings."""
        return self.root / "v1" / kind

    def entry_path(self, key: str) -> Path:
        """Where the entry of this key lies or would lie."""
        return self.folder("entries") / key[:2] / f"{key}.safetensors"

    def manifest_path(self, name: str) -> Path:
        """Where the manifest of this name lies or would lie."""
        return self.folder("manifests") / f"{name}.msgpack"

    @property
    def _modes(self) -> tuple[int, int]:
        """Modes of new directories and files."""
        return (0o700, 0o600) if self.private else (0o777, 0o666)

    @contextlib.contextmanager
    def opened(self, *names: str, create: bool = False) -> Iterator[Folder]:
        """Open `v1` or a directory below it, step by step; no link is followed below the root.

        Args:
            names: The names below `v1`.
            create: Make what is absent.

        Raises:
            FileNotFoundError: It is absent.
            StoreError: A step is a link or no directory, or others could write into it.
            OSError: As the system says.
        """
        base, first = (self.root, ()) if self.private else (self.root.parent, (self.root.name,))
        folder = Folder.open(base)
        try:
            trusted = None if self.private else folder.status()
            if self.private:
                check_owner(folder, None)
            for name in (*first, "v1", *names):
                above, folder = folder, step_into(folder, name, self._modes[0] if create else None)
                above.close()
                check_owner(folder, trusted)
            yield folder
        finally:
            folder.close()

    def check_owner(self) -> None:
        """Raises StoreError when others own the store or can write into it, and so choose weights.

        A cache that is not there yet is nobody's; the tree beside a model may belong to whom the
        model directory belongs.
        """
        try:
            with self.opened():
                pass
        except (FileNotFoundError, NotADirectoryError):  # `create` makes it, or says what is wrong
            pass
        except OSError as error:
            raise StoreError(f"{self.root}: cannot be looked at: {error.strerror}") from error

    def create(self) -> None:
        """Makes the directories. Raises StoreError when that is not possible."""
        try:
            if self.private:
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for kind in _KINDS if self.private else _KINDS[:-1]:
                with self.opened(kind, create=True):
                    pass
            if self.private:
                mark_as_cache(self.root)
            for path in (self.root, self.root.parent):
                sync_directory(path)
        except OSError as error:
            raise StoreError(
                f"{self.root}: cannot make the cache: {error.strerror}; try --cache-dir"
            ) from error

    def free_bytes(self) -> int:
        """Bytes free for entries, where the store lies or would lie. Raises StoreError."""
        return free_bytes(self.root)

    def entry_size(self, key: str) -> int | None:
        """Bytes of the entry, or None when there is none. Raises StoreError."""
        try:
            with self.opened("entries", key[:2]) as folder:
                return folder.stat(f"{key}.safetensors").st_size
        except OSError:
            return None

    def entry_digest(self, key: str) -> str | None:
        """XXH3-128 of an entry as its writer hashed it, from the file beside it; None without one.

        An entry whose manifest was lost is used only if it has this: a hash of what lies there now
        would be one of its damage.
        """
        absent = contextlib.suppress(OSError, MalformedFileError)
        with absent, self.opened("entries", key[:2]) as folder:
            with os.fdopen(folder.open_file(f"{key}.digest"), "rb") as file:
                found = _DIGEST.fullmatch(file.read(64))
            size = folder.stat(f"{key}.safetensors").st_size
            return found[1].decode() if found and int(found[2]) == size else None
        return None

    def publish_entry(self, file: NewFile, key: str) -> FileStamp:
        """Publish an entry durably, its digest beside it first. Raises StoreError."""
        note = f"xxh3-128 {file.digest} {file.size}\n".encode()
        with self._writing("entries") as entries, self._writing("entries", key[:2]) as folder:
            self._publish(folder, f"{key}.digest", note)
            stamp = file.publish(folder, f"{key}.safetensors")
            entries.sync()  # it may hold a new directory's name
            return stamp

    def sync_entry(self, key: str) -> None:
        """Makes an entry's name durable, as its writer may have been kept from it."""
        with contextlib.suppress(OSError), self.opened("entries") as entries:
            with step_into(entries, key[:2], None) as folder:
                folder.sync()
            entries.sync()

    def open_entry(self, key: str) -> int:
        """A descriptor of the entry. Raises StoreError when it is absent or no regular file."""
        try:
            with self.opened("entries", key[:2]) as folder:
                return folder.open_file(f"{key}.safetensors")
        except (OSError, MalformedFileError) as error:
            path = self.entry_path(key)
            raise StoreError(f"{path}: the entry cannot be opened: {error}") from error

    def read_file(self, kind: str, name: str, limit: int) -> bytes | None:
        """The first `limit` + 1 bytes of a file, or None when it is absent or unreadable."""
        with contextlib.suppress(OSError, MalformedFileError), self.opened(kind) as folder:
            with os.fdopen(folder.open_file(name), "rb") as file:
                return file.read(limit + 1)
        return None

    def write_file(self, kind: str, name: str, data: bytes) -> None:
        """Publishes a small file. Raises StoreError."""
        with self._writing(kind) as folder:
            self._publish(folder, name, data)

    def file_names(self, kind: str) -> list[str]:
        """The names of the regular files of a kind."""
        with contextlib.suppress(OSError), self.opened(kind) as folder:
            return [name for name, _ in folder.files()]
        return []

    def load_manifest(self, name: str) -> Manifest | None:
        """The manifest of this name; whatever is wrong with it, None."""
        data = self.read_file("manifests", f"{name}.msgpack", MAX_BYTES)
        try:
            return Manifest.decode(data) if data is not None else None
        except ManifestError:
            return None

    def write_manifest(self, name: str, manifest: Manifest) -> None:
        """Publishes a manifest. Raises StoreError."""
        self.write_file("manifests", f"{name}.msgpack", manifest.encode())

    def manifest_names(self) -> list[str]:
        """The names of all manifests."""
        names = self.file_names("manifests")
        return [name.removesuffix(".msgpack") for name in names if name.endswith(".msgpack")]

    def touch_manifest(self, name: str) -> None:
        """Notes that the model was used now, as its manifest's mtime; nothing else looks at it."""
        with contextlib.suppress(OSError):  # a cache that cannot be written serves all the same
            with self.opened("manifests") as folder:
                os.utime(f"{name}.msgpack", dir_fd=folder.fd, follow_symlinks=False)

    @contextlib.contextmanager
    def _writing(self, *names: str) -> Iterator[Folder]:
        """Open a directory to publish into, made if it is absent. Raises StoreError."""
        if self.read_only:
            raise StoreError(f"{self.root}: is only read, nothing is written there")
        try:
            with self.opened(*names, create=True) as folder:
                yield folder
        except OSError as error:
            path = self.folder("/".join(names))
            raise StoreError(f"{path}: cannot be written: {error.strerror}") from error

    def _publish(self, folder: Folder, name: str, data: bytes) -> None:
        with self.new_file(len(data)) as file:
            file.write(memoryview(data))
            file.publish(folder, name)

    @contextlib.contextmanager
    def new_file(self, size: int, trace: Trace = NO_TRACE) -> Iterator[NewFile]:
        """A file of `size` bytes to be written and published; removed if it is not published."""
        with self._writing("tmp") as folder:
            file = NewFile(folder, temp_files.temp_name(), size, self._modes[1], trace)
            try:
                yield file
            finally:
                file.discard()

    def discard_entry(self, key: str) -> None:
        """Takes an entry that can be made again out of use; the next sweep removes it."""
        if self.read_only:
            return
        with contextlib.suppress(OSError), self.opened("entries", key[:2]) as folder:
            with self.opened("tmp", create=True) as tmp:
                folder.replace(f"{key}.safetensors", tmp, temp_files.temp_name())

    def sweep(self, own: bool = False) -> int:
        """Removes the temps of dead runs, with `own` also this process's; returns bytes freed."""
        with contextlib.suppress(OSError), self.opened("tmp") as tmp:
            return temp_files.sweep(tmp, excludes(tmp), own)
        return 0

    def locks_work(self) -> bool:
        """Whether locks hold runs apart on this file system. Raises StoreError."""
        with contextlib.suppress(OSError), self.opened("manifests", create=True) as folder:
            return excludes(folder)
        return False

    def lock(self, name: str) -> AbstractContextManager[object]:
        """Hold the lock of a model's conversions; a tree beside a model has one for all of them."""
        if not self.private:
            return directory_lock(partial(self.opened, "manifests"), exclusive=True, required=False)
        locks = self._locks()
        return conversion_lock(locks, name, self._modes[1]) if locks else nullcontext()

    def removal(self) -> AbstractContextManager[None]:
        """Let no conversion begin here during the body. Raises StoreError."""
        locks = self._locks()
        return removal_lock(locks, self._modes[1]) if locks else nullcontext()

    def _locks(self) -> Path | None:
        """The directory of the lock files, once it is sure that it is no link; None without one.

        A removal or conversion then goes on without: a lock only saves double work.
        """
        with contextlib.suppress(OSError), self.opened("locks") as folder:
            return folder.path
        return None


def cache_store(cache_dir: str | Path | None = None) -> Store:
    """The cache in `cache_dir`, default the user's."""
    return Store(Path(cache_dir).expanduser() if cache_dir else user_cache_root())
