"""Every kind of operation is implemented and returns the bytes that MLX would have."""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np
import pytest

from paroquant_stream.errors import MissingExtraError, OutOfRangeError
from paroquant_stream.files.tensor_header import TensorSpec
from paroquant_stream.plan.task import Operation
from paroquant_stream.store.format import OPERATION_VERSIONS
from paroquant_stream.transform import operations
from tests.helpers.operations import Bytes, part, quantized, results


def test_every_kind_has_a_version_and_every_version_a_kind():
    assert operations._KINDS.keys() | operations._BY_COLUMNS.keys() == OPERATION_VERSIONS.keys()


def test_a_copy_has_the_same_bytes():
    spec = part("x", "BF16", (70, 3))
    data = np.random.default_rng(0).bytes(420)
    assert results(Operation("copy", ((spec,),), (spec,)), Bytes({"x": data})) == [data]


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("chunk", [1, 1000, 10**6])
def test_an_embedding_is_quantized_the_same_in_chunks(dtype, chunk):
    kind = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}[dtype]
    array = mx.array(np.random.default_rng(0).normal(size=(50, 128))).astype(kind)
    raw = array if dtype != "BF16" else array.view(mx.uint16)
    spec = part("e.weight", dtype, (50, 128))
    outputs = tuple(TensorSpec(f"e.{leaf}", "U32", (1,)) for leaf in ("weight", "scales", "biases"))
    values = (("bits", 4), ("group_size", 64))
    found = results(
        Operation("quantize", ((spec,),), outputs, values),
        Bytes({"e.weight": np.array(raw).tobytes()}, chunk),
    )
    for data, expected in zip(found, mx.quantize(array, 64, 4, stream=mx.cpu), strict=True):
        stored = expected.view(mx.uint16) if expected.dtype == mx.bfloat16 else expected
        assert data == np.array(stored).tobytes()


def test_mx_quantize_has_the_bits_of_existing_entries():
    """If MLX changes its rounding, entries of two MLX versions must not share a key."""
    import hashlib

    weight = mx.array(np.sin(np.arange(64 * 256, dtype=np.float32)).reshape(64, 256)).astype(
        mx.float16
    )
    digest = hashlib.sha256()
    for array in mx.quantize(weight, 128, 4, stream=mx.cpu):
        digest.update(np.array(array).tobytes())
    assert digest.hexdigest() == "f407f7d7fc595d8bbcac3dfea45890afa15fde1d2301f06c7fe4fb3462e54199"


def test_slices_of_a_stack_follow_each_other():
    one, two = part("a", "I16", (4,)), part("b", "I16", (4,))
    operation = Operation("copy", ((one,), (two,)), (TensorSpec("s", "I16", (2, 4)),))
    assert results(operation, Bytes({"a": b"11111111", "b": b"22222222"})) == [b"1111111122222222"]


COLUMNS = {
    "awq_biases": (("I32", 8), ("F16", 1)),
    "group_scales": (("F16", 1),),
    "native_biases": (("F16", 1),),
}
"""The dtypes of the parts of these kinds, and the columns of the output for one of a part."""


@pytest.mark.parametrize("together", [1, 700, 1 << 20])
@pytest.mark.parametrize("kind", COLUMNS)
def test_slices_side_by_side_have_the_bits_of_each_alone(kind, together, monkeypatch):
    random, rows, data, slices = np.random.default_rng(0), 3, {}, []
    for number, columns in enumerate((64, 64, 8, 32, 64)):
        parts = [
            part(f"{number} {n}", dtype, (rows, columns // share))
            for n, (dtype, share) in enumerate(COLUMNS[kind])
        ]
        for each in parts:
            numbers = random.integers(0, 1 << 30, each.shape, np.int32)
            values = random.normal(size=each.shape).astype(np.float16)
            data[each.name] = (numbers if each.dtype == "I32" else values).tobytes()
        slices.append(tuple(parts))
    outputs = (TensorSpec("x", "F16", (232, rows)),)
    alone = [results(Operation(kind, (each,), outputs), Bytes(data))[0] for each in slices]
    monkeypatch.setattr(operations, "_TOGETHER", together)  # private: how many at once
    assert results(Operation(kind, tuple(slices), outputs), Bytes(data)) == [b"".join(alone)]


@pytest.mark.parametrize(("values", "count"), [([1.0, 65520.0], 1), ([1.0, 65519.0], 0)])
def test_a_single_value_that_overflows_is_an_error(values, count):
    source = part("norm", "F32", (2,))
    operation = Operation("copy", ((source,),), (TensorSpec("norm", "F16", (2,)),), (), ("F32",))
    data = Bytes({"norm": np.array(values, np.float32).tobytes()})
    if not count:
        assert results(operation, data) == [np.array(values, np.float16).tobytes()]
        return
    with pytest.raises(OutOfRangeError, match=r"norm of a\.safetensors: 1 values are beyond"):
        results(operation, data)


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_an_embedding_with_a_value_that_is_not_finite_is_made_by_mlx(odd):
    values = np.ones((4, 64), np.float16)
    values[1, 3] = odd
    expected = mx.quantize(mx.array(values), 64, 4, stream=mx.cpu)
    assert quantized(values) == [np.array(array).tobytes() for array in expected]


def test_a_worker_without_an_mlx_backend_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        quantized(np.full((1, 64), np.inf, np.float16))
