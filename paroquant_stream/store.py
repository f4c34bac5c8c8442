"""The store: where entries and manifests lie, and how they come to lie there.

    <root>/
      CACHEDIR.TAG                                   backup programs skip the cache
      v1/entries/ab/<64 hex key>.safetensors         immutable; ab: the key's first two digits
      v1/manifests/<64 hex model id>.msgpack         in place: model-<16 hex>.msgpack
      v1/memo/<size>-<device>-<inode>                digests by stat, see digest.py
      v1/locks/<name>.lock                           never deleted: deleting one lets two in
      v1/tmp/<host>-<pid>-<32 hex>                   what a run writes before it publishes

Publishing is: temp file, fsync, rename, fsync of the directory. Without the first fsync a power cut
leaves a committed name with no bytes (seen on ext4); without the second, no name. A lock only saves
double work: correctness comes from content keys, unique temp names and rename.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import xxhash

from .digest import FileStamp, Memo
from .errors import MalformedFile, StoreError
from .tensorfile import open_regular

logger = logging.getLogger(__name__)

TEMP_MAX_AGE = 24 * 3600  # s after which a temp of another host counts as dead
LOCK_TIMEOUT = 3600.0  # s to wait for another process on the same model before working beside it
_CACHEDIR_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Created by paroquant_stream.\n"
_NO_FALLOCATE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTSUP)
_thread_locks: dict[str, threading.Lock] = {}  # flock does not hold two threads of a process apart


def user_cache_root() -> Path:
    """The user's cache: $PAROQUANT_STREAM_CACHE, else under $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("PAROQUANT_STREAM_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "paroquant" / "mlx_cache"


@dataclass(frozen=True)
class Store:
    """A directory of immutable entries and of the manifests that name them."""

    root: Path
    private: bool = True
    """Directories 0700, files 0600 whatever the umask; a tree beside a model follows it."""
    read_only: bool = False
    """Nothing is written, not even a memo: for a look at what would be done."""

    @property
    def memo(self) -> Memo:
        """The digests known by stat."""
        return Memo(self._path("memo"), self.read_only)

    def _path(self, *parts: str) -> Path:
        return self.root.joinpath("v1", *parts)

    def entry_path(self, key: str) -> Path:
        """Where the entry of this key lies or would lie."""
        return self._path("entries", key[:2], f"{key}.safetensors")

    def manifest_path(self, name: str) -> Path:
        """Where the manifest of this name lies or would lie."""
        return self._path("manifests", f"{name}.msgpack")

    def create(self) -> None:
        """Makes the directories. Raises StoreError when that is not possible."""
        mode = 0o700 if self.private else 0o777
        try:
            self.root.mkdir(mode=mode, parents=True, exist_ok=True)
            for name in ("entries", "manifests", "memo", "locks", "tmp"):
                self._path().mkdir(mode=mode, exist_ok=True)
                self._path(name).mkdir(mode=mode, exist_ok=True)
            tag = self.root / "CACHEDIR.TAG"
            if self.private and not tag.exists():
                tag.write_text(_CACHEDIR_TAG)
        except OSError as error:
            raise StoreError(
                f"{self.root}: cannot make the cache: {error.strerror}; try --cache-dir"
            ) from error

    def free_bytes(self) -> int:
        """Bytes free for entries, where the store lies or would lie."""
        place = next(path for path in (self.root, *self.root.parents) if path.exists())
        status = os.statvfs(place)
        return status.f_bavail * status.f_frsize

    def entry_size(self, key: str) -> int | None:
        """Bytes of the entry, or None when there is none."""
        try:
            status = os.stat(self.entry_path(key), follow_symlinks=False)
        except OSError:
            return None
        return status.st_size

    def open_entry(self, key: str) -> int:
        """A descriptor of the entry. Raises StoreError when it is absent or no regular file."""
        path = self.entry_path(key)
        try:
            return open_regular(path, follow=False)
        except (OSError, MalformedFile) as error:
            raise StoreError(f"{path}: the entry cannot be opened: {error}") from error

    def read_manifest(self, name: str, limit: int) -> bytes | None:
        """The first `limit` + 1 bytes of a manifest, or None when it is absent or unreadable."""
        with contextlib.suppress(OSError, MalformedFile):
            fd = open_regular(self.manifest_path(name), follow=False)
            with os.fdopen(fd, "rb") as file:
                return file.read(limit + 1)
        return None

    def write_manifest(self, name: str, data: bytes) -> None:
        """Publishes a manifest. Raises StoreError."""
        with self.new_file(len(data)) as file:
            file.write(memoryview(data))
            file.publish(self.manifest_path(name))

    @contextlib.contextmanager
    def new_file(self, size: int) -> Iterator[NewFile]:
        """A file of `size` bytes to be written and published; removed if it is not published."""
        name = f"{_host()}-{os.getpid()}-{secrets.token_hex(16)}"
        file = NewFile(self._path("tmp", name), size, 0o600 if self.private else 0o666)
        try:
            yield file
        finally:
            file.discard()

    def quarantine(self, key: str) -> None:
        """Takes a damaged entry out of use; the next sweep removes it."""
        if self.read_only:
            return
        name = f"{_host()}-{os.getpid()}-{secrets.token_hex(16)}"
        with contextlib.suppress(OSError):
            os.replace(self.entry_path(key), self._path("tmp", name))

    def sweep(self) -> int:
        """Removes the temps of dead runs; returns their number of bytes."""
        freed = 0
        with contextlib.suppress(OSError):
            for path in self._path("tmp").iterdir():
                with contextlib.suppress(OSError):
                    status = path.stat(follow_symlinks=False)
                    if _is_dead(path.name, time.time() - status.st_mtime):
                        path.unlink()
                        freed += status.st_size
        return freed

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Holds the lock of this name, between threads and processes; on a file system without
        locks, or after `LOCK_TIMEOUT`, goes on without it.
        """
        path = str(self._path("locks", f"{name}.lock"))
        with _thread_locks.setdefault(path, threading.Lock()):
            mode = 0o600 if self.private else 0o666
            lock = filelock.UnixFileLock(path, mode=mode, fallback_to_soft=False)
            try:
                lock.acquire(timeout=LOCK_TIMEOUT)
            except (OSError, NotImplementedError, filelock.Timeout) as error:
                logger.warning("going on without the lock %s: %s", path, error)
                yield
                return
            try:
                yield
            finally:
                lock.release()


class NewFile:
    """A temp file of the store; `write` hashes, `publish` gives it its name."""

    def __init__(self, path: Path, size: int, mode: int) -> None:
        self._path, self._size, self._written = path, size, 0
        self._hash = xxhash.xxh3_128()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, mode)
            try:
                if size and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._fd, 0, size)
            except OSError as error:
                if error.errno not in _NO_FALLOCATE:
                    self.discard()
                    raise
        except OSError as error:
            raise _write_error(path, size, error) from error

    @property
    def digest(self) -> str:
        """XXH3-128 of the bytes written so far, in hex."""
        return self._hash.hexdigest()

    def write(self, chunk: memoryview) -> None:
        """Appends all of `chunk`. Raises StoreError."""
        self._hash.update(chunk)
        chunk = chunk.cast("B")
        try:
            while chunk:
                count = os.write(self._fd, chunk)
                self._written += count
                chunk = chunk[count:]
        except OSError as error:
            raise _write_error(self._path, self._size - self._written, error) from error

    def publish(self, target: Path) -> FileStamp:
        """Makes the file durable under the name `target`, in place of what is there; returns its
        stamp.

        Readers of the old file keep its bytes. An fsync that fails is never tried again: the kernel
        has dropped the pages by then. Raises StoreError.
        """
        try:
            os.fsync(self._fd)
            status = os.fstat(self._fd)
            if not status.st_size == self._written == self._size:
                raise StoreError(
                    f"{self._path}: {status.st_size:,} bytes on disk, {self._size:,} expected"
                )
            target.parent.mkdir(mode=0o700 if status.st_mode & 0o077 == 0 else 0o777, exist_ok=True)
            os.replace(self._path, target)
            _sync_directory(target.parent)
            return FileStamp.of(os.stat(target))
        except OSError as error:
            raise _write_error(target, 0, error) from error

    def discard(self) -> None:
        """Closes the file and removes the temp if it is still there."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._path.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_error(path: Path, needed: int, error: OSError) -> StoreError:
    reason = f"{path}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        status = os.statvfs(path.parent)
        free = status.f_bavail * status.f_frsize
        reason += f"; {needed:,} bytes needed, {free:,} free; make room and run again"
    return StoreError(reason)


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_dead(name: str, age: float) -> bool:
    """Whether a temp's writer is gone: its process on this host, or a day without a write."""
    host, _, rest = name.partition("-")
    pid = rest.partition("-")[0]
    if age > TEMP_MAX_AGE or host != _host() or not pid.isdigit():
        return age > TEMP_MAX_AGE
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's process
        return False
    return False
