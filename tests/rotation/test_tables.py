"""The parameters of a rotation: which are refused, and the tables that are built from them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from paroquant_stream.rotation import kernels
from paroquant_stream.rotation.tables import RotationTables
from tests.helpers.rotation_kernels import simulate_metal
from tests.helpers.rotations import (
    error,
    make_rotation,
    make_x,
    rotate_float64,
    tables_of,
    to_float64,
)


def test_shapes_that_contradict_each_other_are_refused():
    theta, pairs, scales = (mx.array(values) for values in make_rotation(256, 64, 4))
    with pytest.raises(ValueError, match="do not belong together"):
        RotationTables(theta[:3], pairs, scales, 64)
    with pytest.raises(ValueError, match="do not belong together"):
        RotationTables(theta, pairs, scales[:, :128], 64)
    with pytest.raises(ValueError, match="groups of 96"):
        RotationTables(theta, pairs, scales, 96)
    with pytest.raises(ValueError, match=r"groups of 1$"):
        RotationTables(theta, pairs, scales, 1)


def test_a_round_with_a_channel_twice_is_refused_with_its_place():
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


@pytest.mark.usefixtures("on_the_cpu")
def test_tables_follow_the_device_of_each_call(monkeypatch):
    """A call on another device adds the tables of its kernel."""
    tables = tables_of(make_rotation(256, 64, 4), 64)
    x = make_x((2, 256))
    before = kernels.rotate(x, tables)
    alone = tables.nbytes
    simulate_metal(monkeypatch, [])
    assert error(kernels.rotate(x, tables), to_float64(before)) < 1e-6
    assert tables.nbytes == alone + 256 * (4 * (2 + 2 + 2) + 4)
