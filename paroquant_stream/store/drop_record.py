"""Drop records: what replaces the source shards of a model that `--drop-source` removed.

    v1/dropped/<id>.first.msgpack  <id>.second.msgpack     two copies of the same bytes

    8 bytes magic | u32 version | u64 length | SHA-256 of the body | msgpack body:
        dtype      one of the values of `--dtype`
        manifest   the bytes of a manifest of every converted shard; a shard that was removed, or is
                   about to be, is marked dropped
        headers    shard -> the bytes of its header, for the shards marked dropped

A record is durable before the first file that it replaces is removed, and only `cache rm` removes
it. Its random id is in a note in the model directory, `paroquant_stream.dropped.json`, by which a
model is found after its directory was moved, and told apart from one of equal config and index.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ManifestError, NewerManifestError, ParoquantStreamError, StoreError
from ..files import temp_files
from ..files.folder import Folder
from ..files.new_file import new_file_in
from ..files.strict_json import strict_json
from ..files.tensor_header import MAX_HEADER, Header, parse_header
from .format import DTYPES, Dtype
from .manifest import MAX_BYTES, Manifest, pack, seal, unpack, unseal
from .store import Store

logger = logging.getLogger(__name__)

MAGIC = b"PARODROP"
MAX_RECORD = 2 * MAX_BYTES
NOTE = "paroquant_stream.dropped.json"
_COPIES = ("first", "second")
_FILE = re.compile(r"(?P<id>[0-9a-f]{64})\.(?P<copy>first|second)\.msgpack")
_MAX_NOTE = 64 << 10  # bytes; a note has 500
_NOTE_TEXT = (
    "The .safetensors shards of this model were removed by `paroquant-stream convert "
    "--drop-source`. Its weights are in the paroquant_stream cache of the user who did it "
    "(`paroquant-stream cache path`), which finds them by this id: keep this file with the model."
)


def new_id() -> str:
    """Return a random id, 64 hex digits."""
    return os.urandom(32).hex()


@dataclass(frozen=True)
class DropRecord:
    """The record of a model whose source shards were removed or are being removed."""

    id: str
    dtype: Dtype
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
            "dtype": self.dtype,
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
            if fields["dtype"] not in DTYPES:
                raise ManifestError(f"unknown dtype {fields['dtype']!r}")
            return cls(drop_id, fields["dtype"], Manifest.decode(fields["manifest"]), headers)
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
    """
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


def read_note(directory: Path) -> str | None:
    """Read the id of the drop record that a model directory needs.

    Args:
        directory: The model directory.

    Returns:
        The id; None if the note is absent, a link or damaged.
    """
    with contextlib.suppress(OSError, ParoquantStreamError), Folder.open(directory) as folder:
        with os.fdopen(folder.open_file(NOTE), "rb") as file:
            found = strict_json(file.read(_MAX_NOTE), NOTE)
        drop_id = found.get("id") if type(found) is dict else None
        if type(drop_id) is str and re.fullmatch("[0-9a-f]{64}", drop_id):
            return drop_id if found.get("check", _check_of(drop_id)) == _check_of(drop_id) else None
    return None


def _check_of(drop_id: str) -> str:
    return hashlib.sha256(drop_id.encode()).hexdigest()[:16]


def write_note(folder: Folder, drop_id: str, required: bool = False) -> None:
    """Write the durable note that names the drop record of a model directory.

    An error is only logged, since the record is found by the directory's path too; but then the
    directory must have no note, because a note counts more than a path.

    Args:
        folder: The model directory.
        drop_id: The id of the record.
        required: Raise an error instead of logging it.

    Raises:
        StoreError: A required note cannot be written, or a note of another drop can be neither
            replaced nor removed.
    """
    fields = {"id": drop_id, "check": _check_of(drop_id), "text": _NOTE_TEXT}
    text = json.dumps(fields, indent=2) + "\n"
    try:
        temp_files.sweep_beside(folder, NOTE, locks=True)  # without locks a drop is refused
        with new_file_in(folder, NOTE, len(text)) as file:
            file.write(memoryview(text.encode()))
    except (OSError, StoreError) as error:
        if required:
            raise StoreError(f"{folder.path / NOTE}: cannot be written: {error}") from error
        _remove_note(folder, error)
        logger.warning("%s: not written: %s", folder.path / NOTE, error)


def _remove_note(folder: Folder, reason: Exception) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.unlink(NOTE)
            folder.sync()
    except OSError as error:
        raise StoreError(
            f"{folder.path / NOTE}: names another drop and can be neither replaced ({reason}) nor "
            f"removed ({error.strerror}); remove it and run again"
        ) from error
