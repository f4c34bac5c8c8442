"""An entry that is being made: a temp file whose pieces are written by several workers, in any
order, and the digests of what was written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from ..files.atomic_file import AtomicFile, write_error
from ..files.block_writer import BlockWriter
from ..files.descriptor import FileStamp, make_durable
from ..files.folder import Folder
from ..files.tensor_header import TensorSpec
from ..files.tensor_writer import end_of, lay_out
from ..trace import NO_TRACE, Trace
from .entry_digest import BlockHasher, tree_digest


@dataclass(frozen=True)
class Piece:
    """Consecutive bytes of an entry that were written."""

    start: int
    """The offset of the first, that of a block of its tensor."""
    size: int
    blocks: bytes
    """The digests of the blocks, 16 bytes each."""


class EntryCopy(Protocol):
    """Where the bytes of an entry go beside its file, for a caller that needs them next."""

    def put(self, offset: int, chunk: memoryview) -> None:
        """Copy bytes of one tensor.

        Args:
            offset: Of the first in the file.
            chunk: The bytes; they change after the call.
        """


class EntryFile:
    """The temp file of an entry, with its header; workers open it by its path."""

    def __init__(self, folder: Folder, name: str, specs: Sequence[TensorSpec], mode: int) -> None:
        """Create the temp file.

        Args:
            folder: Its directory; must stay open as long as this object is used.
            name: Its name.
            specs: The tensors of the entry, as for `lay_out`.
            mode: Permission bits.

        Raises:
            StoreError: The file cannot be created.
        """
        self._header, self.tensors = lay_out(specs)
        self.size = end_of(self._header, self.tensors)
        """Bytes of the complete file."""
        self._pieces: dict[int, Piece] = {}
        try:
            self._file = AtomicFile(folder, name, self.size, mode)
        except OSError as error:
            raise write_error(folder.path / name, self.size, error) from error

    @property
    def path(self) -> Path:
        """Return the path of the temp file."""
        return self._file.path

    def add(self, pieces: Iterable[Piece]) -> None:
        """Note pieces that were written.

        Raises:
            AssertionError: One was written already, so its bytes may be those of either.
        """
        for piece in pieces:
            if piece.size and self._pieces.setdefault(piece.start, piece) is not piece:
                raise AssertionError(f"{self.path}: the piece at {piece.start:,} twice")

    @property
    def digest(self) -> str:
        """Return the digest of the entry, once every byte of it is in a piece.

        Raises:
            AssertionError: Bytes were written twice or not at all.
        """
        blocks, position = [], len(self._header)
        for start in sorted(self._pieces):
            if start != position:
                raise AssertionError(f"{self.path}: a piece at {start:,}, expected {position:,}")
            blocks.append(self._pieces[start].blocks)
            position += self._pieces[start].size
        if position != self.size:
            raise AssertionError(f"{self.path}: {position:,} of {self.size:,} bytes were written")
        return tree_digest(self._header, b"".join(blocks))

    def publish(self, folder: Folder, name: str) -> FileStamp:
        """Make the file durable under its final name and return its stamp.

        Args:
            folder: Directory of the final name.
            name: The final name; an existing file is replaced.

        Raises:
            StoreError: It cannot be made durable.
        """
        try:
            view = memoryview(self._header)
            while view:
                view = view[os.pwrite(self._file.fd, view, len(self._header) - len(view)) :]
            return self._file.publish(folder, name, self.size)
        except OSError as error:
            raise write_error(folder.path / name, 0, error) from error

    def discard(self) -> None:
        """Close the file and remove the temp file unless it was published."""
        self._file.discard()


class PieceWriter:
    """Writes pieces of an entry's temp file, in a worker."""

    def __init__(
        self, fd: int, path: Path, size: int, trace: Trace, copy: EntryCopy | None
    ) -> None:
        """Write to an open file; see `piece_writer`."""
        self._fd, self._path, self._copy = fd, path, copy
        self._writer = BlockWriter(fd, partial(os.open, path), path, size, trace)
        self._open: dict[int, tuple[int, BlockHasher]] = {}  # start: next offset, hasher

    def write(self, start: int, chunk: memoryview) -> None:
        """Append bytes to a piece.

        Args:
            start: The offset of the piece in the file.
            chunk: The bytes; they are copied.

        Raises:
            StoreError: They cannot be written.
        """
        offset, hasher = self._open.get(start) or (start, BlockHasher())
        chunk = chunk.cast("B")
        hasher.update(chunk)
        self._writer.write(chunk, offset)
        if self._copy:
            self._copy.put(offset, chunk)
        self._open[start] = offset + len(chunk), hasher

    def finish(self, sync: bool) -> list[Piece]:
        """Write what is left and return the pieces.

        Args:
            sync: Make it durable too.

        Raises:
            StoreError: It cannot be written.
        """
        self._writer.flush()
        if sync:
            try:
                make_durable(self._fd)
            except OSError as error:
                raise write_error(self._path, 0, error) from error
        return [
            Piece(start, stop - start, hasher.finish())
            for start, (stop, hasher) in self._open.items()
        ]

    def close(self) -> None:
        """Wait for the bytes that are being written."""
        self._writer.close()


@contextmanager
def piece_writer(
    path: Path, size: int, trace: Trace = NO_TRACE, copy: EntryCopy | None = None
) -> Iterator[PieceWriter]:
    """Open the temp file of an entry to write pieces of it.

    Args:
        path: The file.
        size: The most bytes that will be written.
        trace: Records the stage `write`.
        copy: Gets the bytes too.

    Raises:
        StoreError: The file cannot be opened; it is absent once the run that made it has ended.
    """
    flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags)
    except OSError as error:
        raise write_error(path, size, error) from error
    writer = PieceWriter(fd, path, size, trace, copy)
    try:
        yield writer
    finally:
        writer.close()
        os.close(fd)
