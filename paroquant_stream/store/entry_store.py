"""The entries of a store: files named by the key of their content, each with a digest beside it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import MalformedFileError, StoreError
from ..files import temp_files
from ..files.descriptor import FileStamp, closing, make_durable
from ..files.folder import Folder
from ..files.tensor_header import TensorSpec
from .directories import StoreDirectories
from .location import open_child

if TYPE_CHECKING:
    from ..files.new_file import NewFile
    from .entry_file import EntryFile

_Content = TypeVar("_Content")
_TempFile = TypeVar("_TempFile", "NewFile", "EntryFile")
_DIGEST = rb"xxh3-128 ((?:tree:)?[0-9a-f]{32}) (\d{1,19})\n"  # text: a run without work reads none


class EntryStore(StoreDirectories):  # frozen as its base, which has all the fields
    """The part of a store that holds entries."""

    def entry_path(self, key: str) -> Path:
        """Return the path of an entry, which may be absent."""
        return self.folder("entries") / key[:2] / f"{key}.safetensors"

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
            As `EntryRecord.digest`; None if the file is absent, malformed or of another size.
        """
        absent = contextlib.suppress(OSError, MalformedFileError)
        with absent, self.opened("entries", key[:2]) as folder:
            with os.fdopen(folder.open_file(f"{key}.digest"), "rb") as file:
                found = re.fullmatch(_DIGEST, file.read(64))
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

        with self._temp_file(NewFile, size) as file:
            yield file

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

        with self._temp_file(EntryFile, specs) as file:
            yield file

    @contextlib.contextmanager
    def _temp_file(
        self, make: Callable[[Folder, str, _Content, int], _TempFile], content: _Content
    ) -> Iterator[_TempFile]:
        """Make a file in `tmp`, and remove it after the block unless it was published."""
        with self._writing("tmp") as folder:
            file = make(folder, temp_files.temp_name(), content, self._modes[1])
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


def _digest_text(digest: str, size: int) -> bytes:
    return f"xxh3-128 {digest} {size}\n".encode()
