"""The MLX arrays of an entry, filled while the entry is written, so that nothing is read back."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..backends.dtypes import MLX_DTYPES
from ..files.tensor_header import TensorInfo


class EntryArrays:
    """Arrays whose memory is written through the buffer protocol, on the CPU."""

    def __init__(self, tensors: Sequence[TensorInfo], threads: Executor) -> None:
        """Begin to allocate the arrays.

        Args:
            tensors: Of the entry, in file order.
            threads: Allocate them, as MLX starts a thread for each that evaluates.

        Raises:
            RuntimeError: The system starts no more threads.
        """
        self._tensors = tensors
        self._starts = [tensor.start for tensor in tensors]
        self._put: list[int] = []  # bytes, an item for each chunk: no count that threads share
        self.is_closed = False
        """Whether there will be no arrays, as the memory was refused or nobody wants them."""
        self._arrays = [threads.submit(_allocate, tensor) for tensor in tensors]

    def put(self, offset: int, chunk: memoryview) -> None:
        """Copy bytes of one tensor into its array; without memory for arrays there are none.

        Args:
            offset: Of the first in the file of the entry.
            chunk: The bytes, as items of one byte.
        """
        number = bisect_right(self._starts, offset) - 1  # an empty tensor stands before this one
        if self.is_closed:
            return
        try:
            array = self._arrays[number].result()
        except Exception:  # of MLX, which has no class for a refused allocation; or just closed
            self.close()
            return
        start = offset - self._starts[number]
        into = np.frombuffer(cast(Any, array), np.uint8)[start : start + len(chunk)]
        into[:] = np.frombuffer(chunk, np.uint8)  # lets other threads run meanwhile
        self._put.append(len(chunk))

    def close(self) -> None:
        """Allocate no more, free what was allocated, and give away nothing."""
        self.is_closed = True
        arrays, self._arrays = self._arrays, []
        for array in arrays:
            array.cancel()

    def take(self) -> dict[str, mx.array] | None:
        """Return the arrays by name once all bytes were put; None if some were not."""
        if self.is_closed or sum(self._put) < sum(tensor.nbytes for tensor in self._tensors):
            return None
        pairs = zip(self._tensors, self._arrays, strict=True)
        return {tensor.name: array.result() for tensor, array in pairs}


def _allocate(tensor: TensorInfo) -> mx.array:
    array = mx.zeros(tensor.shape, MLX_DTYPES[tensor.dtype])
    mx.eval(array)
    return array
