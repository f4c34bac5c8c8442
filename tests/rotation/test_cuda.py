"""The CUDA kernel: its tables and launch simulated, its results on an NVIDIA GPU."""

from __future__ import annotations

import mlx.core as mx
import pytest

from paroquant_stream.rotation import cuda, kernels, reference
from tests.helpers.rotation_kernels import simulate_cuda
from tests.helpers.rotations import (
    BOUNDS,
    error,
    make_rotation,
    make_x,
    rotate_float64,
    tables_of,
    to_float64,
)


@pytest.mark.parametrize(("group_size", "krot"), [(32, 1), (64, 8), (128, 16)])
@pytest.mark.parametrize("batch", [1, 7, 32, 64, 513])
def test_tables_and_launch_compute_the_rotation(monkeypatch, group_size, krot, batch):
    """Simulated: tables, constants and grid are right; the kernel itself needs an NVIDIA GPU."""
    launches = []
    simulate_cuda(monkeypatch, launches)
    dims = 3 * group_size
    parameters = make_rotation(dims, group_size, krot)
    x = make_x((batch, dims), mx.float16)
    y = kernels.rotate(x, tables_of(parameters, group_size))
    assert error(y, rotate_float64(to_float64(x), *parameters, group_size)) < 1e-3
    tile = 1 if batch < 32 else 4
    warps = min(4, -(-batch // tile))
    blocks = {1: 1, 7: 2, 32: 2, 64: 4, 513: 8}[batch]  # from 8 on each warp takes up to four tiles
    assert launches == [(tile, (32 * 3, warps * blocks, 1))]


@pytest.mark.skipif(not cuda.on_cuda(), reason="needs an NVIDIA GPU as MLX's default device")
@pytest.mark.parametrize("krot", range(1, 17))
@pytest.mark.parametrize("group_size", [64, 128])
def test_an_nvidia_gpu_is_within_its_bound_of_float64(group_size, krot):
    dims = 5 * group_size
    parameters = make_rotation(dims, group_size, krot, seed=krot)
    tables = tables_of(parameters, group_size)
    assert cuda.usable(tables)
    for dtype, bound in BOUNDS.items():
        x = make_x((512, dims), dtype)
        expected = rotate_float64(to_float64(x), *parameters, group_size)
        for batch in (1, 7, 64, 512):
            y = cuda.rotate(x[:batch], tables)
            assert (y.dtype, y.shape) == (dtype, (batch, dims))
            assert error(y, expected[:batch]) < bound
            assert error(reference.rotate(x[:batch], tables), expected[:batch]) < bound
