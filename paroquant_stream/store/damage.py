"""Detects damaged entries and takes them out of use.

An entry is read a second time from the disk, past the page cache, since a single bad read is not
damage. An entry that can be made again is discarded. One that cannot, because its source shards
were removed, is moved to `damaged`: most of its bytes are intact and it may be the only copy.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import EntryDamagedError, ManifestError, StoreError
from ..files.descriptor import bypass_cache, closing
from ..files.tensor_writer import lay_out, layout_defect
from .drop_record import read_record, record_ids
from .entry_digest import hash_entry
from .manifest import EntryRecord
from .store import Store

logger = logging.getLogger(__name__)


def defect_of(record: EntryRecord, store: Store, fd: int) -> str | None:
    """Check the layout and the digest of an open entry; every byte is read.

    Args:
        record: The manifest's record of the entry.
        store: Holds the entry.
        fd: A descriptor of the entry.

    Returns:
        The defect in words; None if the entry is intact.
    """
    label = str(store.entry_path(record.key))
    if problem := layout_defect(fd, record.tensors, label):
        return problem
    digest = hash_entry(fd, lay_out(record.tensors)[1], label, record.digest)
    return None if digest == record.digest else f"expected XXH3 {record.digest}, found {digest}"


def confirmed_defect(record: EntryRecord, store: Store) -> str | None:
    """Check an entry as `defect_of` does, opened anew and read from the disk.

    Args:
        record: The manifest's record of the entry.
        store: Holds the entry.

    Returns:
        The defect in words; None if the entry is intact.
    """
    try:
        fd = store.open_entry(record.key)
    except StoreError as error:
        return str(error)
    with closing(fd):
        forget_pages(fd)
        return defect_of(record, store, fd)


def forget_pages(fd: int) -> None:
    """Drop a file from the page cache where the system can, so that it is read from the disk."""
    bypass_cache(fd)
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def take_out(store: Store, record: EntryRecord, problem: str) -> EntryDamagedError:
    """Take a damaged entry out of use.

    Args:
        store: Holds the entry.
        record: The manifest's record of the entry.
        problem: The result of `confirmed_defect`.

    Returns:
        The error to raise; its message says whether the entry was discarded, moved or left.
    """
    error = EntryDamagedError(
        f"{store.entry_path(record.key)}: {problem}; {_remove(store, record)}"
    )
    error.key = record.key
    logger.warning("%s", error)
    return error


def _remove(store: Store, record: EntryRecord) -> str:
    if store.read_only:
        return "left in place, since the store is opened read-only"
    if not (record.dropped or is_only_copy(store, record.key)):
        store.discard_entry(record.key)
        return "taken out of use"
    kept = keep_damaged(store, record.key)
    where = f"kept as {kept}" if kept else "left in place, as it cannot be moved"
    return (
        f"{where}, since --drop-source removed its source: restore {record.shard} with "
        f"SHA-256 {record.source_sha256} and convert the model again"
    )


def is_only_copy(store: Store, key: str) -> bool:
    """Return whether an entry cannot be made again because a source shard was removed.

    Args:
        store: Holds the entry and the drop records.
        key: The entry's key.

    Returns:
        True if its shard or a shard that it borrows from was removed, or if that is unknown because
        a drop record cannot be read.
    """
    try:
        records = [read_record(store, drop_id) for drop_id in record_ids(store)]
    except ManifestError:  # a newer format
        return True
    manifests = [record.manifest for record in records if record]
    for manifest in manifests:
        dropped = any(record.dropped for record in manifest.entries)
        for record in manifest.entries:
            if record.key == key and (record.dropped or (dropped and record.borrowed_sha256)):
                return True
    return not all(records)


def damaged_path(store: Store, key: str) -> Path | None:
    """Return the path of a damaged entry that `keep_damaged` moved, or None.

    Args:
        store: Holds the entry.
        key: The entry's key.
    """
    numbers = _kept_numbers(store.file_names("damaged"), key)
    return store.folder("damaged") / _kept_name(key, max(numbers)) if numbers else None


def _kept_name(key: str, number: int) -> str:
    return f"{key}.{number}.safetensors"


def _kept_numbers(names: Sequence[str], key: str) -> list[int]:
    """Return the numbers of the kept copies of an entry."""
    matches = (re.fullmatch(rf"{key}\.(\d{{1,9}})\.safetensors", name) for name in names)
    return [int(match[1]) for match in matches if match]


def keep_damaged(store: Store, key: str) -> Path | None:
    """Move an entry that cannot be made again to `damaged`.

    Args:
        store: Holds the entry.
        key: The entry's key.

    Returns:
        Its new path; None if it was not moved, because the store is read-only or after an error.
    """
    if store.read_only:
        return None
    with contextlib.suppress(OSError, StoreError), store.opened("entries", key[:2]) as folder:
        with store.opened("damaged", create=True) as damaged:
            name = _kept_name(key, 1 + max(_kept_numbers(damaged.names(), key), default=0))
            folder.replace(f"{key}.safetensors", damaged, name)
            damaged.sync()
            return damaged.path / name
    return None
