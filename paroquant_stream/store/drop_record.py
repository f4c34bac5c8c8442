"""Records of models whose source shards were removed: all that replaces them, kept twice.

    v1/dropped/<id>.first.msgpack  <id>.second.msgpack     the same bytes; either one is enough

    8 bytes magic | u32 version | u64 length | SHA-256 of the body | msgpack body:
        dtype      as `--dtype` names it
        manifest   a manifest, by its own bytes, of every shard that was converted; a shard that was
                   removed, or is about to be, is marked dropped
        headers    shard -> the bytes of its header, of those so marked

A record is durable before the first file that it replaces is removed, and only `cache rm` removes
it. Its id is random, and stands in a note in the model directory, `paroquant_stream.dropped.json`;
so a model is found wherever its directory goes, also beside another one of equal config and index.
"""

from __future__ import annotations

import contextlib
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
_MAX_NOTE = 64 << 10  # bytes; it has 500
_NOTE_TEXT = (
    "The .safetensors shards of this model were removed by `paroquant-stream convert "
    "--drop-source`. Its weights are in the paroquant_stream cache of the user who did it "
    "(`paroquant-stream cache path`), which finds them by this id: keep this file with the model."
)


def new_id() -> str:
    """An id that no other record has."""
    return os.urandom(32).hex()


@dataclass(frozen=True)
class DropRecord:
    """What is known of a model whose shards are being removed, or were."""

    id: str
    dtype: Dtype
    manifest: Manifest
    """Of every shard that was converted, in no order; its directory is where the model lay."""
    headers: Mapping[str, bytes] = field(default_factory=dict)
    """Shard name -> the bytes of its header, length and JSON."""

    def header(self, shard: str) -> Header | None:
        """The header of a shard that was removed, or None where it was not kept."""
        data, records = self.headers.get(shard), self.manifest.entries
        size = next((r.source_size for r in records if r.shard == shard), None)
        if data is None or size is None:
            return None
        return parse_header(lambda at, n: data[at : at + n], size, f"the kept header of {shard}")

    def encode(self) -> bytes:
        """The bytes of a record's file."""
        body = {
            "dtype": self.dtype,
            "manifest": self.manifest.encode(),
            "headers": dict(self.headers),
        }
        return seal(MAGIC, pack(body))

    @classmethod
    def decode(cls, drop_id: str, data: bytes) -> DropRecord:
        """The record in a file's bytes. Raises ManifestError for any defect, NewerManifestError."""
        body = unseal(MAGIC, data, MAX_RECORD)
        try:
            fields = unpack(body, MAX_RECORD)
            headers = {
                _text(name): _header_bytes(found) for name, found in fields["headers"].items()
            }
            if fields["dtype"] not in DTYPES:
                raise ManifestError(f"dtype {fields['dtype']!r} is not known")
            return cls(drop_id, fields["dtype"], Manifest.decode(fields["manifest"]), headers)
        except ManifestError:
            raise
        except Exception as error:  # msgpack raises ten kinds on hostile bytes; each is a miss
            raise ManifestError(f"not a record: {type(error).__name__}: {error}") from None


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ManifestError("a shard's name is no text")
    return value


def _header_bytes(value: Any) -> bytes:
    if type(value) is not bytes or len(value) > MAX_HEADER + 8:
        raise ManifestError("a header is no bytes, or too long")
    return value


def read_records(store: Store) -> list[DropRecord]:
    """The records of a store that can be read, from either copy, by id.

    Raises NewerManifestError when one is of a newer format.
    """
    return [record for drop_id in record_ids(store) if (record := read_record(store, drop_id))]


def record_ids(store: Store) -> list[str]:
    """The ids of all records, readable or not."""
    names = (_FILE.fullmatch(name) for name in store.file_names("dropped"))
    return list(dict.fromkeys(match["id"] for match in names if match))


def read_record(store: Store, drop_id: str) -> DropRecord | None:
    """The record of this id, from either copy; None where neither can be read.

    Raises NewerManifestError when it is of a newer format.
    """
    for data in _sound_copies(store, drop_id).values():
        with contextlib.suppress(ManifestError):
            return DropRecord.decode(drop_id, data)
    return None


def heal_records(store: Store) -> None:
    """Write a copy that is absent or damaged anew from the other one. Raises StoreError."""
    for drop_id in record_ids(store):
        sound = _sound_copies(store, drop_id)
        best = next(iter(sound.values()), None)
        for copy in _COPIES:
            if best is not None and sound.get(copy) != best:
                logger.warning("%s: the %s copy was damaged and is written anew", drop_id, copy)
                store.write_file("dropped", _name(drop_id, copy), best)


def _sound_copies(store: Store, drop_id: str) -> dict[str, bytes]:
    """The bytes of the copies whose hash fits; the first, which is written first, before the other.

    Raises NewerManifestError.
    """
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
    """Publish both copies of a record. Raises StoreError."""
    data = record.encode()
    if len(data) > MAX_RECORD:
        raise StoreError(f"{record.manifest.model}: its record takes {len(data):,} bytes, too many")
    for copy in _COPIES:
        store.write_file("dropped", _name(record.id, copy), data)


def is_stored(store: Store, record: DropRecord) -> bool:
    """Whether both copies of a record are there and sound."""
    copies = _sound_copies(store, record.id)
    return [copies.get(copy) for copy in _COPIES] == [record.encode()] * len(_COPIES)


def read_note(directory: Path) -> str | None:
    """The id of the last drop from a model directory, or None where nothing says so."""
    with contextlib.suppress(OSError, ParoquantStreamError), Folder.open(directory) as folder:
        with os.fdopen(folder.open_file(NOTE), "rb") as file:
            found = strict_json(file.read(_MAX_NOTE), NOTE)
        drop_id = found.get("id") if type(found) is dict else None
        if type(drop_id) is str and re.fullmatch("[0-9a-f]{64}", drop_id):
            return drop_id
    return None


def write_note(home: Folder, drop_id: str) -> None:
    """Leave in a model directory which record it needs, durable.

    A note that cannot be written is only logged, for the path finds the record as well; but then
    none must be there, for a note is believed before a path.

    Raises:
        StoreError: A note of another drop can be neither replaced nor removed.
    """
    text = json.dumps({"id": drop_id, "text": _NOTE_TEXT}, indent=2) + "\n"
    try:
        temp_files.sweep_beside(home, NOTE, locks=True)  # a drop is refused where they do nothing
        with new_file_in(home, NOTE, len(text)) as file:
            file.write(memoryview(text.encode()))
    except (OSError, StoreError) as error:
        _remove_note(home, error)
        logger.warning("%s: not written: %s", home.path / NOTE, error)


def _remove_note(home: Folder, reason: Exception) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            home.unlink(NOTE)
            home.sync()
    except OSError as error:
        raise StoreError(
            f"{home.path / NOTE}: names another drop and can be neither replaced ({reason}) nor "
            f"removed ({error.strerror}); remove it and run again"
        ) from error
