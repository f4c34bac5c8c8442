"""The manifest: the entry of each shard of a converted model, and the tensors in it.

    8 bytes magic | u32 major << 16 | minor | u64 body length | SHA-256 of the body | msgpack body

A manifest can be rebuilt: one with any defect counts as absent. Its hash protects integrity, not
authenticity, so the body is untrusted input.
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
MAJOR, MINOR = 2, 0  # 1.1: directory; 2.0: digests over blocks
_OLDEST = 1
MAX_BYTES = 64 << 20  # several times what the largest models need
_MAX_PATH = 4096  # bytes, Linux's PATH_MAX
_HEAD = struct.Struct("<8sIQ32s")
_HEX64 = re.compile("[0-9a-f]{64}")
DIGEST_FORM = re.compile("(?:tree:)?[0-9a-f]{32}")  # see entry_digest.py


@dataclass(frozen=True)
class EntryRecord:
    """An entry of the store and the shard that it was made from."""

    shard: str
    source_sha256: str
    source_size: int
    """Bytes of the shard."""
    borrowed_sha256: tuple[str, ...]
    """SHA-256 of each other shard that the task borrows tensors from."""
    task_sha256: str
    """SHA-256 of the task's canonical description."""
    key: str
    digest: str
    """Of the entry's bytes, see entry_digest.py."""
    size: int
    """Bytes of the entry."""
    tensors: tuple[TensorSpec, ...]
    """In the order that was passed to `lay_out`, which determines every byte range."""
    dropped: bool = False
    """Whether `--drop-source` removed the source shard, or is about to."""


@dataclass(frozen=True)
class Manifest:
    """A converted model: its entries and their sources."""

    model: str
    """The directory or repository as the user named it; only displayed, never opened."""
    config_sha256: str
    """SHA-256 of the bytes of config.json and of the index."""
    transform: str
    """The value of `format.TRANSFORM` at the time of the conversion."""
    layout: str
    bits: int
    group_size: int
    entries: tuple[EntryRecord, ...]
    directory: str = ""
    """The model's resolved directory; empty in a model directory's own store and before 1.1.

    Used only if the manifest's file name is the hash of it.
    """

    def entries_with(self, wanted: Callable[[str], bool]) -> list[EntryRecord]:
        """Return the entries with at least one wanted tensor.

        Args:
            wanted: Decides by the name of a tensor.
        """
        return [
            record
            for record in self.entries
            if any(wanted(tensor.name) for tensor in record.tensors)
        ]

    def encode(self) -> bytes:
        """Return the bytes of a manifest file."""
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
        """Decode a manifest.

        Args:
            data: The bytes of a manifest file, which are untrusted.

        Returns:
            The manifest.

        Raises:
            NewerManifestError: The bytes have a newer major version.
            ManifestError: They have any other defect.
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
        except Exception as error:  # msgpack raises ten kinds of error for malformed bytes
            raise ManifestError(f"not a manifest: {type(error).__name__}: {error}") from None


def seal(magic: bytes, body: bytes) -> bytes:
    """Return the bytes of a file: the header, with the SHA-256 of the body, and the body.

    Args:
        magic: 8 bytes that name the kind of file.
        body: The content.
    """
    digest = hashlib.sha256(body).digest()
    return _HEAD.pack(magic, MAJOR << 16 | MINOR, len(body), digest) + body


def unseal(magic: bytes, data: bytes, limit: int = MAX_BYTES) -> bytes:
    """Check the header of a file that `seal` made, and return the body.

    Args:
        magic: 8 bytes that name the kind of file.
        data: The bytes of the file, which are untrusted.
        limit: The most bytes that it may have.

    Returns:
        The body.

    Raises:
        NewerManifestError: The file has a newer major version.
        ManifestError: It has the wrong size, magic or hash.
    """
    if len(data) < _HEAD.size or len(data) > limit:
        raise ManifestError(f"not a manifest: {len(data):,} bytes")
    found, version, length, sha256 = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    if found != magic or length != len(body):
        raise ManifestError("not a manifest: wrong magic or length")
    if not _OLDEST <= version >> 16 <= MAJOR:
        raise NewerManifestError(f"manifest format {version >> 16}, this version reads {MAJOR}")
    if hashlib.sha256(body).digest() != sha256:
        raise ManifestError("damaged: the body has another SHA-256")
    return body


def pack(value: Any) -> bytes:
    """Encode a value as msgpack."""
    body: bytes = msgpack.packb(value)
    return body


def unpack(body: bytes, longest: int) -> Any:
    """Decode untrusted msgpack bytes, with limits on every length.

    Args:
        body: The bytes.
        longest: The most bytes of a byte string.

    Returns:
        The value.

    Raises:
        ManifestError: A map has a key twice.
        Exception: The bytes are malformed; msgpack raises ten kinds of error.
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
        raise ManifestError("a map has a key twice")
    return found


def _pack_record(record: EntryRecord) -> dict[str, Any]:
    fields = dict(vars(record))
    fields["tensors"] = [[t.name, t.dtype, list(t.shape)] for t in record.tensors]
    return fields


def _unpack_record(fields: dict[str, Any]) -> EntryRecord:
    if not all(
        type(h) is str and _HEX64.fullmatch(h) for h in _typed(fields, "borrowed_sha256", list)
    ):
        raise ManifestError("borrowed_sha256: expected a list of SHA-256")
    shard: str = _typed(fields, "shard", str)
    if shard in ("", ".", "..") or "/" in shard or "\0" in shard:
        raise ManifestError("shard: expected a file name")
    return EntryRecord(
        shard,
        _hex(fields, "source_sha256"),
        _typed(fields, "source_size", int),
        tuple(fields["borrowed_sha256"]),
        _hex(fields, "task_sha256"),
        _hex(fields, "key"),
        _hex(fields, "digest", DIGEST_FORM),
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
        raise ManifestError(f"{name}: a dimension is negative, too large or not an integer")
    return TensorSpec(name, dtype, tuple(shape))


def _directory(fields: dict[str, Any]) -> str:
    path: bytes = _typed({"directory": b"", **fields}, "directory", bytes)
    if path and (not path.startswith(b"/") or b"\0" in path):
        raise ManifestError("directory: expected an absolute path")
    return os.fsdecode(path)


def _typed(fields: dict[str, Any], name: str, kind: type) -> Any:
    value = fields[name]
    if type(value) is not kind:
        raise ManifestError(f"{name}: expected {kind.__name__}, found {type(value).__name__}")
    return value


def _hex(fields: dict[str, Any], name: str, form: re.Pattern[str] = _HEX64) -> str:
    value: str = _typed(fields, name, str)
    if not form.fullmatch(value):
        raise ManifestError(f"{name}: expected a hex digest")
    return value
