"""Strict reading of safetensors headers.

    8 bytes N, little endian | N bytes JSON, padded with spaces | tensor bytes, no holes

`mx.load` accepts malformed files that the safetensors library refuses, one kind of which overruns
the heap. So every header is validated here, in Python integers, before memory is allocated for it
or MLX opens the file. The safetensors library accepts every file that is accepted here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import MalformedFileError
from .descriptor import file_status, pread_exactly
from .strict_json import strict_json

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8,
}  # fmt: skip
MAX_HEADER = 32 << 20  # bytes; over twice what MAX_TENSORS need
MAX_TENSORS = 100_000
MAX_DIM = 2**31 - 1  # MLX stores a dimension in an int32
MAX_ELEMENTS = 2**48
MAX_RANK = 8
_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_MAX_INDEX = 65_535  # `load_weights` allocates a list as long as the largest index in a name


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, dtype and shape."""

    name: str
    dtype: str
    """A safetensors dtype, a key of `DTYPE_BYTES`."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensor."""
        count = DTYPE_BYTES[self.dtype]
        for dim in self.shape:
            count *= dim
        return count


@dataclass(frozen=True, slots=True)
class TensorInfo(TensorSpec):
    """A tensor in a file."""

    start: int
    """Position of its first byte in the file."""
    stop: int
    """Position after its last byte."""


@dataclass(frozen=True)
class Header:
    """A validated header."""

    tensors: tuple[TensorInfo, ...]
    """In file order."""
    size: int
    """Bytes of the whole file."""
    metadata: dict[str, str]
    sha256: bytes = b""
    """Of its own bytes, length and JSON."""


def read_header(fd: int, label: str) -> Header:
    """Read and validate the header of an open safetensors file.

    Args:
        fd: The file.
        label: The name of the file in errors.

    Raises:
        MalformedFileError: The file breaks a rule; names the first one.
        UnreadableFileError: The operating system cannot read it.
    """

    def read(start: int, length: int) -> bytes:
        return pread_exactly(fd, start, length, label)

    return parse_header(read, file_status(fd, label).st_size, label)


def read_header_bytes(fd: int, label: str) -> bytes:
    """Read the bytes of the header of a safetensors file, length and JSON, without validating them.

    Args:
        fd: The file.
        label: The name of the file in errors.

    Raises:
        MalformedFileError: The file ends before the header does.
        UnreadableFileError: The operating system cannot read it.
    """
    length = int.from_bytes(pread_exactly(fd, 0, 8, label), "little")
    if length > MAX_HEADER:
        raise MalformedFileError(f"{label}: a header length of {length:,}; download it again")
    return pread_exactly(fd, 0, 8 + length, label)


def parse_header(read: Callable[[int, int], bytes], size: int, label: str) -> Header:
    """Validate the header of a safetensors file that any function can read.

    Args:
        read: Called with a position and a length; returns those bytes of the file.
        size: Bytes of the whole file.
        label: The name of the file in errors.

    Raises:
        MalformedFileError: The file breaks a rule; names the first one.
    """
    text = _read_json(read, size, label)
    table, data_start = strict_json(text.rstrip(b" "), label), 8 + len(text)
    metadata = table.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # mx.save_safetensors writes null
    if type(metadata) is not dict or not all(type(v) is str for v in metadata.values()):
        raise MalformedFileError(f"{label}: __metadata__ is not a map of strings")
    if len(table) > MAX_TENSORS:
        raise MalformedFileError(
            f"{label}: {len(table):,} tensors, over the limit of {MAX_TENSORS:,}"
        )
    tensors = [_tensor(name, entry, data_start, label) for name, entry in table.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_coverage(tensors, data_start, size, label)
    sha256 = hashlib.sha256(len(text).to_bytes(8, "little") + text).digest()
    return Header(tuple(tensors), size, metadata, sha256)


def _read_json(read: Callable[[int, int], bytes], size: int, label: str) -> bytes:
    """Return the JSON text of a header; raise MalformedFileError unless its length fits."""
    if size < 10:
        raise MalformedFileError(
            f"{label}: expected a safetensors file, found {size} bytes; download it again"
        )
    length = int.from_bytes(read(0, 8), "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        start = read(0, min(size, 40))
        hint = (
            "a Git LFS pointer; run `git lfs pull`"
            if start.startswith(b"version https://git-lfs")
            else (f"a header length of {length:,} in a file of {size:,} bytes; download it again")
        )
        raise MalformedFileError(f"{label}: expected a safetensors header, found {hint}")
    text = read(8, length)
    if len(text) != length:
        raise MalformedFileError(f"{label}: ends inside its header")
    if not text.startswith(b"{"):
        raise MalformedFileError(f"{label}: the header does not start with '{{'")
    if text.count(b'":') > 4 * MAX_TENSORS + 1000:  # before parsing, which needs far more memory
        raise MalformedFileError(f"{label}: over the limit of {MAX_TENSORS:,} tensors")
    return text


def _tensor(name: str, entry: Any, data_start: int, label: str) -> TensorInfo:
    """Validate one tensor of the header."""
    where = f"{label}: tensor {name[:80]!r}"
    check_name(name, label)
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedFileError(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPE_BYTES:
        raise MalformedFileError(
            f"{where}: unsupported dtype {str(dtype)[:20]!r}; known: {', '.join(DTYPE_BYTES)}"
        )
    if type(shape) is not list or len(shape) > MAX_RANK:
        raise MalformedFileError(f"{where}: shape is not a list of at most {MAX_RANK} dimensions")
    elements = 1
    for dim in shape:
        if type(dim) is not int or not 0 <= dim <= MAX_DIM:  # excludes bool
            raise MalformedFileError(f"{where}: bad dimension {str(dim)[:30]} in its shape")
        elements *= dim or 1
    if elements > MAX_ELEMENTS:
        raise MalformedFileError(f"{where}: shape {shape} has over 2**48 elements")
    if type(offsets) is not list or len(offsets) != 2 or not all(type(o) is int for o in offsets):
        raise MalformedFileError(f"{where}: data_offsets is not two integers")
    info = TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
    if offsets[0] < 0 or info.stop - info.start != info.nbytes:
        raise MalformedFileError(
            f"{where}: {dtype} {shape} needs {info.nbytes} bytes, data_offsets are {offsets}"
        )
    return info


def check_name(name: str, label: str) -> None:
    """Check that a tensor name is a dotted path of plain words.

    Args:
        name: The tensor's name.
        label: The name of the file in errors.

    Raises:
        MalformedFileError: The name has other characters, or is too long or too deep.
    """
    parts = name.split(".")
    if (
        len(name) > 256
        or len(parts) > 24
        or not _NAME.fullmatch(name)
        or any(
            part.startswith("__") or (part.isdigit() and int(part) > _MAX_INDEX) for part in parts
        )
    ):
        raise MalformedFileError(
            f"{label}: {name[:80]!r} is not a tensor name (dotted words of A-Z a-z 0-9 _ -)"
        )


def _check_coverage(tensors: Sequence[TensorInfo], start: int, size: int, label: str) -> None:
    """Raise MalformedFileError unless sorted tensors fill the file from `start` without holes."""
    for tensor in tensors:
        if tensor.start != start:
            kind = "a hole" if tensor.start > start else "an overlap"
            raise MalformedFileError(
                f"{label}: {kind} before tensor {tensor.name!r} (byte {tensor.start:,})"
            )
        start = tensor.stop
    if start != size:
        raise MalformedFileError(
            f"{label}: the header describes {start:,} bytes, the file has {size:,}; "
            "download it again"
        )
