"""The CUDA kernels: tables and launch simulated, sources emulated, results on an NVIDIA GPU."""

from __future__ import annotations

import mlx.core as mx
import pytest

from paroquant_stream.rotation import cuda, cuda_rows, kernels, reference
from paroquant_stream.rotation.cuda_rows import MANY_ROWS, ROW_GROUP_SIZES
from tests.helpers.emulation import Program, noticed, random_launch
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
    tile = 1 if batch < 32 else 4 if batch < MANY_ROWS else 16
    warps = min(4, -(-batch // tile))
    blocks = {1: 1, 7: 2, 32: 2, 64: 1, 513: 9}[batch]
    assert launches == [(tile, (32 * 3, warps * blocks, 1))]


LAUNCHES = [
    # group size, krot, rows, dtype
    *((64, 8, rows, mx.bfloat16) for rows in (1, 39, 127, 131)),
    *((128, 8, rows, mx.float16) for rows in (3, 128)),
    (128, 16, 161, mx.float32),
    (32, 1, 200, mx.float16),
]


def launched(*case):
    """A launch of the kernel for few rows."""
    return random_launch(*case, rotate=cuda.rotate_few)


def test_emulated_launches_are_within_their_bound_of_float64(tmp_path):
    """In each order the same bits, and those of a row do not depend on how many there are."""
    cases = [launched(*case) for case in LAUNCHES]
    program, first_rows = Program([launch for launch, _ in cases], tmp_path), {}
    for (launch, expected), (group_size, krot, _, dtype) in zip(cases, LAUNCHES, strict=True):
        y = program.run(launch)
        assert error(y, expected) < BOUNDS[dtype]
        assert all(mx.array_equal(program.run(launch, order), y) for order in (1, 2))
        assert mx.array_equal(first_rows.setdefault((group_size, krot), y[0]), y[0])


MUTATIONS = {
    "no barrier after the loads": ("    __syncwarp();\n#pragma", "#pragma"),
    "no barrier after a round": ("      __syncwarp();  // the", "      // the"),
    "warps share an area": ("y = area[threadIdx.y];", "y = area[0];"),
    "a round is left out": (
        "++k) {\n#pragma unroll\n      for",
        "k += 2) {\n#pragma unroll\n      for",
    ),
    "i for j": ("a = y[i], b = y[j]", "a = y[i], b = y[i]"),
    "the other direction": ("-a[r], s[k][n]", "a[r], s[k][n]"),
    "no scale": (" * channel_scales[channel]", ""),
    "the next tile is left out": ("row < rows; row += step", "row < step; row += step"),
}


@pytest.mark.slow
def test_every_mutation_of_the_kernel_is_noticed(tmp_path):
    cases = {}
    for what, (old, new) in MUTATIONS.items():
        assert old in cuda._SOURCE, what
        cases[what] = launched(64, 3, 531, mx.float32, cuda._SOURCE.replace(old, new))
    program = Program([launch for launch, _ in cases.values()], tmp_path)
    assert [
        w for w, (launch, expected) in cases.items() if not noticed(program, launch, expected)
    ] == []


@pytest.mark.skipif(not cuda.on_cuda(), reason="needs an NVIDIA GPU as MLX's default device")
@pytest.mark.parametrize("krot", range(1, 17))
@pytest.mark.parametrize("group_size", ROW_GROUP_SIZES)
def test_an_nvidia_gpu_is_within_its_bound_of_float64(monkeypatch, group_size, krot):
    dims = 5 * group_size
    parameters = make_rotation(dims, group_size, krot, seed=krot)
    tables = tables_of(parameters, group_size)
    assert cuda.usable(tables)
    for dtype, bound in BOUNDS.items():
        x = make_x((512, dims), dtype)
        expected = rotate_float64(to_float64(x), *parameters, group_size)
        for batch in (1, 7, 31, 32, MANY_ROWS - 1, MANY_ROWS, 500, 512):
            y = cuda.rotate(x[:batch], tables)
            assert mx.array_equal(cuda.rotate_few(x[:batch], tables), y)
            for fewest in (0, 1 << 60):  # tiles of 32 and of 16 rows
                monkeypatch.setattr(cuda_rows, "_FEWEST_TILES", fewest)
                assert mx.array_equal(cuda.rotate_many(x[:batch], tables), y)
            assert mx.array_equal(y[:1], cuda.rotate(x[:1], tables))
            assert (y.dtype, y.shape) == (dtype, (batch, dims))
            assert error(y, expected[:batch]) < bound
            assert error(reference.rotate(x[:batch], tables), expected[:batch]) < bound


@pytest.mark.skipif(not cuda.on_cuda(), reason="needs an NVIDIA GPU as MLX's default device")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("fewest", [0, 1 << 60], ids=["32 rows", "16 rows"])
def test_an_nvidia_gpu_rotates_many_tiles_and_slices(monkeypatch, dtype, fewest):
    monkeypatch.setattr(cuda_rows, "_FEWEST_TILES", fewest)
    tables = tables_of(make_rotation(640, 128, 8), 128)
    x = make_x((4099, 640), dtype)
    y = cuda.rotate_many(x, tables)
    assert mx.array_equal(y, cuda.rotate_few(x, tables))
    assert mx.array_equal(cuda.rotate_many(x[3:1000], tables), y[3:1000])
    inside = mx.concatenate([mx.zeros(1, dtype), x[:99].reshape(-1)])[1:].reshape(99, 640)
    assert mx.array_equal(cuda.rotate_many(inside, tables), y[:99])
