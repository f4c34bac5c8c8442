"""The MLX dtypes of stored tensors."""

from __future__ import annotations

import mlx.core as mx
import pytest

from paroquant_stream.backends.dtypes import MLX_DTYPES
from paroquant_stream.files.tensor_header import DTYPE_BYTES, TensorSpec


@pytest.mark.parametrize("name", MLX_DTYPES)
def test_a_dtype_has_the_size_and_kind_of_the_stored_one(name):
    dtype = MLX_DTYPES[name]
    assert dtype.size == TensorSpec("x", name, (1,)).nbytes
    kinds = {"F": mx.floating, "BF": mx.floating, "U": mx.unsignedinteger, "I": mx.signedinteger}
    assert name == "BOOL" or mx.issubdtype(dtype, kinds[name.rstrip("0123456789")])


def test_mx_load_returns_these_dtypes(tmp_path):
    arrays = {name: mx.zeros(1, dtype) for name, dtype in MLX_DTYPES.items()}
    mx.save_safetensors(str(tmp_path / "x.safetensors"), arrays)
    loaded = mx.load(str(tmp_path / "x.safetensors"))
    assert {name: array.dtype for name, array in loaded.items()} == MLX_DTYPES


def test_every_dtype_that_a_file_may_have_is_known():
    assert MLX_DTYPES.keys() == DTYPE_BYTES.keys()
