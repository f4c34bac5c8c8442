"""Slices of tensors along one axis: the one of a rank, cut from an array or read from a file.

A slice of the rows of a stored matrix is one byte range; a slice of its columns is one byte range
in each row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..backends.dtypes import MLX_DTYPES
from ..errors import MalformedFileError
from ..files.descriptor import read_some, unreadable
from ..files.tensor_header import DTYPE_BYTES, TensorInfo

_MIN_PIECE = 64 << 10
"""Bytes; smaller pieces are read together with what lies between them, which the system's readahead
reads anyway.
"""
_CHUNK = 4 << 20  # bytes of whole rows read at a time


@dataclass(frozen=True)
class Slice:
    """Some ranges of one axis of a tensor, and all of the other axes."""

    axis: int
    """From 0."""
    ranges: tuple[tuple[int, int], ...]
    """Start and stop of each range, in the order of the slice."""

    @property
    def length(self) -> int:
        """The number of items along the axis."""
        return sum(stop - start for start, stop in self.ranges)

    def scaled(self, factor: int) -> Slice:
        """Return the same slice of a tensor with `factor` items for each item of this one."""
        return Slice(self.axis, tuple((a * factor, b * factor) for a, b in self.ranges))

    def of(self, array: mx.array) -> mx.array:
        """Return the slice of an array, lazy; once evaluated it does not reference the array."""
        before = (slice(None),) * self.axis
        pieces = [array[(*before, slice(*bounds))] for bounds in self.ranges]
        return mx.contiguous(pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, self.axis))


def rank_slice(
    shape: Sequence[int], axis: int, segments: int | Sequence[float], rank: int, count: int
) -> Slice:
    """Compute a rank's slice of a tensor: its share of each segment of an axis.

    Args:
        shape: Of the tensor.
        axis: Which axis is divided; negative from the end.
        segments: How many equal segments the axis has, or the bounds between them, as item numbers
            (int) or fractions of the axis (float), as in mlx's `shard_linear`.
        rank: From 0.
        count: How many ranks there are.

    Raises:
        ValueError: A segment does not divide by the number of ranks.
    """
    axis %= len(shape)
    length = shape[axis]
    if isinstance(segments, int):
        if length % segments:
            raise ValueError(f"{length} along axis {axis} are not {segments} equal segments")
        inner = [length // segments * i for i in range(1, segments)]
    else:
        inner = [s if isinstance(s, int) else int(s * length) for s in segments]
    ranges = []
    for start, stop in pairwise([0, *inner, length]):
        share, left = divmod(stop - start, count)
        if left or share < 0:
            raise ValueError(f"{stop - start} along axis {axis} do not divide over {count} ranks")
        ranges.append((start + rank * share, start + (rank + 1) * share))
    return Slice(axis, tuple(ranges))


def read_slice(fd: int, tensor: TensorInfo, part: Slice, label: str) -> mx.array:
    """Read a slice of a stored tensor: the bits of `part.of` the whole tensor.

    Reads only the bytes of the slice, except between pieces of less than 64 KiB. Needs twice the
    memory of the slice.

    Args:
        fd: The file.
        tensor: Where it is in the file, its dtype and shape.
        part: Which slice.
        label: Names the file in errors.

    Returns:
        The slice, evaluated.

    Raises:
        UnreadableFileError: The system cannot read the file.
        MalformedFileError: The file ends too early.
    """
    size, shape = DTYPE_BYTES[tensor.dtype], list(tensor.shape)
    item = size * math.prod(shape[part.axis + 1 :])
    row = item * shape[part.axis]  # bytes
    shape[part.axis] = part.length
    found = np.empty((math.prod(shape[: part.axis]), part.length * item), np.uint8)
    pieces = [(start * item, stop * item) for start, stop in part.ranges]
    if found.size and len(found) > 1 and min(b - a for a, b in pieces) < _MIN_PIECE:
        _read_rows(fd, tensor.start, row, pieces, found, label)
    elif found.size:
        for number, into in enumerate(found):
            done = 0
            for start, stop in pieces:
                offset = tensor.start + number * row + start
                _read_into(fd, into[done : done + stop - start], offset, label)
                done += stop - start
    array = mx.array(found.view(f"u{size}").reshape(shape))  # numpy has no bfloat16
    array = array.view(MLX_DTYPES[tensor.dtype])
    mx.eval(array)
    return array


def _read_rows(
    fd: int,
    offset: int,
    row: int,
    pieces: Sequence[tuple[int, int]],
    found: NDArray[np.uint8],
    label: str,
) -> None:
    """Read whole rows of `row` bytes and copy their pieces to the rows of `found`."""
    buffer = np.empty((max(1, _CHUNK // row), row), np.uint8)
    for first in range(0, len(found), len(buffer)):
        rows = buffer[: len(found) - first]
        _read_into(fd, rows.reshape(-1), offset + first * row, label)
        done = 0
        for start, stop in pieces:
            found[first : first + len(rows), done : done + stop - start] = rows[:, start:stop]
            done += stop - start


def _read_into(fd: int, into: NDArray[np.uint8], offset: int, label: str) -> None:
    """Fill `into`, contiguous and flat, with the bytes from `offset` on."""
    left = into.data
    while left:
        try:
            count = read_some(fd, left, offset)
        except OSError as error:
            raise unreadable(label, error) from error
        if not count:
            raise MalformedFileError(
                f"{label}: ends {len(left):,} bytes before its header says it does"
            )
        left, offset = left[count:], offset + count
