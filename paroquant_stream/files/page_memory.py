"""Memory for reading and writing files, which begins on a page, as O_DIRECT requires."""

from __future__ import annotations

import contextlib
import mmap


def page_aligned(size: int) -> memoryview:
    """Return new memory that begins on a page, in huge pages where the system has them.

    Private, as shared memory gets none. A child that is forked meanwhile harms no O_DIRECT write,
    only reads (open(2)): nobody changes a block before it is written.

    Args:
        size: Bytes, at least 0.

    Raises:
        MemoryError: The system gives none; as an OSError it would be taken for one of a file.
    """
    try:
        space = mmap.mmap(-1, max(1, size), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size:,} bytes: {error.strerror}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            space.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(space)[:size]
