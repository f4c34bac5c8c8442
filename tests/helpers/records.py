"""Manifests and drop records of entries of any bytes, without a model."""

from __future__ import annotations

import json
import os
from pathlib import Path

from paroquant_stream.files.hashing import hash_entry
from paroquant_stream.files.tensor_header import TensorSpec
from paroquant_stream.files.tensor_writer import lay_out
from paroquant_stream.store.drop_record import DropRecord
from paroquant_stream.store.format import DEFAULT_VARIANT
from paroquant_stream.store.manifest import EntryRecord, Manifest
from paroquant_stream.store.store import Store
from tests.helpers.stores import KEY, publish

SHARD = "model-00001-of-00002.safetensors"
TENSORS = (TensorSpec("x.weight", "U32", (2, 4)), TensorSpec("x.bias", "F16", (3,)))


def header_bytes(names: tuple[str, ...] = ("x",), dtype: str = "F16") -> bytes:
    """Return the header of a shard of small tensors, 2 bytes each: length and JSON."""
    fields = {
        name: {"dtype": dtype, "shape": [1], "data_offsets": [2 * i, 2 * i + 2]}
        for i, name in enumerate(names)
    }
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text


def publish_entry(store: Store, key: str = KEY, **fields: object) -> EntryRecord:
    """Publish a valid entry of two tensors and return its record."""
    header, tensors = lay_out(TENSORS)
    data = header + bytes(sum(tensor.nbytes for tensor in tensors))
    publish(store, data, key)
    fd = store.open_entry(key)
    digest = hash_entry(fd, key)
    os.close(fd)
    return entry_record(key=key, digest=digest, size=len(data), **fields)


def entry_record(**fields: object) -> EntryRecord:
    """Return a record whose fields have any valid value unless they are given."""
    values = {
        "shard": SHARD,
        "source_sha256": "a" * 64,
        "source_size": len(header_bytes()) + 2,
        "borrowed_sha256": (),
        "task_sha256": "c" * 64,
        "key": KEY,
        "digest": "e" * 32,
        "size": 20,
        "tensors": TENSORS,
    }
    return EntryRecord(**{**values, **fields})


def manifest_of(*records: EntryRecord, directory: str = "") -> Manifest:
    """Return a manifest of these entries."""
    return Manifest("name", "f" * 64, "entry/1", "AUTOAWQ", 4, 128, records, directory)


def drop_record(*records: EntryRecord, drop_id: str = "1" * 64, **headers: bytes) -> DropRecord:
    """Return a drop record of these entries."""
    return DropRecord(drop_id, DEFAULT_VARIANT, manifest_of(*records), headers)


def flip_last_byte(path: Path) -> None:
    """Damage a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
