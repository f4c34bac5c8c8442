"""The Metal source of a launch, as MLX gives it to Metal's compiler, and the buffers of it.

MLX generates it on machines without Metal too, when a function that calls the kernel is exported.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import IO, Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from paroquant_stream.rotation import cuda, metal
from paroquant_stream.rotation.tables import RotationTables

Rotate = Callable[[mx.array, RotationTables], mx.array]
_PARAMETER = re.compile(r"^ +(.*?)([&*]?) (\w+) \[\[(?:buffer\((\d+)\)|(\w+))\]\](?:,|\) \{)$")


@dataclass(frozen=True)
class Parameter:
    """A parameter of the generated function: a buffer with its number, or an attribute."""

    kind: str
    pointer: str
    name: str
    buffer: int | None


@dataclass(frozen=True)
class Launch:
    """A call of a kernel: its source as MLX generates it, and what it was called with."""

    source: str
    inputs: tuple[np.ndarray, ...]
    shape: tuple[int, ...]
    dtype: mx.Dtype
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]

    @property
    def buffers(self) -> list[np.ndarray]:
        """The inputs as MLX binds them: each array, then its shape where the source asks for it."""
        buffers: list[np.ndarray] = []
        inputs, current = iter(self.inputs), np.empty(0)
        for parameter in parameters_of(self.source):
            if parameter.name == "out" or parameter.buffer is None:
                break
            if parameter.name.endswith("_shape"):
                buffers.append(np.array(current.shape, np.int32))
            else:
                current = next(inputs)
                buffers.append(current)
        assert next(inputs, None) is None
        return buffers


def parameters_of(source: str) -> list[Parameter]:
    """The parameters of the generated function, in order."""
    found = []
    for line in source[source.index("[[kernel]] void") :].splitlines()[1:]:
        match = _PARAMETER.match(line)
        assert match, line
        kind, pointer, name, number, _ = match.groups()
        found.append(Parameter(kind, pointer, name, int(number) if number else None))
        if line.endswith("{"):
            break
    numbers = [parameter.buffer for parameter in found if parameter.buffer is not None]
    assert numbers == list(range(len(numbers)))
    return found


def launch_of(x: mx.array, tables: RotationTables) -> Launch:
    """Record what `metal.rotate` launches for these rows."""
    with _generating():
        kernel = metal._kernel()  # private: MLX's own function
    with mock.patch.object(metal, "_is_right", return_value=True):
        return _recorded(metal, metal.rotate, kernel, x, tables)


def cuda_launch_of(
    x: mx.array, tables: RotationTables, source: str | None = None, rotate: Rotate = cuda.rotate
) -> Launch:
    """Record what a function launches, its body in MLX's Metal wrapper (emulated_cuda.h).

    Args:
        x: The rows.
        tables: Of the rotation.
        source: Another body.
        rotate: The function, of `cuda`.
    """

    def described(**options: Any) -> Any:
        options["source"] = source or options["source"]
        return described_kernel(**options, header='#include "emulated_cuda.h"\n')

    def kernel(**options: Any) -> Any:
        with mock.patch.object(mx.fast, "cuda_kernel", described):
            return make("UNROLL" in dict(options["template"]))(**options)

    make = cuda._kernel.__wrapped__
    return _recorded(cuda, rotate, kernel, x, tables)


def _recorded(
    module: ModuleType, rotate: Rotate, kernel: Any, x: mx.array, tables: RotationTables
) -> Launch:
    """Record a launch of a module's function."""
    made: dict[str, Any] = {}

    def record(**options: Any) -> Any:
        made.update(options)
        return kernel(**options, verbose=True)

    with mock.patch.object(module, "_kernel", return_value=record):
        source = generated(lambda: rotate(x, tables))
    (shape,), (dtype,) = made["output_shapes"], made["output_dtypes"]
    inputs = tuple(map(bits_of, (x.reshape(shape), *made["inputs"][1:])))
    return Launch(source, inputs, shape, dtype, made["grid"], made["threadgroup"])


def generated(call: Callable[[], Any]) -> str:
    """Return what MLX prints of the kernel that `call` launches; skip where it prints nothing."""
    with tempfile.TemporaryFile() as text:
        with _generating(), _printed_to(text):
            mx.export_function(lambda _: None, lambda x: (call(), x)[1], mx.zeros(1))
        text.seek(0)
        return text.read().decode().split("```\n")[1]


def described_kernel(**options: Any) -> Any:
    """Return MLX's function for a Metal kernel; skip where it makes none."""
    with _generating():
        return mx.fast.metal_kernel(**options)


@contextmanager
def _generating() -> Iterator[None]:
    """Skip the test where MLX refuses without Metal to generate a source."""
    try:
        yield
    except RuntimeError as error:
        if "No Metal back-end" not in str(error):
            raise
        pytest.skip("this MLX generates no source without Metal; 0.32.4 does")


@contextmanager
def _printed_to(file: IO[bytes]) -> Iterator[None]:
    """Send what C++ prints to a file."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(file.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def bits_of(array: mx.array) -> np.ndarray:
    """The array in numpy, bfloat16 as uint16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def array_of(bits: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Return the array that has these bits."""
    return mx.array(bits).view(dtype)
