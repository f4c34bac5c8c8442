"""Repacking against a reference of one nibble at a time, and against the public loader."""

from __future__ import annotations

import numpy as np
import pytest
from paroquant.inference.backends.mlx import load as public

from paroquant_stream import repack

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
SHAPES = [(32, 8), (64, 64), (256, 1048), (2080, 56), (1056, 2056), (16, 8)]


def awq_packed(codes: np.ndarray) -> np.ndarray:
    """AutoAWQ's words of codes (rows, N)."""
    rows, outputs = codes.shape
    words = np.zeros((rows, outputs // 8), np.uint32)
    for nibble, output in enumerate(ORDER):
        words |= codes[:, output::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def mlx_packed(codes: np.ndarray) -> np.ndarray:
    """MLX's words of codes (N, K)."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for nibble in range(8):
        words |= codes[:, nibble::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def codes(rng, rows, columns) -> np.ndarray:
    return rng.integers(0, 16, (rows, columns), np.uint8)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_awq_weights_come_out_as_mlx_packs_them(rng, inputs, outputs):
    raw = codes(rng, inputs, outputs)
    packed = awq_packed(raw)
    weight = repack.awq_weight(packed)
    assert np.array_equal(weight, mlx_packed(raw.T))
    assert np.array_equal(weight, public._pack_mlx(public._unpack_and_reorder(packed).T))


def test_stripes_are_whole_rows_in_order_in_a_buffer_that_is_used_again(rng):
    packed = awq_packed(codes(rng, 32, 5000))
    stripes = []
    copies = []
    for stripe in repack.awq_stripes(packed):
        stripes.append(stripe)
        copies.append(stripe.copy())
    assert len(stripes) > 2
    assert all(stripe.shape[1] == 4 and len(stripe) <= 1024 for stripe in stripes)
    assert np.shares_memory(stripes[0], stripes[1])
    assert np.array_equal(np.concatenate(copies), repack.awq_weight(packed))


def test_inputs_that_no_group_size_allows_are_refused():
    with pytest.raises(ValueError, match="multiple of 16 inputs, found 24"):
        next(repack.awq_stripes(np.zeros((24, 8), np.int32)))


def test_zeros_are_unpacked_in_the_order_of_the_outputs(rng):
    raw = codes(rng, 3, 40)
    assert np.array_equal(repack.awq_zeros(awq_packed(raw)), raw)


def test_awq_scales_and_biases_have_the_public_loaders_bits(rng):
    raw, zeros = codes(rng, 64, 32), codes(rng, 2, 32)
    zeros[:, ::3] = 0
    scales = rng.uniform(-0.1, 0.1, (2, 32)).astype(np.float16)
    import mlx.core as mx

    weights = {
        "x.qweight": mx.array(awq_packed(raw)),
        "x.qzeros": mx.array(awq_packed(zeros)),
        "x.scales": mx.array(scales),
    }
    expected = public._convert_awq_linear(weights, "x.", 32)
    biases = repack.awq_biases(scales, awq_packed(zeros))
    assert biases.tobytes() == np.array(expected["biases"]).tobytes()
    assert repack.group_scales(scales).tobytes() == np.array(expected["scales"]).tobytes()


def test_a_zero_point_of_zero_gives_minus_zero():
    scales = np.full((1, 8), 0.5, np.float16)
    assert np.signbit(repack.awq_biases(scales, np.zeros((1, 1), np.int32))).all()
    assert np.signbit(repack.native_biases(np.zeros((1, 8), np.float16))).all()


def test_native_weights_are_the_same_bytes(rng):
    raw = codes(rng, 16, 64)
    packed = mlx_packed(raw).view(np.int16).reshape(4, 64)
    weight = repack.native_weight(packed)
    assert np.shares_memory(weight, packed)
    assert np.array_equal(weight, mlx_packed(raw))
    assert np.array_equal(weight, public._pack_mlx(public._unpack_int16_nibbles(packed)))


def legacy_packed(raw: np.ndarray) -> np.ndarray:
    """TinyChat's interleave of codes (N, K), one nibble at a time."""
    outputs, inputs = raw.shape
    slots = np.zeros_like(raw)
    for start in range(0, inputs, 32):
        for c in range(32):
            slots[:, start + 8 * ((c % 8) // 2) + 4 * (c % 2) + c // 8] = raw[:, start + c]
    nibbles = slots.reshape(outputs // 4, 4, inputs // 64, 64).swapaxes(1, 2)
    words = nibbles.reshape(outputs // 4, inputs, 4).astype(np.uint16)
    packed = sum((words[:, :, i] << np.uint16(4 * i) for i in range(4)), np.uint16(0))
    return packed.astype(np.uint16).view(np.int16)


@pytest.mark.parametrize(("outputs", "inputs"), [(4, 64), (32, 128), (24, 320)])
def test_legacy_weights_come_out_as_mlx_packs_them(rng, outputs, inputs):
    raw = codes(rng, outputs, inputs)
    assert np.array_equal(repack.legacy_weight(legacy_packed(raw)), mlx_packed(raw))
