"""The manifest: which entry holds which shard, and what every tensor in it is.

    8 bytes magic | u32 major << 16 | minor | u64 body length | SHA-256 of the body | msgpack body

A manifest is a memo that can be rebuilt: whatever is wrong with its bytes, it reads as no manifest.
The hash is integrity, not authenticity.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from ..errors import ManifestError, NewerManifestError
from ..files.tensor_header import DTYPE_BYTES, TensorSpec, check_name

MAGIC = b"PAROSTRM"
MAJOR, MINOR = 1, 1  # 1.1: directory
MAX_BYTES = 64 << 20  # 100,000 tensors take 7 MB
_MAX_PATH = 4096  # bytes, Linux's PATH_MAX
_HEAD = struct.Struct("<8sIQ32s")
_HEX64 = re.compile("[0-9a-f]{64}")
_HEX32 = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class EntryRecord:
    """One entry of the store and the shard it was made from."""

    shard: str
    source_sha256: str
    source_size: int
    """Bytes of the shard."""
    borrowed_sha256: tuple[str, ...]
    """One SHA-256 for each shard that lent parts."""
    task_sha256: str
    """SHA-256 of the task's canonical description."""
    key: str
    digest: str
    """XXH3-128 of the entry's bytes, 32 hex digits."""
    size: int
    """Bytes of the entry."""
    tensors: tuple[TensorSpec, ...]
    """In the order in which `lay_out` was given them; it decides every byte range."""
    dropped: bool = False
    """Whether the source shard was removed on purpose once its entry was durable."""


@dataclass(frozen=True)
class Manifest:
    """A converted checkpoint: its entries, and what they were made from."""

    model: str
    """The directory or repository as it was named; for people, never opened."""
    config_sha256: str
    """SHA-256 of the bytes of config.json and of the index."""
    transform: str
    """The entry format and the version of every operation, as `task.TRANSFORM` was."""
    layout: str
    bits: int
    group_size: int
    entries: tuple[EntryRecord, ...]
    directory: str = ""
    """The model's resolved directory, for the cache commands; empty beside a model, and before 1.1.

    Believed only where the manifest's own name is the hash of it.
    """

    def entries_with(self, wanted: Callable[[str], bool]) -> list[EntryRecord]:
        """Give the entries that hold a tensor of a wanted name."""
        return [
            record
            for record in self.entries
            if any(wanted(tensor.name) for tensor in record.tensors)
        ]

    def encode(self) -> bytes:
        """The bytes of a manifest file."""
        body = pack(
            {
                "model": self.model.encode("utf-8", "replace").decode(),
                "config_sha256": self.config_sha256,
                "transform": self.transform,
                "layout": self.layout,
                "bits": self.bits,
                "group_size": self.group_size,
                "entries": [_pack_record(record) for record in self.entries],
                "directory": os.fsencode(self.directory),
            }
        )
        return seal(MAGIC, body)

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """The manifest in a file's bytes. Raises ManifestError for any defect, NewerManifestError for a
        newer major version.
        """
        body = unseal(MAGIC, data)
        try:
            fields = unpack(body, _MAX_PATH)
            entries = tuple(_unpack_record(record) for record in _typed(fields, "entries", list))
            return cls(
                _typed(fields, "model", str),
                _hex(fields, "config_sha256"),
                _typed(fields, "transform", str),
                _typed(fields, "layout", str),
                _typed(fields, "bits", int),
                _typed(fields, "group_size", int),
                entries,
                _directory(fields),
            )
        except ManifestError:
            raise
        except Exception as error:  # msgpack raises ten kinds on hostile bytes; each is a miss
            raise ManifestError(f"not a manifest: {type(error).__name__}: {error}") from None


def seal(magic: bytes, body: bytes) -> bytes:
    """The bytes of a file with this body, whose every change shows."""
    digest = hashlib.sha256(body).digest()
    return _HEAD.pack(magic, MAJOR << 16 | MINOR, len(body), digest) + body


def unseal(magic: bytes, data: bytes, limit: int = MAX_BYTES) -> bytes:
    """The body of a sealed file. Raises ManifestError, NewerManifestError."""
    if len(data) < _HEAD.size or len(data) > limit:
        raise ManifestError(f"not a manifest: {len(data):,} bytes")
    found, version, length, sha256 = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    if found != magic or length != len(body):
        raise ManifestError("not a manifest: wrong magic or length")
    if version >> 16 != MAJOR:
        raise NewerManifestError(f"manifest format {version >> 16}, this version reads {MAJOR}")
    if hashlib.sha256(body).digest() != sha256:
        raise ManifestError("damaged: the body's SHA-256 does not fit")
    return body


def pack(value: Any) -> bytes:
    """The msgpack bytes of a value."""
    body: bytes = msgpack.packb(value)
    return body


def unpack(body: bytes, longest: int) -> Any:
    """The value of msgpack bytes, none of it longer than a model needs; `longest`: of bytes.

    Raises whatever msgpack raises on hostile bytes.
    """
    return msgpack.unpackb(
        body,
        strict_map_key=True,
        max_str_len=4096,
        max_bin_len=longest,
        max_array_len=200_000,
        max_map_len=10_000,
        max_ext_len=0,
        object_pairs_hook=_unique,
    )


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ManifestError("a key stands twice")
    return found


def _pack_record(record: EntryRecord) -> dict[str, Any]:
    fields = dict(vars(record))
    fields["tensors"] = [[t.name, t.dtype, list(t.shape)] for t in record.tensors]
    return fields


def _unpack_record(fields: dict[str, Any]) -> EntryRecord:
    if not all(
        type(h) is str and _HEX64.fullmatch(h) for h in _typed(fields, "borrowed_sha256", list)
    ):
        raise ManifestError("borrowed_sha256 is no list of SHA-256")
    shard: str = _typed(fields, "shard", str)
    if shard in ("", ".", "..") or "/" in shard or "\0" in shard:
        raise ManifestError("shard: no file name")
    return EntryRecord(
        shard,
        _hex(fields, "source_sha256"),
        _typed(fields, "source_size", int),
        tuple(fields["borrowed_sha256"]),
        _hex(fields, "task_sha256"),
        _hex(fields, "key"),
        _hex(fields, "digest", _HEX32),
        _typed(fields, "size", int),
        tuple(_unpack_tensor(tensor) for tensor in _typed(fields, "tensors", list)),
        _typed(fields, "dropped", bool),
    )


def _unpack_tensor(fields: list[Any]) -> TensorSpec:
    name, dtype, shape = fields
    check_name(name, "manifest")
    if dtype not in DTYPE_BYTES or len(shape) > 8:
        raise ManifestError(f"{name}: unknown dtype or too many dimensions")
    if not all(type(dim) is int and 0 <= dim < 2**31 for dim in shape):
        raise ManifestError(f"{name}: a dimension that no tensor has")
    return TensorSpec(name, dtype, tuple(shape))


def _directory(fields: dict[str, Any]) -> str:
    path: bytes = _typed({"directory": b"", **fields}, "directory", bytes)
    if path and (not path.startswith(b"/") or b"\0" in path):
        raise ManifestError("directory: no absolute path")
    return os.fsdecode(path)


def _typed(fields: dict[str, Any], name: str, kind: type) -> Any:
    value = fields[name]
    if type(value) is not kind:
        raise ManifestError(f"{name}: expected {kind.__name__}, found {type(value).__name__}")
    return value


def _hex(fields: dict[str, Any], name: str, form: re.Pattern[str] = _HEX64) -> str:
    value: str = _typed(fields, name, str)
    if not form.fullmatch(value):
        raise ManifestError(f"{name}: no hex digest")
    return value
