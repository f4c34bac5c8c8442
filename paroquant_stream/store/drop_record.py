"""Drop records: what replaces the source shards of a model that `--drop-source` removed.

    v1/dropped/<id>.first.msgpack  <id>.second.msgpack     two copies of the same bytes

    8 bytes magic | u32 version | u64 length | SHA-256 of the body | msgpack body:
        dtype      the name of a variant: `--dtype`, and `--io-bits` unless it is 4
        manifest   the bytes of a manifest of every converted shard; a shard that was removed, or is
                   about to be, is marked dropped
        headers    shard -> the bytes of its header, for the shards marked dropped

A record is durable before the first file that it replaces is removed, and only `cache rm` removes
it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ManifestError, NewerManifestError, StoreError
from ..files.tensor_header import MAX_HEADER, Header, parse_header
from .format import VARIANTS, Variant
from .manifest import MAX_BYTES, Manifest, pack, seal, unpack, unseal
from .store import Store

logger = logging.getLogger(__name__)

MAGIC = b"PARODROP"
MAX_RECORD = 2 * MAX_BYTES
_MAX_SHIPPED = 4 * MAX_BYTES  # bytes of all records in a model directory
_COPIES = ("first", "second")
_FILE = re.compile(r"(?P<id>[0-9a-f]{64})\.(?P<copy>first|second)\.msgpack")


def new_id() -> str:
    """Return a random id, 64 hex digits."""
    return os.urandom(32).hex()


@dataclass(frozen=True)
class DropRecord:
    """The record of a model whose source shards were removed or are being removed."""

    id: str
    variant: Variant
    manifest: Manifest
    """Every converted shard, in any order, and the model's directory at that time."""
    headers: Mapping[str, bytes] = field(default_factory=dict)
    """Shard name -> the bytes of its header, length and JSON."""

    def header(self, shard: str) -> Header | None:
        """Parse the kept header of a removed shard.

        Args:
            shard: Its file name.

        Returns:
            The header; None if none was kept.

        Raises:
            MalformedFileError: The kept bytes are not a valid header.
        """
        data, records = self.headers.get(shard), self.manifest.entries
        size = next((r.source_size for r in records if r.shard == shard), None)
        if data is None or size is None:
            return None
        return parse_header(lambda at, n: data[at : at + n], size, f"the kept header of {shard}")

    def encode(self) -> bytes:
        """Return the bytes of a record's file."""
        body = {
            "dtype": self.variant.name,
            "manifest": self.manifest.encode(),
            "headers": dict(self.headers),
        }
        return seal(MAGIC, pack(body))

    @classmethod
    def decode(cls, drop_id: str, data: bytes) -> DropRecord:
        """Decode a record.

        Args:
            drop_id: The id in the file's name.
            data: The bytes of the file, which are untrusted.

        Returns:
            The record.

        Raises:
            NewerManifestError: The bytes have a newer format.
            ManifestError: They have any other defect.
        """
        body = unseal(MAGIC, data, MAX_RECORD)
        try:
            fields = unpack(body, MAX_RECORD)
            headers = {
                _text(name): _header_bytes(found) for name, found in fields["headers"].items()
            }
            if fields["dtype"] not in VARIANTS:
                raise ManifestError(f"unknown dtype {fields['dtype']!r}")
            variant = VARIANTS[fields["dtype"]]
            return cls(drop_id, variant, Manifest.decode(fields["manifest"]), headers)
        except ManifestError:
            raise
        except Exception as error:  # msgpack raises ten kinds of error for malformed bytes
            raise ManifestError(f"not a record: {type(error).__name__}: {error}") from None


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ManifestError("a shard's name is not a string")
    return value


def _header_bytes(value: Any) -> bytes:
    if type(value) is not bytes or len(value) > MAX_HEADER + 8:
        raise ManifestError("a header is not a byte string, or too long")
    return value


def read_records(store: Store) -> list[DropRecord]:
    """Read all readable records of a store, each from either copy.

    Args:
        store: Holds the records.

    Returns:
        The records in the order of `record_ids`.

    Raises:
        NewerManifestError: A record has a newer format.
        ManifestError: The records of a model directory, which are untrusted, are too large.
    """
    size = 0 if store.private else store.folder_size("dropped")
    if size > _MAX_SHIPPED:
        raise ManifestError(
            f"{store.folder('dropped')}: expected at most {_MAX_SHIPPED:,} bytes of records, found "
            f"{size:,}; this is no conversion made by --in-place: remove {store.root}"
        )
    return [record for drop_id in record_ids(store) if (record := read_record(store, drop_id))]


def record_ids(store: Store) -> list[str]:
    """List the ids of all records, readable or not."""
    names = (_FILE.fullmatch(name) for name in store.file_names("dropped"))
    return list(dict.fromkeys(match["id"] for match in names if match))


def read_record(store: Store, drop_id: str) -> DropRecord | None:
    """Read one record from either copy.

    Args:
        store: Holds the record.
        drop_id: Its id.

    Returns:
        The record; None if both copies are absent or damaged.

    Raises:
        NewerManifestError: It has a newer format.
    """
    for data in _intact_copies(store, drop_id).values():
        with contextlib.suppress(ManifestError):
            return DropRecord.decode(drop_id, data)
    return None


def repair_records(store: Store) -> None:
    """Replace each absent or damaged copy by the other one.

    Args:
        store: Holds the records.

    Raises:
        NewerManifestError: A record has a newer format.
        StoreError: A copy cannot be written.
    """
    for drop_id in record_ids(store):
        intact = _intact_copies(store, drop_id)
        best = next(iter(intact.values()), None)
        for copy in _COPIES:
            if best is not None and intact.get(copy) != best:
                logger.warning("%s: replaced the damaged %s copy by the other", drop_id, copy)
                store.write_file("dropped", _name(drop_id, copy), best)


def _intact_copies(store: Store, drop_id: str) -> dict[str, bytes]:
    """Return the copies whose hash is right, the one that is written first in front."""
    found = {}
    for copy in _COPIES:
        data = store.read_file("dropped", _name(drop_id, copy), MAX_RECORD)
        try:
            if data is not None and unseal(MAGIC, data, MAX_RECORD):
                found[copy] = data
        except NewerManifestError:
            raise
        except ManifestError:
            continue
    return found


def _name(drop_id: str, copy: str) -> str:
    return f"{drop_id}.{copy}.msgpack"


def write_record(store: Store, record: DropRecord) -> None:
    """Publish both copies of a record, one after the other.

    Args:
        store: Receives the record.
        record: Replaces a record of the same id.

    Raises:
        StoreError: The record is too large or cannot be written.
    """
    data = record.encode()
    if len(data) > MAX_RECORD:
        raise StoreError(f"{record.manifest.model}: its record takes {len(data):,} bytes, too many")
    for copy in _COPIES:
        store.write_file("dropped", _name(record.id, copy), data)


def is_stored(store: Store, record: DropRecord) -> bool:
    """Return whether both copies of a record are stored and intact."""
    copies = _intact_copies(store, record.id)
    return [copies.get(copy) for copy in _COPIES] == [record.encode()] * len(_COPIES)
