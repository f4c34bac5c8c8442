"""Whether a store holds what was written, and a model what was converted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import safetensors

from ..checkpoint.shard import Shard
from ..conversion.find_dropped import find_manifest
from ..conversion.request import Request, default_jobs
from ..errors import ParoquantStreamError, StoreError
from ..files.descriptor import closing, path_of
from ..files.digest_cache import DigestCache
from ..files.tensor_writer import lay_out
from ..store.damage import confirmed_defect, take_out
from ..store.drop_record import read_records, repair_records
from ..store.entry_digest import hash_entry
from ..store.manifest import EntryRecord, Manifest
from ..store.store import Store
from .models import Model


@dataclass(frozen=True)
class Problem:
    """A file that is not what it should be."""

    path: Path
    expected: str
    found: str
    key: str | None = None
    """Of the entry; None for a source shard."""

    def __str__(self) -> str:
        """Return `path: expected X, got Y`."""
        return f"{self.path}: expected {self.expected}, got {self.found}"


def verify_entry(store: Store, record: EntryRecord) -> Problem | None:
    """Read every byte of an entry; a second opinion comes from the safetensors library.

    A damaged entry is taken out of use.

    Returns:
        What is wrong with it, or None.
    """
    path = store.entry_path(record.key)
    try:
        fd = store.open_entry(record.key)
    except StoreError:
        return Problem(path, f"{record.size:,} bytes", "no readable file", record.key)
    with closing(fd):
        tensors = lay_out(record.tensors)[1]
        digest = hash_entry(fd, tensors, str(path), record.digest)
        if digest == record.digest:  # every byte was read: a map of others could end this process
            opinion = _second_opinion(fd, record)
            return Problem(path, *opinion, record.key) if opinion else None
    if not confirmed_defect(record, store):  # one bad read is no damage
        return None
    take_out(store, record, f"expected XXH3 {record.digest}, found {digest}")
    return Problem(path, f"XXH3 {record.digest}", digest, record.key)


def _second_opinion(fd: int, record: EntryRecord) -> tuple[str, str] | None:
    """Return expected and found where the safetensors library sees other tensors."""
    try:
        with safetensors.safe_open(path_of(fd), framework="numpy") as file:  # the header alone
            found = set(file.keys())
    except safetensors.SafetensorError as error:
        return "a file that safetensors opens", str(error)
    names = {tensor.name for tensor in record.tensors}
    return None if found == names else (f"{len(names)} tensors", f"{len(found)} others")


def verify_source(
    directory: Path, record: EntryRecord, digest_cache: DigestCache
) -> Problem | None:
    """Read every byte of a source shard; a dropped one may be absent.

    Returns:
        What is wrong with it, or None.
    """
    shard = Shard(record.shard, directory / record.shard)
    if record.dropped and not os.path.lexists(shard.path):
        return None
    try:
        sha256 = shard.sha256(digest_cache)
    except ParoquantStreamError as error:
        return Problem(shard.path, f"SHA-256 {record.source_sha256}", str(error))
    if sha256 == record.source_sha256:
        return None
    return Problem(shard.path, f"SHA-256 {record.source_sha256}", sha256)


def manifests_of(store: Store) -> Iterator[Manifest]:
    """Yield every readable manifest of a store."""
    for name in store.manifest_names():
        if manifest := store.load_manifest(name):
            yield manifest


def verify_model(request: Request, sources: bool) -> tuple[int, list[Problem]]:
    """Verify the entries of one converted model, and its shards if asked to.

    Returns:
        The number of files read, and what is wrong with them.

    Raises:
        StoreError: The model was never converted into this store.
    """
    manifest = find_manifest(request)
    if manifest is None:
        raise StoreError(f"{request.source.name}: not converted in {request.store.root}")
    directory = request.source.directory if sources else None
    return _verify_records(request.store, manifest.entries, directory)


def verify_found(store: Store, model: Model, sources: bool) -> tuple[int, list[Problem]]:
    """Verify the entries of a model as a listing has it, and its shards if asked to.

    Returns:
        The number of files read, and what is wrong with them.

    Raises:
        StoreError: The shards are asked for, and where they lie is not known.
    """
    if sources and model.directory is None:
        raise StoreError(f"{model.name}: where its shards lie is not known; name its directory")
    return _verify_records(store, model.records, model.directory if sources else None)


def verify_store(store: Store) -> tuple[int, list[Problem]]:
    """Verify every entry that a manifest names.

    Returns:
        The number of entries read, and what is wrong with them.
    """
    with suppress(StoreError):  # a cache that cannot be written is read all the same
        repair_records(store)
    manifests = [*manifests_of(store), *(record.manifest for record in read_records(store))]
    records = {record.key: record for manifest in manifests for record in manifest.entries}
    return _verify_records(store, records.values(), None)


def _verify_records(
    store: Store, records: Iterable[EntryRecord], directory: Path | None
) -> tuple[int, list[Problem]]:
    """Verify these entries, and the shards in the model's directory if one is given."""
    from concurrent.futures import ThreadPoolExecutor  # late: `cache ls` needs none of it

    records = list(records)
    with ThreadPoolExecutor(1) as thread:
        with suppress(RuntimeError):  # the system starts no more threads
            thread.submit(import_module, "numpy")  # for safetensors, while the first entry is read
        checks = [verify_entry(store, record) for record in records]
    if directory is not None:
        verify = partial(verify_source, directory, digest_cache=store.digest_cache)
        with ThreadPoolExecutor(default_jobs()) as threads:
            checks += threads.map(verify, records)
    return len(checks), [problem for problem in checks if problem]
