"""Source shards that are removed once their entries are safe, and what is kept of them.

    entry read back -> header kept -> journal published -> file removed -> ... -> manifest published

The order makes every state resumable: a file is removed only when the journal, which names its
entry, and its header, which the plan needs, are durable. The journal is a manifest of the removed
shards alone, beside the one that will name them all; a shard counts as dropped when a record says
so and its file is absent.

A shard goes when its own task is done, every task that borrows from it is done, and so is every
task of a shard that it borrows from: only then were those bytes proved against the Hub's SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from .checkpoint import Shard
from .descriptor import closing, open_regular, pread_exactly
from .errors import EntryDamaged, MalformedFile, SourceChanged, SourceDropped
from .hashing import hash_entry, read_into, sha256_of
from .hub import remove
from .manifest import EntryRecord, Manifest
from .request import Request, read_named
from .task import Part, Task
from .tensorfile import MAX_HEADER, Header, layout_defect, parse_header


def journal_name(request: Request) -> str:
    """The name of the journal among the store's manifests."""
    return f"{request.manifest_name}.dropped"


def dropped_records(request: Request) -> dict[str, EntryRecord]:
    """The records of shards that were dropped, by shard, as the manifest and the journal say."""
    found: dict[str, EntryRecord] = {}
    for name in (request.manifest_name, journal_name(request)):
        manifest = read_named(request.store, name)
        for record in manifest.entries if manifest else ():
            if record.dropped and not os.path.exists(request.directory / record.shard):
                found[record.shard] = record
    return found


def kept_header(request: Request, record: EntryRecord) -> Header | None:
    """The header of a dropped shard as it was kept, or None if it is absent or damaged."""
    path = request.store.header_path(record.source_sha256)
    try:
        with os.fdopen(open_regular(path, follow=False), "rb") as file:
            data = file.read(32 + 8 + MAX_HEADER)
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            return None
        label = f"{path} (the header of {record.shard})"
        return parse_header(lambda at, n: data[32 + at : 32 + at + n], record.source_size, label)
    except (OSError, MalformedFile):
        return None


def usable(
    request: Request, tasks: Sequence[Task], dropped: Mapping[str, EntryRecord]
) -> tuple[dict[str, EntryRecord], dict[str, str]]:
    """The records of dropped shards that hold for these tasks, and why the others do not."""
    usable: dict[str, EntryRecord] = {}
    reasons: dict[str, str] = {}
    for task in tasks:
        record = dropped.get(task.shard)
        if record is None:
            continue
        if request.force:
            reasons[task.shard] = "forced"
        elif record.task_sha256 != task.sha256:
            reasons[task.shard] = "config, tensors of its linears or transform version changed"
        elif request.store.entry_size(record.key) != record.size:
            reasons[task.shard] = "its entry is absent or cut short"
        elif _borrows_otherwise(request, task, record):
            reasons[task.shard] = "a part that it borrows changed"
        else:
            usable[task.shard] = record
    return usable, reasons


def _borrows_otherwise(request: Request, task: Task, record: EntryRecord) -> bool:
    """Whether a lender that is still there has other bytes now than the entry was made from."""
    if len(task.borrowed) != len(record.borrowed_sha256):
        return True
    lenders = zip(task.borrowed.items(), record.borrowed_sha256, strict=True)
    for (shard, parts), before in lenders:
        if os.path.exists(request.directory / shard):
            now = hashlib.sha256(b"".join(_part_digest(request, part) for part in parts))
            if now.hexdigest() != before:
                return True
    return False


def _part_digest(request: Request, part: Part) -> bytes:
    path = request.directory / part.shard
    with closing(Shard(part.shard, path).open()) as fd:
        data = memoryview(bytearray(part.stop - part.start))
        read_into(fd, data, part.start, str(path))
        return sha256_of(data)


def gone(request: Request, shards: Mapping[str, str]) -> SourceDropped:
    """The error for shards that must be read and were dropped; `shards`: why, by name."""
    listed = "\n  ".join(f"{shard}: {why}" for shard, why in shards.items())
    return SourceDropped(
        f"{request.directory}: {len(shards)} shards must be read again and were removed by "
        f"--drop-source; put them back, or undo the change:\n  {listed}"
    )


class Dropper:
    """Removes the shards of a run as they become free."""

    def __init__(
        self,
        request: Request,
        tasks: Sequence[Task],
        dropped: Mapping[str, EntryRecord],
        manifest_of: Callable[[Sequence[EntryRecord]], Manifest],
    ) -> None:
        """`dropped`: records of shards dropped before. `manifest_of(records)` gives a journal."""
        self._request, self._manifest_of = request, manifest_of
        self._pending = {task.shard: task for task in tasks if task.shard not in dropped}
        self._waiting: dict[str, tuple[EntryRecord, Task]] = {}
        self.dropped = dict(dropped)
        for shard in dropped:  # a run may have been killed between the file and its link
            if os.path.lexists(request.directory / shard):
                remove(request.directory / shard)

    def finish_task(self, record: EntryRecord) -> None:
        """Tells that a task is done, and removes every shard that is free by that.

        Raises EntryDamaged when an entry is not what was written, SourceChanged when a shard is
        not the one that was converted, StoreError; nothing is removed then.
        """
        self._waiting[record.shard] = record, self._pending.pop(record.shard)
        lending = {shard for task in self._pending.values() for shard in task.borrowed}
        for shard, (waiting, task) in list(self._waiting.items()):
            if shard not in lending and not self._pending.keys() & task.borrowed.keys():
                self._drop(waiting, task)
                del self._waiting[shard]

    def _drop(self, record: EntryRecord, task: Task) -> None:
        request = self._request
        shard = Shard(record.shard, request.directory / record.shard)
        self._read_back(record, task)
        with closing(shard.open()) as fd:
            known = shard.known_sha256(request.store.memo, fd)
            if (known or shard.sha256(request.store.memo)) != record.source_sha256:
                raise SourceChanged(f"{shard.path}: changed since it was converted; run again")
            length = 8 + int.from_bytes(pread_exactly(fd, 0, 8, str(shard.path)), "little")
            header = pread_exactly(fd, 0, length, str(shard.path))
        data = hashlib.sha256(header).digest() + header
        with request.store.new_file(len(data)) as file:
            file.write(memoryview(data))
            file.publish(request.store.header_path(record.source_sha256))
        self.dropped[record.shard] = replace(record, dropped=True)
        journal = self._manifest_of(list(self.dropped.values()))
        request.store.write_manifest(journal_name(request), journal.encode())
        remove(shard.path)

    def _read_back(self, record: EntryRecord, task: Task) -> None:
        store, label = self._request.store, str(self._request.store.entry_path(record.key))
        with closing(store.open_entry(record.key)) as fd:
            if hasattr(os, "posix_fadvise"):  # from the disk, not from the cache; entries are clean
                with contextlib.suppress(OSError):
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            defect = layout_defect(fd, task.outputs, label)
            digest = hash_entry(fd, label)
        if defect or digest != record.digest:
            store.quarantine(record.key)
            raise EntryDamaged(
                f"{label}: expected XXH3 {record.digest}, got {digest} when it was read back; "
                f"taken out of use, {record.shard} was not removed; run again"
            )
