"""Operations on parts in memory."""

from __future__ import annotations

import numpy as np

from paroquant_stream.files.tensor_header import TensorSpec
from paroquant_stream.plan.task import Operation, Part
from paroquant_stream.transform.operations import run_operation


class Bytes:
    """A source with its parts in memory."""

    def __init__(self, arrays: dict[str, bytes], chunk: int = 100) -> None:
        self.arrays, self.chunk = arrays, chunk

    def whole(self, part, buffer=0):
        return self.arrays[part.name]

    def chunks(self, part, multiple=1):
        data = self.arrays[part.name]
        size = max(self.chunk // multiple, 1) * multiple
        for start in range(0, len(data), size):
            yield memoryview(data[start : start + size])


def part(name: str, dtype: str, shape: tuple[int, ...]) -> Part:
    size = TensorSpec(name, dtype, shape).nbytes
    return Part(name, dtype, shape, "a.safetensors", 0, size)


def results(operation: Operation, source: Bytes) -> list[bytes]:
    found = [b""] * len(operation.outputs)
    for index, chunk in run_operation(operation, source):
        found[index] += bytes(chunk)
    return found


def quantized(values: np.ndarray) -> list[bytes]:
    spec = part("e.weight", "F16", values.shape)
    outputs = tuple(TensorSpec(f"e.{leaf}", "U32", (1,)) for leaf in ("weight", "scales", "biases"))
    how = (("bits", 4), ("group_size", 64))
    return results(
        Operation("quantize", ((spec,),), outputs, how), Bytes({"e.weight": values.tobytes()})
    )
