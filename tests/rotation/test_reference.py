"""The reference in plain MLX operations."""

from __future__ import annotations

import mlx.core as mx
import pytest

from paroquant_stream.rotation import reference
from tests.helpers.rotations import error, make_rotation, make_x, rotate_float64, tables_of

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.mark.parametrize(("dims", "dtype"), [(1 << 16, mx.uint16), (1 << 17, mx.uint32)])
def test_every_channel_can_be_numbered(dims, dtype):
    theta, pairs, scales = make_rotation(dims, 128, 1)
    tables = tables_of((theta, pairs, scales), 128)
    assert tables.for_kernel(reference.Tables).partner[0].dtype == dtype
    x = make_x((1, dims))
    y = reference.rotate(x, tables)
    last = slice(-128, None)
    expected = rotate_float64(x[:, last], theta[:, -64:], pairs[:, last], scales[:, last], 128)
    assert error(y[:, last], expected) < 1e-6


@pytest.mark.parametrize(("rows", "passes"), [(32, [32]), (33, [32, 1]), (70, [32, 32, 6])])
def test_a_cpu_takes_rows_in_passes_that_fit_its_cache(monkeypatch, rows, passes):
    taken = []
    real = reference._rotate_rows  # private: the size of a pass shows nowhere else
    monkeypatch.setattr(
        reference, "_rotate_rows", lambda x, tables: taken.append(len(x)) or real(x, tables)
    )
    parameters = make_rotation(128, 64, 4)
    x = make_x((rows, 128))
    y = reference.rotate(x, tables_of(parameters, 64))
    assert taken == passes
    assert error(y, rotate_float64(x, *parameters, 64)) < 1e-6


def test_all_arrays_are_listed():
    tables = tables_of(make_rotation(128, 64, 4), 64).for_kernel(reference.Tables)
    assert len(tables.arrays) == 1 + 3 * 4
