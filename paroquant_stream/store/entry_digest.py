"""The digest of an entry: XXH3-128 over those of its header and of each block of its tensors.

    tree:<32 hex>  =  XXH3-128(XXH3-128(header) | XXH3-128(block) | XXH3-128(block) | ...)

A block is 1 MiB of a tensor, counted from its first byte, or what is left of it. So the blocks can
be written and verified in any order and by many workers. Entries of earlier versions have one
XXH3-128 over all bytes, 32 hex digits, which stays valid. XXH3 detects damage, not tampering.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import xxhash

from ..files.descriptor import file_status, pread_exactly
from ..files.hashing import CHUNK, Range, read_chunks, read_into
from ..files.page_memory import page_aligned
from ..files.tensor_header import TensorInfo

BLOCK = 1 << 20  # bytes; smaller, an embedding can be cut at more rows; larger, less is hashed
_TREE = "tree:"
_RANGE = 16 * BLOCK  # bytes that a thread takes at a time
_READ = 4 * BLOCK  # bytes per read
_THREADS = 16  # more wait for the interpreter's lock


class BlockHasher:
    """Hashes consecutive bytes of a tensor, block by block."""

    def __init__(self) -> None:
        """Start at the beginning of a block."""
        self._hash, self._filled, self._digests = xxhash.xxh3_128(), 0, bytearray()

    def update(self, view: memoryview) -> None:
        """Hash the bytes that follow."""
        while view:
            part = view[: BLOCK - self._filled]
            self._hash.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == BLOCK:
                self._end_block()

    def finish(self) -> bytes:
        """Return the digests of the blocks, 16 bytes each; an incomplete one is the last."""
        if self._filled:
            self._end_block()
        return bytes(self._digests)

    def _end_block(self) -> None:
        self._digests += self._hash.digest()
        self._hash.reset()
        self._filled = 0


def tree_digest(header: bytes, blocks: bytes) -> str:
    """Return the digest of an entry.

    Args:
        header: The bytes before its tensors.
        blocks: The digests of all blocks, 16 bytes each, tensor after tensor in file order.
    """
    top = xxhash.xxh3_128_digest(header) + blocks
    return _TREE + xxhash.xxh3_128_hexdigest(top)


def is_tree(digest: str) -> bool:
    """Tell a digest over blocks from one of an earlier version."""
    return digest.startswith(_TREE)


class EntryHasher:
    """Hashes an entry front to back, in both kinds."""

    def __init__(self, header: bytes) -> None:
        """Start after the header."""
        self._header, self._flat = header, xxhash.xxh3_128(header)
        self._blocks, self._hasher = bytearray(), BlockHasher()

    def update(self, chunk: memoryview) -> None:
        """Hash the bytes that follow."""
        self._flat.update(chunk)
        self._hasher.update(chunk)

    def end_tensor(self) -> None:
        """End the last block of a tensor."""
        self._blocks += self._hasher.finish()
        self._hasher = BlockHasher()

    def digest(self, like: str) -> str:
        """Return the digest of the kind of another one."""
        if is_tree(like):
            return tree_digest(self._header, bytes(self._blocks))
        return self._flat.hexdigest()


def hash_entry(
    fd: int, tensors: Sequence[TensorInfo], label: str, like: str, threads: int | None = None
) -> str:
    """Read every byte of an entry and return its digest.

    Args:
        fd: The entry.
        tensors: Its tensors in file order, as they should be; of a file that is shorter or longer,
            what there is is hashed.
        label: The name of the file in errors.
        like: A digest of the kind that is wanted.
        threads: How many threads read and hash at most, this one included; None for one per core,
            at most 16. A digest of an earlier version allows no more than one.

    Raises:
        SourceChangedError: The file became shorter meanwhile.
        UnreadableFileError: The operating system cannot read it.
    """
    header, places = _parts(fd, tensors, label)
    if not is_tree(like):
        return _read_all(fd, header, places, label).digest(like)
    ranges = [
        (at, min(at + _RANGE, stop)) for start, stop in places for at in range(start, stop, _RANGE)
    ]

    found = [b""] * len(ranges)
    waiting = deque(range(len(ranges)))  # threads take from it by themselves

    def take() -> int | None:
        try:
            return waiting.popleft()
        except IndexError:
            return None

    def work() -> None:
        try:
            buffer = page_aligned(_READ)
            for number in iter(take, None):
                found[number] = _hash_range(fd, label, buffer, ranges[number])
        except BaseException:
            waiting.clear()  # ends the other threads
            raise

    _run(work, min(threads or os.cpu_count() or 1, _THREADS, len(ranges)))
    return tree_digest(header, b"".join(found))


def _run(work: Callable[[], None], threads: int) -> None:
    """Call a function in this thread and others, of which there may be fewer, at the same time."""
    if threads <= 1:
        work()
        return
    from concurrent.futures import ThreadPoolExecutor  # late: it is slow to import

    with ThreadPoolExecutor(threads - 1, thread_name_prefix="verify") as pool:
        others = []
        with suppress(RuntimeError):  # the system starts no more threads, or the program is ending
            for _ in range(threads - 1):
                others.append(pool.submit(work))
        work()
        for other in others:
            other.result()


def _hash_range(fd: int, label: str, buffer: memoryview, bounds: Range) -> bytes:
    """Return the digests of the blocks in a range of a tensor that begins at one.

    Args:
        fd: The entry.
        label: The name of the file in errors.
        buffer: Memory for some blocks.
        bounds: The range.
    """
    position, stop = bounds
    digests = bytearray()
    while position < stop:
        data = buffer[: stop - position]
        read_into(fd, data, position, label)
        blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
        # nothing else between two blocks, as other threads wait for the interpreter's lock
        digests += b"".join(map(xxhash.xxh3_128_digest, blocks))
        position += len(data)
    return bytes(digests)


def tree_digest_of(fd: int, tensors: Sequence[TensorInfo], label: str, known: str) -> str | None:
    """Return the digest over blocks of an entry that has one of an earlier version.

    Args:
        fd: The entry.
        tensors: Its tensors in file order.
        label: The name of the file in errors.
        known: The digest that it has.

    Returns:
        The digest; None if that which it has is not that of the same reading.

    Raises:
        SourceChangedError: The file became shorter meanwhile.
        UnreadableFileError: The operating system cannot read it.
    """
    hasher = _read_all(fd, *_parts(fd, tensors, label), label)
    return hasher.digest(_TREE) if hasher.digest(known) == known else None


def _read_all(fd: int, header: bytes, places: Sequence[Range], label: str) -> EntryHasher:
    hasher, buffer = EntryHasher(header), memoryview(bytearray(CHUNK))
    for start, stop in places:
        for chunk in read_chunks(fd, start, stop, label, buffer):
            hasher.update(chunk)
        hasher.end_tensor()
    return hasher


def _parts(fd: int, tensors: Sequence[TensorInfo], label: str) -> tuple[bytes, list[Range]]:
    """Return the bytes before the tensors, and where each of these and what follows them lies."""
    size = file_status(fd, label).st_size
    places = [(min(t.start, size), min(t.stop, size)) for t in tensors]
    end = places[-1][1] if places else size
    header = pread_exactly(fd, 0, places[0][0] if places else size, label)
    return header, [*places, *([(end, size)] if end < size else [])]
