"""The tables that the Metal and CUDA kernels share."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from paroquant_stream.rotation.packed import Tables
from paroquant_stream.rotation.tables import Rounds
from tests.helpers.rotations import make_rotation


def built(parameters, group_size):
    """Build the tables; return words, cosines and sines in numpy."""
    tables = Tables.build(Rounds.from_parameters(*map(mx.array, parameters), group_size))
    return np.array(tables.pairs), np.array(tables.cos), np.array(tables.sin)


def by_channel(i, j, cos, sin, group_size):
    """Each channel's partner, its own coefficient and the partner's, of every round."""
    start = np.arange(i.shape[1]) // (group_size // 2) * group_size
    found = np.empty((3, len(i), 2 * i.shape[1]))
    for own, other, sign in ((i + start, j + start, 1), (j + start, i + start, -1)):
        for table, values in zip(found, (other, cos, sign * sin), strict=True):
            np.put_along_axis(table, own, values, axis=1)
    return found


@pytest.mark.parametrize("group_size", [16, 30, 48, 96, 128, 512])
def test_the_pairs_and_coefficients_are_the_parameters(group_size):
    theta, pairs, scales = make_rotation(3 * group_size, group_size, 3)
    words, cos, sin = built((theta, pairs, scales), group_size)
    expected = np.cos(theta.astype(np.float64)), np.sin(theta.astype(np.float64))
    np.testing.assert_allclose(
        by_channel(words & 0xFFFF, words >> 16, cos, sin, group_size),
        by_channel(pairs[:, 0::2], pairs[:, 1::2], *expected, group_size),
        atol=1e-7,
    )


@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 512])
def test_neighbouring_pairs_are_in_different_halves(group_size):
    words, _, _ = built(make_rotation(5 * group_size, group_size, 9), group_size)
    half_of_i, half_of_j = words // 16 % 2, (words >> 16) // 16 % 2
    for half in (half_of_i, half_of_j):
        assert np.array_equal(half[:, 0::2] + half[:, 1::2], np.ones_like(half[:, 0::2]))


@pytest.mark.parametrize("i", [0, 16])
def test_pairs_of_one_kind_are_arranged(i):
    """Rounds without a pair of the other kind."""
    inside = [*range(16), *range(16, 32)]
    across = [channel for n in range(16) for channel in (n + i, n + 16 - i)]
    pairs = np.array([inside, across], np.int16)
    words, _, sin = built((np.full((2, 16), 0.5), pairs, np.ones(32)), 32)
    assert np.array_equal(words // 16 % 2, np.tile([0, 1], (2, 8)))
    assert np.array_equal(sin[1] > 0, (words[1] // 16 % 2 == 0) == (i == 0))
    assert np.all(sin[0] > 0)


def test_other_groups_keep_the_order_of_their_pairs():
    for group_size in (16, 48):
        theta, pairs, scales = make_rotation(192, group_size, 3)
        words, _, _ = built((theta, pairs, scales), group_size)
        assert words.dtype == np.int32
        assert np.array_equal(words & 0xFFFF, pairs[:, 0::2])
        assert np.array_equal(words >> 16, pairs[:, 1::2])


def test_the_tables_take_twelve_bytes_a_pair_and_round():
    theta, pairs, scales = make_rotation(256, 128, 3)
    tables = Tables.build(Rounds.from_parameters(*map(mx.array, (theta, pairs, scales)), 128))
    assert np.array_equal(np.array(tables.channel_scales), scales.astype(np.float32).reshape(-1))
    assert {array.dtype for array in tables.arrays} == {mx.int32, mx.float32}
    assert sum(array.nbytes for array in tables.arrays) == 256 * (3 * 2 * 3 + 4)
