"""The tables that the Metal and CUDA kernels share."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from paroquant_stream.rotation.packed import Tables
from paroquant_stream.rotation.tables import Rounds
from tests.helpers.rotations import make_rotation


def test_a_word_holds_channel_i_below_channel_j():
    theta, pairs, scales = make_rotation(256, 128, 3)
    tables = Tables.build(Rounds.from_parameters(*map(mx.array, (theta, pairs, scales)), 128))
    words = np.array(tables.pairs)
    assert words.dtype == np.int32
    assert np.array_equal(words & 0xFFFF, pairs[:, 0::2])
    assert np.array_equal(words >> 16, pairs[:, 1::2])


def test_the_coefficients_are_those_of_each_pair():
    theta, pairs, scales = make_rotation(256, 128, 3)
    tables = Tables.build(Rounds.from_parameters(*map(mx.array, (theta, pairs, scales)), 128))
    angles = theta.astype(np.float64)
    np.testing.assert_allclose(np.array(tables.cos), np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(np.array(tables.sin), np.sin(angles), atol=1e-7)
    assert np.array_equal(np.array(tables.channel_scales), scales.astype(np.float32).reshape(-1))
    assert {array.dtype for array in tables.arrays} == {mx.int32, mx.float32}
    assert sum(array.nbytes for array in tables.arrays) == 256 * (3 * 2 * 3 + 4)
