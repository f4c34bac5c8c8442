"""What becomes of an entry whose bytes are not those that were written.

It is read again first, past the page cache, as one bad read is no damage. What can be made again
is taken out of use at once. What cannot, since sources were removed, is kept under a name that says
so: most of its bytes are sound, and no other copy may exist.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from ..errors import EntryDamagedError, ManifestError, StoreError
from ..files.descriptor import closing
from ..files.hashing import hash_entry
from ..files.tensor_writer import layout_defect
from .drop_record import read_record, record_ids
from .manifest import EntryRecord
from .store import Store

logger = logging.getLogger(__name__)


def defect_of(record: EntryRecord, store: Store, fd: int) -> str | None:
    """What is wrong with an open entry, every byte of it read; None where nothing is."""
    label = str(store.entry_path(record.key))
    if problem := layout_defect(fd, record.tensors, label):
        return problem
    digest = hash_entry(fd, label)
    return None if digest == record.digest else f"expected XXH3 {record.digest}, found {digest}"


def confirmed_defect(record: EntryRecord, store: Store) -> str | None:
    """What is wrong with an entry as it lies on the disk now, opened and read anew."""
    try:
        fd = store.open_entry(record.key)
    except StoreError as error:
        return str(error)
    with closing(fd):
        forget_pages(fd)
        return defect_of(record, store, fd)


def forget_pages(fd: int) -> None:
    """Have the next read of a file come from the disk, where the system can."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def take_out(store: Store, record: EntryRecord, problem: str) -> EntryDamagedError:
    """Take a damaged entry out of use, and return the error that says what became of it."""
    error = EntryDamagedError(
        f"{store.entry_path(record.key)}: {problem}; {_remove(store, record)}"
    )
    logger.warning("%s", error)
    return error


def _remove(store: Store, record: EntryRecord) -> str:
    if store.read_only:
        return "it stays, since nothing is written there"
    if not is_only_copy(store, record.key):
        store.discard_entry(record.key)
        return "taken out of use"
    kept = keep_damaged(store, record.key)
    return (
        f"kept as {kept}, as --drop-source removed what it was made from: put back "
        f"{record.shard} with SHA-256 {record.source_sha256} and convert the model again"
    )


def is_only_copy(store: Store, key: str) -> bool:
    """Whether an entry cannot be made again: its shard was removed, or one that lent to it.

    Also where that cannot be told, as a manifest or record cannot be read.
    """
    try:
        records = [read_record(store, drop_id) for drop_id in record_ids(store)]
    except ManifestError:  # of a newer version
        return True
    manifests = [record.manifest for record in records if record]
    for manifest in manifests:
        dropped = any(record.dropped for record in manifest.entries)
        for record in manifest.entries:
            if record.key == key and (record.dropped or (dropped and record.borrowed_sha256)):
                return True
    return not all(records)


def damaged_path(store: Store, key: str) -> Path | None:
    """Where a damaged entry is kept that nothing could make again."""
    names = [n for n in store.file_names("damaged") if n.startswith(f"{key}.")]
    return store.folder("damaged") / names[-1] if names else None


def keep_damaged(store: Store, key: str) -> Path | None:
    """Takes an entry that nothing can make again out of use, and keeps it under `damaged`.

    Returns where it is now; None where it stays, since nothing may be written.
    """
    if store.read_only:
        return None
    with contextlib.suppress(OSError), store.opened("entries", key[:2]) as folder:
        with store.opened("damaged", create=True) as damaged:
            numbers = (f"{key}.{n}.safetensors" for n in range(1, 1000))
            name = next(name for name in numbers if name not in set(damaged.names()))
            folder.replace(f"{key}.safetensors", damaged, name)
            damaged.sync()
            return damaged.path / name
    return None
