"""The rotation against its definition in float64, and the choice of the kernel.

Runs on the machine's default device, so on a GPU these tests test its kernel.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from paroquant_stream.rotation import cuda, kernels, metal, reference
from tests.helpers.rotation_kernels import simulate_cuda, simulate_metal
from tests.helpers.rotations import (
    BOUNDS,
    error,
    make_rotation,
    make_x,
    rotate_float64,
    tables_of,
    to_float64,
)


@pytest.mark.parametrize(
    "krot",
    [n if n in (1, 2, 7, 8, 16) else pytest.param(n, marks=pytest.mark.slow) for n in range(1, 17)],
)
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
    """Each wrong rotation is off by at least 0.1; the loosest bound is 0.008."""
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


def test_without_scales_the_norm_of_every_group_is_kept():
    theta, pairs, scales = make_rotation(512, 64, 8)
    x = make_x((5, 512))
    y = kernels.rotate(x, tables_of((theta, pairs, np.ones_like(scales)), 64))
    norms = [np.linalg.norm(to_float64(a).reshape(5, 8, 64), axis=-1) for a in (x, y)]
    np.testing.assert_allclose(*norms, rtol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 70])
def test_rows_have_the_same_bits_alone_and_in_any_tile(rows):
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


@pytest.mark.usefixtures("on_the_cpu")
def test_without_a_gpu_the_reference_runs(monkeypatch):
    monkeypatch.setattr(metal, "rotate", None)
    monkeypatch.setattr(cuda, "rotate", None)
    tables = tables_of(make_rotation(256, 64, 4), 64)
    x = make_x((2, 256))
    assert mx.array_equal(kernels.rotate(x, tables), reference.rotate(x, tables))


@pytest.mark.parametrize(
    ("simulate", "limits"), [(simulate_metal, [(4096, 1)]), (simulate_cuda, [(256, 8), (128, 17)])]
)
def test_a_gpu_is_not_used_beyond_its_limits_or_without_rows(monkeypatch, simulate, limits):
    launches = []
    simulate(monkeypatch, launches)
    for group_size, krot in limits:
        parameters = make_rotation(4096, group_size, krot)
        x = make_x((2, 4096))
        y = kernels.rotate(x, tables_of(parameters, group_size))
        assert error(y, rotate_float64(to_float64(x), *parameters, group_size)) < 1e-6
    assert kernels.rotate(make_x((0, 512)), tables_of(make_rotation(512, 128, 8), 128)).size == 0
    assert launches == []
