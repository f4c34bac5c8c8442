"""The rotation against its definition in float64, how each kernel is launched, and the chooser.

On the machine's default device: on a GPU the tests of the rotation test its kernel.
"""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np
import pytest

from paroquant_stream.rotation import cuda, kernels, metal, reference
from paroquant_stream.rotation.tables import RotationTables
from tests.helpers.rotations import (
    error,
    make_rotation,
    make_x,
    rotate_float64,
    tables_of,
    to_float64,
)

BOUNDS = {mx.float16: 1e-3, mx.bfloat16: 8e-3, mx.float32: 1e-6}


@pytest.mark.parametrize("krot", range(1, 17))
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_rotation_is_within_its_bound_of_float64(group_size, krot):
    dims = 3 * group_size
    parameters = make_rotation(dims, group_size, krot, seed=krot)
    tables = tables_of(parameters, group_size)
    for dtype, bound in BOUNDS.items():
        x = make_x((64, dims), dtype)
        expected = rotate_float64(to_float64(x), *parameters, group_size)
        for batch in (1, 64):
            y = kernels.rotate(x[:batch], tables)
            assert y.dtype == dtype
            assert y.shape == (batch, dims)
            assert error(y, expected[:batch]) < bound


def test_wrong_rotations_are_far_outside_the_bounds():
    """The bounds can tell: each wrong kernel is off by 0.1 or more, the loosest bound is 0.008."""
    theta, pairs, scales = make_rotation(384, 128, 8)
    x = make_x((64, 384))
    y = kernels.rotate(x, tables_of((theta, pairs, scales), 128))
    swapped = pairs.reshape(8, -1, 2)[..., ::-1].reshape(8, -1)
    wrong = {
        "skipped": rotate_float64(x, theta, pairs, scales, 128, rounds=[]),
        "no last round": rotate_float64(x, theta, pairs, scales, 128, rounds=range(7)),
        "rounds reversed": rotate_float64(x, theta, pairs, scales, 128, rounds=range(7, -1, -1)),
        "two rounds swapped": rotate_float64(
            x, theta, pairs, scales, 128, rounds=[0, 1, 2, 4, 3, 5, 6, 7]
        ),
        "angles negated": rotate_float64(x, -theta, pairs, scales, 128),
        "i and j exchanged": rotate_float64(x, theta, swapped, scales, 128),
        "pairs of another round": rotate_float64(x, theta, np.roll(pairs, 1, 0), scales, 128),
        "not scaled": rotate_float64(x, theta, pairs, np.ones_like(scales), 128),
        "scaled afterwards": rotate_float64(x, theta, pairs, np.ones_like(scales), 128)
        * scales.astype(np.float64),
    }
    for what, result in wrong.items():
        assert error(y, result) > 0.1, what
    assert error(y, rotate_float64(x, theta, pairs, scales, 128)) < 1e-6


def test_rotation_without_scales_keeps_the_norm_of_every_group():
    theta, pairs, scales = make_rotation(512, 64, 8)
    x = make_x((5, 512))
    y = kernels.rotate(x, tables_of((theta, pairs, np.ones_like(scales)), 64))
    norms = [np.linalg.norm(to_float64(a).reshape(5, 8, 64), axis=-1) for a in (x, y)]
    np.testing.assert_allclose(*norms, rtol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 70])
def test_rows_give_the_same_bits_alone_and_in_any_tile(rows):
    tables = tables_of(make_rotation(256, 64, 8), 64)
    x = make_x((rows, 256), mx.float16)
    together = kernels.rotate(x, tables)
    alone = [kernels.rotate(x[row : row + 1], tables) for row in range(rows)]
    assert together.shape == x.shape
    assert all(mx.array_equal(a, together[row]) for row, a in enumerate(y[0] for y in alone))


def test_leading_axes_are_kept():
    tables = tables_of(make_rotation(128, 32, 4), 32)
    x = make_x((2, 3, 5, 128))
    y = kernels.rotate(x, tables)
    assert mx.array_equal(y, kernels.rotate(x.reshape(-1, 128), tables).reshape(x.shape))


def test_x_of_another_width_is_refused_even_if_it_reshapes():
    tables = tables_of(make_rotation(256, 64, 2), 64)
    with pytest.raises(ValueError, match=r"over 256 channels, x has shape \(2, 128\)"):
        kernels.rotate(make_x((2, 128)), tables)


def test_parameters_that_do_not_belong_together_are_refused():
    theta, pairs, scales = (mx.array(values) for values in make_rotation(256, 64, 4))
    with pytest.raises(ValueError, match="do not belong together"):
        RotationTables(theta[:3], pairs, scales, 64)
    with pytest.raises(ValueError, match="do not belong together"):
        RotationTables(theta, pairs, scales[:, :128], 64)
    with pytest.raises(ValueError, match="groups of 96"):
        RotationTables(theta, pairs, scales, 96)


def test_a_round_that_names_a_channel_twice_is_refused_with_its_place():
    theta, pairs, scales = make_rotation(256, 64, 4)
    pairs[2, 64 * 3 + 5] = pairs[2, 64 * 3]
    with pytest.raises(ValueError, match="pairs of round 2, group 3"):
        kernels.prepare(tables_of((theta, pairs, scales), 64))


def test_scales_in_one_axis_and_bfloat16_parameters_work():
    theta, pairs, scales = (mx.array(values) for values in make_rotation(256, 64, 4))
    x = make_x((3, 256))
    flat = kernels.rotate(x, RotationTables(theta, pairs, scales.reshape(-1), 64))
    assert mx.array_equal(flat, kernels.rotate(x, RotationTables(theta, pairs, scales, 64)))
    brain = [theta.astype(mx.bfloat16), pairs, scales.astype(mx.bfloat16)]
    expected = rotate_float64(
        to_float64(x), to_float64(brain[0]), np.array(pairs), to_float64(brain[2]), 64
    )
    assert error(kernels.rotate(x, RotationTables(*brain, 64)), expected) < 1e-6


def test_more_channels_than_16_bits_can_number_work():
    theta, pairs, scales = make_rotation(1 << 17, 128, 1)
    x = make_x((1, 1 << 17))
    y = kernels.rotate(x, tables_of((theta, pairs, scales), 128))
    last = slice(-128, None)
    expected = rotate_float64(x[:, last], theta[:, -64:], pairs[:, last], scales[:, last], 128)
    assert error(y[:, last], expected) < 1e-6


@pytest.mark.usefixtures("on_the_cpu")
def test_tables_report_their_bytes_and_their_build_time():
    tables = tables_of(make_rotation(512, 128, 8), 128)
    assert (tables.nbytes, tables.build_seconds) == (0, 0.0)
    kernels.prepare(tables)
    assert tables.nbytes == 512 * (8 * (2 + 4 + 4) + 4)
    assert tables.build_seconds > 0
    built = tables.build_seconds
    kernels.rotate(make_x((1, 512)), tables)
    assert tables.build_seconds == built


def turn_tile(values, out, rows, group, group_size, coefficients):
    """What one threadgroup, or warp, does: all rounds of a group for some rows."""
    channels = slice(group * group_size, (group + 1) * group_size)
    mine = slice(group * group_size // 2, (group + 1) * group_size // 2)
    words, cos, sin = (np.array(table)[:, mine] for table in coefficients)
    area = values[rows, channels].copy()
    for word, c, s in zip(words, cos, sin, strict=True):
        i, j = word & 0xFFFF, word >> 16
        a, b = area[:, i].copy(), area[:, j].copy()
        area[:, i], area[:, j] = a * c + b * s, b * c - a * s
    out[rows, channels] = area


def on_a_pretended_gpu(monkeypatch, launches):
    """Runs the package's Metal kernel as numpy, launched as the package launches it."""

    def get_kernel(tile):
        def launch(*, inputs, output_shapes, output_dtypes, grid, threadgroup):
            x, words, cos, sin, scales, sizes = inputs
            rows, dims, krot, group_size = sizes.tolist()
            threads = group_size // 2
            assert threadgroup == (threads, 1, 1)
            assert words.dtype == sizes.dtype == mx.int32
            assert words.shape == cos.shape == sin.shape == (krot, dims // 2)
            assert scales.shape == (dims,)
            assert (rows, dims) == x.shape == output_shapes[0]
            launches.append((tile, grid))
            values, out = to_float64(x) * to_float64(scales), np.zeros((rows, dims))
            for block in range(grid[0] // threads):
                for group in range(grid[1]):
                    here = slice(block * tile, (block + 1) * tile)
                    turn_tile(values, out, here, group, group_size, (words, cos, sin))
            return [mx.array(out.astype(np.float32)).astype(output_dtypes[0])]

        return launch

    monkeypatch.setattr(metal, "on_metal", lambda: True)
    monkeypatch.setattr(metal, "package_kernel", lambda: get_kernel)


@pytest.mark.parametrize(("group_size", "krot"), [(32, 1), (64, 8), (128, 16)])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_metal_tables_and_launch_give_the_rotation(monkeypatch, group_size, krot, batch):
    """Simulated: the words, coefficients and grid are right; the kernel itself needs a Mac."""
    launches = []
    on_a_pretended_gpu(monkeypatch, launches)
    dims = 3 * group_size
    parameters = make_rotation(dims, group_size, krot)
    x = make_x((batch, dims), mx.float16)
    y = kernels.rotate(x, tables_of(parameters, group_size))
    assert error(y, rotate_float64(to_float64(x), *parameters, group_size)) < 1e-3
    tile = 1 if batch == 1 else 4
    assert launches == [(tile, (-(-batch // tile) * group_size // 2, 3, 1))]


@pytest.mark.usefixtures("on_the_cpu")
def test_tables_follow_the_device_of_each_call(monkeypatch):
    """Moving to another device after the first call adds that kernel's form."""
    tables = tables_of(make_rotation(256, 64, 4), 64)
    x = make_x((2, 256))
    before = kernels.rotate(x, tables)
    alone = tables.nbytes
    on_a_pretended_gpu(monkeypatch, [])
    assert error(kernels.rotate(x, tables), to_float64(before)) < 1e-6
    assert tables.nbytes == alone + 256 * (4 * (2 + 2 + 2) + 4)


@pytest.mark.usefixtures("on_the_cpu")
def test_without_a_gpu_the_reference_runs(monkeypatch):
    monkeypatch.setattr(metal, "rotate", None)
    monkeypatch.setattr(cuda, "rotate", None)
    tables = tables_of(make_rotation(256, 64, 4), 64)
    x = make_x((2, 256))
    assert mx.array_equal(kernels.rotate(x, tables), reference.rotate(x, tables))


@pytest.mark.usefixtures("on_the_cpu")
def test_without_the_paroquant_package_the_reference_runs(monkeypatch):
    monkeypatch.setattr(metal, "on_metal", lambda: True)
    monkeypatch.setitem(sys.modules, "paroquant.kernels.metal", None)
    metal.package_kernel.cache_clear()
    try:
        tables = tables_of(make_rotation(256, 64, 4), 64)
        assert not metal.usable(tables)
        x = make_x((2, 256))
        assert mx.array_equal(kernels.rotate(x, tables), reference.rotate(x, tables))
    finally:
        metal.package_kernel.cache_clear()


def test_the_installed_package_still_has_the_kernel_that_is_called(monkeypatch):
    """Its inputs by name and order, and its limits: a release that changes them fails here."""
    package = pytest.importorskip("paroquant.kernels.metal.rotation")
    made = {}
    monkeypatch.setattr(mx.fast, "metal_kernel", lambda **options: made.update(options))
    package.get_rotation_kernel.__wrapped__(4)
    assert made["input_names"] == [
        *("x", "packed_pairs", "cos_theta", "sin_theta", "channel_scales", "params")
    ]
    assert made["output_names"] == ["out"]
    limits = (package._MAX_GROUP_SIZE, package._MAX_KROT)
    assert limits == (metal.MAX_GROUP_SIZE, metal.MAX_KROT)
    assert metal.package_kernel() is package.get_rotation_kernel


def on_a_pretended_nvidia_gpu(monkeypatch, launches):
    """Runs the CUDA kernel's work as numpy, warp by warp as the kernel counts them."""

    def launch(*, inputs, template, output_shapes, output_dtypes, grid, threadgroup):
        x, words, cos, sin, scales = inputs
        constants = dict(template)
        group_size, tile = constants["GROUP"], constants["ROWS"]
        (rows, dims), (lanes, warps, _) = x.shape, threadgroup
        assert (lanes, words.dtype, x.dtype) == (32, mx.int32, constants["T"])
        assert words.shape == cos.shape == sin.shape == (constants["KROT"], dims // 2)
        assert scales.shape == (dims,)
        assert warps <= constants["WARPS"]
        assert (rows, dims) == output_shapes[0]
        launches.append((tile, grid))
        values, out = to_float64(x) * to_float64(scales), np.full((rows, dims), np.nan)
        for warp in range(grid[1]):
            for start in range(warp * tile, rows, grid[1] * tile):
                for group in range(grid[0] // lanes):
                    here = slice(start, start + tile)
                    turn_tile(values, out, here, group, group_size, (words, cos, sin))
        return [mx.array(out.astype(np.float32)).astype(output_dtypes[0])]

    monkeypatch.setattr(cuda, "on_cuda", lambda: True)
    monkeypatch.setattr(cuda, "_kernel", lambda: launch)


@pytest.mark.parametrize(("group_size", "krot"), [(32, 1), (64, 8), (128, 16)])
@pytest.mark.parametrize("batch", [1, 7, 64, 513])
def test_cuda_tables_and_launch_give_the_rotation(monkeypatch, group_size, krot, batch):
    """Simulated: tables, constants and grid are right; the kernel itself needs an NVIDIA GPU."""
    launches = []
    on_a_pretended_nvidia_gpu(monkeypatch, launches)
    dims = 3 * group_size
    parameters = make_rotation(dims, group_size, krot)
    x = make_x((batch, dims), mx.float16)
    y = kernels.rotate(x, tables_of(parameters, group_size))
    assert error(y, rotate_float64(to_float64(x), *parameters, group_size)) < 1e-3
    assert len(launches) == 1


@pytest.mark.parametrize("pretend", [on_a_pretended_gpu, on_a_pretended_nvidia_gpu])
def test_a_gpu_is_left_alone_beyond_its_kernels_limits_and_for_no_rows(monkeypatch, pretend):
    launches = []
    pretend(monkeypatch, launches)
    for group_size, krot in [(256, 8), (128, 17)]:
        parameters = make_rotation(512, group_size, krot)
        x = make_x((2, 512))
        y = kernels.rotate(x, tables_of(parameters, group_size))
        assert error(y, rotate_float64(to_float64(x), *parameters, group_size)) < 1e-6
    assert kernels.rotate(make_x((0, 512)), tables_of(make_rotation(512, 128, 8), 128)).size == 0
    assert launches == []


@pytest.mark.skipif(not cuda.on_cuda(), reason="needs an NVIDIA GPU as MLX's default device")
@pytest.mark.parametrize("krot", range(1, 17))
@pytest.mark.parametrize("group_size", [64, 128])
def test_the_cuda_kernel_is_within_its_bound_of_float64(group_size, krot):
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
