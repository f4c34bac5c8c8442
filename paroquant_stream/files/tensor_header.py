"""Strict safetensors headers in, page-aligned safetensors files out.

    8 bytes N, little endian | N bytes JSON, padded with spaces | tensor bytes, no holes

`mx.load` accepts 18 kinds of malformed file that the safetensors library refuses, one of them a
heap overrun; so every header is checked here, in Python integers, before a byte is allocated or MLX
sees it. What is accepted here, the safetensors library accepts too.
"""

from __future__ import annotations

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
MAX_HEADER = 32 << 20  # bytes; 100,000 tensors take 14 MB
MAX_TENSORS = 100_000
MAX_DIM = 2**31 - 1  # MLX keeps a dimension in an int32
MAX_ELEMENTS = 2**48
MAX_RANK = 8
_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_MAX_INDEX = 65_535  # `load_weights` grows a list up to the largest number in a name


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, dtype and shape, wherever its bytes are."""

    name: str
    dtype: str
    """A safetensors dtype name, one of `DTYPE_BYTES`."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        count = DTYPE_BYTES[self.dtype]
        for dim in self.shape:
            count *= dim
        return count


@dataclass(frozen=True, slots=True)
class TensorInfo(TensorSpec):
    """A tensor in a file, at the absolute byte range `start:stop`."""

    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A validated header: the tensors in file order."""

    tensors: tuple[TensorInfo, ...]
    size: int
    """Bytes of the whole file."""
    metadata: dict[str, str]


def read_header(fd: int, label: str) -> Header:
    """The validated header of the safetensors file open at `fd`.

    `label` names the file in errors. Raises MalformedFileError with the first rule that is broken.
    """

    def read(start: int, length: int) -> bytes:
        return pread_exactly(fd, start, length, label)

    return parse_header(read, file_status(fd, label).st_size, label)


def parse_header(read: Callable[[int, int], bytes], size: int, label: str) -> Header:
    """The validated header of a file of `size` bytes, wherever they are.

    `read(start, length)` gives bytes of its beginning. Raises MalformedFileError.
    """
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
    if text.count(b'":') > 4 * MAX_TENSORS + 1000:  # parsed, 400,000 tensors take 300 MB
        raise MalformedFileError(f"{label}: over the limit of {MAX_TENSORS:,} tensors")
    table = strict_json(text.rstrip(b" "), label)
    metadata = table.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # null is what mx.save_safetensors writes
    if type(metadata) is not dict or not all(type(v) is str for v in metadata.values()):
        raise MalformedFileError(f"{label}: __metadata__ is not a map of strings")
    if len(table) > MAX_TENSORS:
        raise MalformedFileError(
            f"{label}: {len(table):,} tensors, over the limit of {MAX_TENSORS:,}"
        )
    tensors = [_tensor(name, entry, 8 + length, label) for name, entry in table.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_coverage(tensors, 8 + length, size, label)
    return Header(tuple(tensors), size, metadata)


def _tensor(name: str, entry: Any, data_start: int, label: str) -> TensorInfo:
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
        if type(dim) is not int or not 0 <= dim <= MAX_DIM:  # bool is an int in Python, not here
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
    """Raises MalformedFileError unless `name` is a dotted path of plain words."""
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
            f"{label}: {name[:80]!r} is no tensor name (dotted words of A-Z a-z 0-9 _ -)"
        )


def _check_coverage(tensors: Sequence[TensorInfo], start: int, size: int, label: str) -> None:
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
