"""The operations of a task: each kind converts the bytes of its parts, a slice at a time.

Every function yields `(index of the output, chunk)`; the chunks of one output come in order. The
kinds and their versions are in `store.format.OPERATION_VERSIONS`: a kind whose result changes needs
a higher version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import OutOfRangeError
from ..plan.task import Operation, Part
from .cast import LARGEST, cast
from .int5 import int5_biases, int5_codes, int5_stripes
from .quantize import is_finite, keeps_subnormals, quantize_rows
from .repack import (
    awq_biases,
    awq_stripes,
    group_scales,
    legacy_group_rows,
    legacy_weight,
    native_biases,
)
from .source import Source

Chunks = Iterator[tuple[int, memoryview]]
_TOGETHER = 1 << 20  # bytes that are converted by one call: about an L2 cache
_DTYPES = {
    "F16": np.float16,
    "F32": np.float32,
    "BF16": np.uint16,
    "I16": np.int16,
    "I32": np.uint32,
}


def run_operation(operation: Operation, source: Source) -> Chunks:
    """Compute the outputs of an operation, slice after slice.

    Args:
        operation: What is computed.
        source: Where its parts are read.

    Yields:
        The index of an output and its next bytes, valid until the next chunk.

    Raises:
        OutOfRangeError: A finite value would overflow in the dtype that it is cast to.
    """
    values = dict(operation.values)
    if function := _BY_COLUMNS.get(operation.kind):
        chunks = _by_columns(function, source, operation.slices)
    else:
        convert = _KINDS[operation.kind]
        chunks = (c for parts in operation.slices for c in convert(source, parts, values))
    for index, chunk in chunks:
        yield index, _cast(operation, index, chunk) if operation.made else chunk


def _cast(operation: Operation, index: int, chunk: memoryview) -> memoryview:
    """Cast a chunk to its output's dtype; a finite value that overflows is an OutOfRangeError."""
    output, made = operation.outputs[index], operation.made[index]
    if output.dtype == made:
        return chunk
    chunk, lost = cast(chunk, made, output.dtype)
    if lost:
        raise OutOfRangeError(
            f"{output.name} of {operation.slices[0][0].shard}: {lost} values are beyond "
            f"{LARGEST[output.dtype]:g}, the largest of {output.dtype}; they are stored as {made}, "
            "so choose another --dtype"
        )
    return chunk


def _array(source: Source, part: Part, buffer: int = 0) -> npt.NDArray[Any]:
    return np.frombuffer(source.whole(part, buffer), _DTYPES[part.dtype]).reshape(part.shape)


def _by_columns(
    function: Callable[..., npt.NDArray[Any]], source: Source, slices: Sequence[tuple[Part, ...]]
) -> Chunks:
    """Convert slices whose outputs are rows in the order of their columns.

    Those of experts are small, so many are put side by side and converted by one call.
    """
    size = sum(part.stop - part.start for part in slices[0])
    count = max(1, _TOGETHER // max(size, 1))
    for first in range(0, len(slices), count):
        some = slices[first : first + count]
        matrices = (_beside(source, parts, n) for n, parts in enumerate(zip(*some, strict=True)))
        yield 0, _bytes_of(function(*matrices))


def _beside(source: Source, parts: Sequence[Part], buffer: int) -> npt.NDArray[Any]:
    """Return the columns of several matrices, those of the first first."""
    if len(parts) == 1:
        return _array(source, parts[0], buffer)
    ends = list(accumulate(part.shape[1] for part in parts))
    joined = np.empty((parts[0].shape[0], ends[-1]), _DTYPES[parts[0].dtype])
    for part, end in zip(parts, ends, strict=True):
        joined[:, end - part.shape[1] : end] = _array(source, part)
    return joined


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")


def _copy(source: Source, parts: tuple[Part, ...], _: Mapping[str, int]) -> Chunks:
    for chunk in source.chunks(parts[0]):
        yield 0, chunk


def _awq_weight(source: Source, parts: tuple[Part, ...], _: Mapping[str, int]) -> Chunks:
    for stripe in awq_stripes(_array(source, parts[0])):
        yield 0, _bytes_of(stripe)


def _int5_weight(source: Source, parts: tuple[Part, ...], _: Mapping[str, int]) -> Chunks:
    qweight, plane = parts
    for stripe in int5_stripes(_array(source, qweight), _array(source, plane, buffer=1)):
        yield 0, _bytes_of(stripe)


def _int5_biases(source: Source, parts: tuple[Part, ...], _: Mapping[str, int]) -> Chunks:
    qzeros, plane, scales = parts
    zeros = int5_codes(_array(source, qzeros), _array(source, plane, buffer=1))
    yield 0, _bytes_of(int5_biases(_array(source, scales), zeros))


def _legacy_weight(source: Source, parts: tuple[Part, ...], _: Mapping[str, int]) -> Chunks:
    yield 0, _bytes_of(legacy_weight(_array(source, parts[0])))


def _legacy_rows(source: Source, parts: tuple[Part, ...], values: Mapping[str, int]) -> Chunks:
    """Convert scales or biases; the stored scaled_zeros are -scale * zero already."""
    yield 0, _bytes_of(group_scales(legacy_group_rows(_array(source, parts[0]), values["groups"])))


def _quantize(source: Source, parts: tuple[Part, ...], values: Mapping[str, int]) -> Chunks:
    """Quantize an embedding in chunks of rows; no group crosses a row, so the bits are the same."""
    part = parts[0]
    how = part.dtype, values["group_size"], values["bits"]
    for chunk in source.chunks(part, (part.stop - part.start) // part.shape[0]):
        stored = np.frombuffer(chunk, _DTYPES[part.dtype]).reshape(-1, part.shape[1])
        usual = how[2] in (4, 8) and is_finite(stored, part.dtype) and keeps_subnormals()
        for index, result in enumerate((quantize_rows if usual else _by_mlx)(stored, *how)):
            yield index, _bytes_of(result)


def _by_mlx(
    stored: npt.NDArray[Any], dtype: str, group_size: int, bits: int
) -> list[npt.NDArray[Any]]:
    """Quantize rows with values that are not finite, or where numpy lacks subnormal numbers."""
    from ..backends.mlx_core import check_mlx  # late: no other rows need MLX

    check_mlx()
    import mlx.core as mx

    weight = mx.array(stored)
    if dtype == "BF16":
        weight = weight.view(mx.bfloat16, stream=mx.cpu)
    results = list(mx.quantize(weight, group_size, bits, stream=mx.cpu))
    if dtype == "BF16":  # numpy has no bfloat16
        results[1:] = [result.view(mx.uint16, stream=mx.cpu) for result in results[1:]]
    mx.eval(results)
    return [np.array(result, copy=False) for result in results]


_KINDS: dict[str, Callable[[Source, tuple[Part, ...], Mapping[str, int]], Chunks]] = {
    "copy": _copy,
    "quantize": _quantize,
    "awq_weight": _awq_weight,
    "int5_weight": _int5_weight,
    "int5_biases": _int5_biases,
    "legacy_weight": _legacy_weight,
    "legacy_scales": _legacy_rows,
    "legacy_biases": _legacy_rows,
}
_BY_COLUMNS: dict[str, Callable[..., npt.NDArray[Any]]] = {
    "awq_biases": lambda zeros, scales: awq_biases(scales, zeros),
    "group_scales": group_scales,
    "native_biases": native_biases,
}
