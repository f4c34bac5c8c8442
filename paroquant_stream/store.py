"""The store: where entries and manifests lie, and how they come to lie there.

    <root>/
      CACHEDIR.TAG                                   backup programs skip the cache
      v1/entries/ab/<64 hex key>.safetensors         immutable; ab: the key's first two digits
      v1/manifests/<64 hex model id>.msgpack         in place: model-<16 hex>.msgpack
      v1/manifests/<model id>.dropped.msgpack        sources removed by a run that is not done yet
      v1/headers/<64 hex SHA-256 of a shard>         of shards that were removed, see drop.py
      v1/manifests/<model id>.msgpack.removed        until the last entry of that model is gone
      v1/memo/<size>-<device>-<inode>                digests by stat, see digest_cache.py
      v1/locks/<name>.lock                           never deleted: deleting one lets two in
      v1/tmp/<host>-<pid>-<32 hex>                   what a run writes before it publishes

A lock only saves double work: correctness comes from content keys, unique temp names and rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .descriptor import open_regular
from .digest_cache import Memo
from .errors import MalformedFile, StoreError
from .newfile import NewFile, is_open, sync_directory
from .trace import SILENCE, Trace

logger = logging.getLogger(__name__)

TEMP_MAX_AGE = 24 * 3600  # s after which a temp of another host counts as dead
LOCK_TIMEOUT = 3600.0  # s to wait for another process on the same model before working beside it
_CACHEDIR_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Created by paroquant_stream.\n"
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

    def folder(self, kind: str) -> Path:
        """The directory of this kind: `entries`, `manifests`, `memo`, `locks` or `tmp`."""
        return self._path(kind)

    def entry_path(self, key: str) -> Path:
        """Where the entry of this key lies or would lie."""
        return self._path("entries", key[:2], f"{key}.safetensors")

    def manifest_path(self, name: str) -> Path:
        """Where the manifest of this name lies or would lie."""
        return self._path("manifests", f"{name}.msgpack")

    def header_path(self, source_sha256: str) -> Path:
        """Where the header of a dropped shard lies or would lie."""
        return self._path("headers", source_sha256)

    def check_owner(self) -> None:
        """Raises StoreError when others own the cache or can write into it, and so choose weights.

        A tree beside a model has the model directory's own trust, and a cache that is not there yet
        is nobody's.
        """
        for path in (self.root, self._path()) if self.private else ():
            try:
                status = os.stat(path)
            except (
                FileNotFoundError,
                NotADirectoryError,
            ):  # `create` makes it, or says what is wrong
                continue
            except OSError as error:
                raise StoreError(f"{path}: cannot be looked at: {error.strerror}") from error
            if status.st_uid != os.geteuid():
                raise StoreError(
                    f"{path}: owned by user {status.st_uid}, not by you ({os.geteuid()}); choose a "
                    "cache of your own with --cache-dir"
                )
            if status.st_mode & 0o022:
                raise StoreError(
                    f"{path}: others can write into it (mode {status.st_mode & 0o777:03o}); run "
                    f"`chmod go-w {path}` if you trust what is in it, else remove it"
                )

    def create(self) -> None:
        """Makes the directories. Raises StoreError when that is not possible."""
        mode = 0o700 if self.private else 0o777
        try:
            self.root.mkdir(mode=mode, parents=True, exist_ok=True)
            for name in ("entries", "manifests", "memo", "locks", "tmp"):
                self._path().mkdir(mode=mode, exist_ok=True)
                self._path(name).mkdir(mode=mode, exist_ok=True)
            tag = self.root / "CACHEDIR.TAG"
            if self.private and not (tag.exists() and tag.stat().st_size == len(_CACHEDIR_TAG)):
                tag.write_text(_CACHEDIR_TAG)
            for path in (self._path(), self.root, self.root.parent):
                sync_directory(path)
        except OSError as error:
            raise StoreError(
                f"{self.root}: cannot make the cache: {error.strerror}; try --cache-dir"
            ) from error

    def free_bytes(self) -> int:
        """Bytes free for entries, where the store lies or would lie. Raises StoreError."""
        parents = (self.root, *self.root.parents)
        place = next((path for path in parents if os.path.exists(path)), self.root)
        try:
            status = os.statvfs(place)
        except OSError as error:
            raise StoreError(f"{place}: cannot tell its free space: {error.strerror}") from error
        return status.f_bavail * status.f_frsize

    def entry_size(self, key: str) -> int | None:
        """Bytes of the entry, or None when there is none."""
        try:
            status = os.stat(self.entry_path(key), follow_symlinks=False)
        except OSError:
            return None
        return status.st_size

    def sync_entry(self, key: str) -> None:
        """Makes an entry's name durable, as its writer may have been kept from it."""
        with contextlib.suppress(OSError):
            sync_directory(self.entry_path(key).parent)

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

    def remove_manifest(self, name: str) -> None:
        """Removes a manifest if it is there; what stays behind does no harm."""
        with contextlib.suppress(OSError):
            self.manifest_path(name).unlink()

    def touch_manifest(self, name: str) -> None:
        """Notes that the model was used now, as its manifest's mtime; nothing else looks at it."""
        with contextlib.suppress(OSError):  # a cache that cannot be written serves all the same
            os.utime(self.manifest_path(name), follow_symlinks=False)

    def _temp_path(self) -> Path:
        """A name that no other run, process or host uses."""
        return self._path("tmp", temp_name())

    @contextlib.contextmanager
    def new_file(self, size: int, trace: Trace = SILENCE) -> Iterator[NewFile]:
        """A file of `size` bytes to be written and published; removed if it is not published."""
        file = NewFile(self._temp_path(), size, 0o600 if self.private else 0o666, trace)
        try:
            yield file
        finally:
            file.discard()

    def manifest_names(self) -> list[str]:
        """The names of all manifests."""
        with contextlib.suppress(OSError):
            return sorted(path.stem for path in self._path("manifests").glob("*.msgpack"))
        return []

    def quarantine(self, key: str) -> None:
        """Takes a damaged entry out of use; the next sweep removes it."""
        if self.read_only:
            return
        with contextlib.suppress(OSError):
            os.replace(self.entry_path(key), self._temp_path())

    def sweep(self, own: bool = False) -> int:
        """Removes the temps of dead runs and those that this process could not remove before.

        With `own` also those that it is still writing. Returns the bytes freed.
        """
        freed = 0
        with contextlib.suppress(OSError):
            for path in self._path("tmp").iterdir():
                with contextlib.suppress(OSError):
                    status = path.stat(follow_symlinks=False)
                    mine = path.name.startswith(f"{_host()}-{os.getpid()}-")
                    mine = mine and (own or not is_open(path.name))
                    if mine or is_dead(path.name, time.time() - status.st_mtime):
                        path.unlink()
                        freed += status.st_size
        return freed

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Holds the lock of this name, between threads and processes; on a file system without
        locks, or after `LOCK_TIMEOUT`, goes on without it.
        """
        import filelock  # 9 ms, which a run without work saves

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


def _host() -> str:
    return hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]


def temp_name() -> str:
    """A name for a temp that no other run, process or host uses, and that `is_dead` can judge."""
    return f"{_host()}-{os.getpid()}-{secrets.token_hex(16)}"


def is_dead(name: str, age: float) -> bool:
    """Whether a temp's writer is gone: on this host by its process, on another after a day.

    Never by time alone where the process can be asked: clocks jump.
    """
    host, _, rest = name.partition("-")
    pid = rest.partition("-")[0]
    if host != _host() or not pid.isdigit():
        return age > TEMP_MAX_AGE
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's process
        return False
    return False
