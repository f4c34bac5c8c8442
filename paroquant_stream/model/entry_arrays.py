"""The MLX arrays of an entry, filled while the entry is written, so that nothing is read back."""

from __future__ import annotations

import threading
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
        self._tensors = [tensor for tensor in tensors if tensor.nbytes]
        self._empty = [tensor for tensor in tensors if not tensor.nbytes]
        self._starts = [tensor.start for tensor in self._tensors]
        self._left = sum(tensor.nbytes for tensor in self._tensors)
        self._lock, self._is_closed = threading.Lock(), False
        self._arrays = [threads.submit(self._allocate, tensor) for tensor in self._tensors]

    def _allocate(self, tensor: TensorInfo) -> mx.array | None:
        if self._is_closed:
            return None
        array = mx.zeros(tensor.shape, MLX_DTYPES[tensor.dtype])
        mx.eval(array)
        return array

    def put(self, offset: int, chunk: memoryview) -> None:
        """Copy bytes of one tensor into its array; without memory for arrays there are none.

        Args:
            offset: Of the first in the file of the entry.
            chunk: The bytes, as items of one byte.
        """
        number = bisect_right(self._starts, offset) - 1
        try:
            array = self._arrays[number].result()
        except Exception:  # of MLX, which has no class for a refused allocation
            array = None
        if array is None or self._is_closed:
            self.close()
            return
        start = offset - self._starts[number]
        into = np.frombuffer(cast(Any, array), np.uint8)[start : start + len(chunk)]
        into[:] = np.frombuffer(chunk, np.uint8)  # lets other threads run meanwhile
        with self._lock:
            self._left -= len(chunk)

    def close(self) -> None:
        """Allocate no more, and give away nothing."""
        self._is_closed = True
        for array in self._arrays:
            array.cancel()

    def take(self) -> dict[str, mx.array] | None:
        """Return the arrays by name once all bytes were put; None if some were not."""
        if self._left or self._is_closed:
            return None
        found = {}
        for tensor, future in zip(self._tensors, self._arrays, strict=True):
            array = future.result()
            assert array is not None  # its bytes were put
            found[tensor.name] = array
        for tensor in self._empty:
            found[tensor.name] = mx.zeros(tensor.shape, MLX_DTYPES[tensor.dtype])
        return found
