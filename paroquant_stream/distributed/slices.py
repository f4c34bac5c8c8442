"""Slices of tensors along one axis: which one a rank of a group has, of an array in hand, and read
from a file as byte ranges.

A slice of rows of a stored matrix is one byte range, a slice of its columns one range a row.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..backends.dtypes import MLX_DTYPES
from ..errors import MalformedFileError
from ..files.descriptor import unreadable
from ..files.tensor_header import DTYPE_BYTES, TensorInfo

_PIECE = 64 << 10
"""Bytes below which a slice's pieces are not read one by one: the system reads ahead what lies
between them anyhow. Pieces of 7 KiB in lines of 14 take 0.22 s from the disk, whole lines 0.13.
"""
_CHUNK = 4 << 20  # bytes of whole lines read at a time


@dataclass(frozen=True)
class Slice:
    """Some ranges of one axis of a tensor, all of the others."""

    axis: int
    """Counted from the front."""
    ranges: tuple[tuple[int, int], ...]
    """Start and stop of each, in the order in which they stand side by side in the slice."""

    @property
    def length(self) -> int:
        """Items along the axis."""
        return sum(stop - start for start, stop in self.ranges)

    def widened(self, factor: int) -> Slice:
        """The same slice of a tensor that has `factor` items in the place of each."""
        return Slice(self.axis, tuple((a * factor, b * factor) for a, b in self.ranges))

    def of(self, array: mx.array) -> mx.array:
        """The slice of an array, lazy; once evaluated it does not keep the whole one alive."""
        before = (slice(None),) * self.axis
        pieces = [array[(*before, slice(*bounds))] for bounds in self.ranges]
        return mx.contiguous(pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, self.axis))


def rank_slice(
    shape: Sequence[int], axis: int, segments: int | Sequence[float], rank: int, count: int
) -> Slice:
    """What rank `rank` of `count` has of a tensor: its share of each segment of `axis`.

    `segments`: how many equal ones there are, or where one ends and the next begins, as item
    numbers (int) or as fractions of the axis (float), as in mlx's `shard_linear`.
    Raises ValueError when a segment does not divide.
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
    """The slice of a stored tensor, evaluated, the bits of `part.of(the whole one)`.

    Reads its bytes and no others, except between pieces of less than 64 KiB. Holds the slice twice
    for a moment. `label` names the file in errors. Raises UnreadableFileError, and MalformedFileError when
    the file ends too early.
    """
    size, shape = DTYPE_BYTES[tensor.dtype], list(tensor.shape)
    item = size * math.prod(shape[part.axis + 1 :])
    line = item * shape[part.axis]
    shape[part.axis] = part.length
    found = np.empty((math.prod(shape[: part.axis]), part.length * item), np.uint8)
    pieces = [(start * item, stop * item) for start, stop in part.ranges]
    if found.size and len(found) > 1 and min(b - a for a, b in pieces) < _PIECE:
        _cut_lines(fd, tensor.start, line, pieces, found, label)
    elif found.size:
        for number, into in enumerate(found):
            place = 0
            for start, stop in pieces:
                offset = tensor.start + number * line + start
                _read_into(fd, into[place : place + stop - start], offset, label)
                place += stop - start
    array = mx.array(found.view(f"u{size}").reshape(shape))  # numpy has no bfloat16
    array = array.view(MLX_DTYPES[tensor.dtype])
    mx.eval(array)
    return array


def _cut_lines(
    fd: int,
    offset: int,
    line: int,
    pieces: Sequence[tuple[int, int]],
    found: NDArray[np.uint8],
    label: str,
) -> None:
    """Fills each row of `found` with the pieces of a line of `line` bytes, lines read whole."""
    buffer = np.empty((max(1, _CHUNK // line), line), np.uint8)
    for first in range(0, len(found), len(buffer)):
        lines = buffer[: len(found) - first]
        _read_into(fd, lines.reshape(-1), offset + first * line, label)
        place = 0
        for start, stop in pieces:
            found[first : first + len(lines), place : place + stop - start] = lines[:, start:stop]
            place += stop - start


def _read_into(fd: int, into: NDArray[np.uint8], offset: int, label: str) -> None:
    """Fills `into`, contiguous and flat, with the bytes from `offset` on."""
    left = into.data
    while left:
        try:
            count = os.preadv(fd, [left], offset)
        except OSError as error:
            raise unreadable(label, error) from error
        if not count:
            raise MalformedFileError(
                f"{label}: ends {len(left):,} bytes before its header says it does"
            )
        left, offset = left[count:], offset + count
