"""Repacking equals a reference that packs one nibble at a time, and the public loader."""

from __future__ import annotations

import itertools
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paroquant_stream.transform import repack

public = pytest.importorskip(
    "paroquant.inference.backends.mlx.load", reason="the public loader comes with the test extra"
)

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
SHAPES = [(8, 8), (32, 8), (64, 64), (24, 72), (256, 1048), (2088, 56), (1056, 2056), (32768, 456)]


def awq_packed(codes: np.ndarray) -> np.ndarray:
    """Pack codes (rows, N) as AutoAWQ does."""
    rows, outputs = codes.shape
    words = np.zeros((rows, outputs // 8), np.uint32)
    for nibble, output in enumerate(ORDER):
        words |= codes[:, output::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def mlx_packed(codes: np.ndarray) -> np.ndarray:
    """Pack codes (N, K) as MLX does."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for nibble in range(8):
        words |= codes[:, nibble::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def awq_weight(packed: np.ndarray) -> np.ndarray:
    """Join the stripes to the whole weight."""
    return np.concatenate([stripe.copy() for stripe in repack.awq_stripes(packed)])


def codes(rng, rows, columns) -> np.ndarray:
    return rng.integers(0, 16, (rows, columns), np.uint8)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_awq_weights_are_packed_as_mlx_does(rng, inputs, outputs):
    raw = codes(rng, inputs, outputs)
    packed = awq_packed(raw)
    weight = awq_weight(packed)
    assert np.array_equal(weight, mlx_packed(raw.T))
    assert np.array_equal(weight, public._pack_mlx(public._unpack_and_reorder(packed).T))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_awq_weights_of_any_shape_are_packed_as_mlx_does(blocks, columns, seed):
    raw = codes(np.random.default_rng(seed), 8 * blocks, 8 * columns)
    assert np.array_equal(awq_weight(awq_packed(raw)), mlx_packed(raw.T))


@pytest.mark.parametrize("inputs", [32, 1000, 32768])
def test_tiles_of_every_depth_give_the_same_words(rng, monkeypatch, inputs):
    raw = codes(rng, inputs, 120)
    packed = awq_packed(raw)
    for size in (1, 5000, 1 << 30):
        monkeypatch.setattr(repack, "_TILE_BYTES", size)  # private: for tiles of every depth
        assert np.array_equal(awq_weight(packed), mlx_packed(raw.T))


def test_stripes_are_whole_rows_in_one_buffer(rng):
    packed = awq_packed(codes(rng, 32768, 2000))
    stripes = []
    copies = []
    for stripe in repack.awq_stripes(packed):
        stripes.append(stripe)
        copies.append(stripe.copy())
    assert len(stripes) > 2
    assert all(stripe.shape[1] == 4096 and len(stripe) % 8 == 0 for stripe in stripes)
    assert all(stripe.flags.c_contiguous for stripe in stripes)
    assert np.shares_memory(stripes[0], stripes[1])
    assert np.array_equal(np.concatenate(copies), awq_weight(packed))


@pytest.mark.parametrize("inputs", [2048, 4096, 5120, 8192, 14336, 28672])
def test_stripes_hold_about_eight_megabytes(inputs):
    stripe = next(repack.awq_stripes(np.zeros((inputs, 1024), np.int32)))
    assert 6 << 20 <= stripe.nbytes <= 12 << 20


def test_a_repack_needs_no_array_of_the_outputs_size():
    packed = np.zeros((8192, 4096), np.int32)
    tracemalloc.start()
    for _ in repack.awq_stripes(packed):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize("cuts", [(8,), (800, 808), (0, 504, 1000)])
def test_ranges_of_rows_join_to_the_whole(rng, cuts):
    packed = awq_packed(codes(rng, 80, 1000))
    bounds = [0, *cuts, 1000]
    parts = [
        stripe.copy()
        for first, last in itertools.pairwise(bounds)
        for stripe in repack.awq_stripes(packed, first, last)
    ]
    assert np.array_equal(np.concatenate(parts), awq_weight(packed))


def test_threads_can_share_a_matrix(rng):
    packed = awq_packed(codes(rng, 4096, 4096))
    weight = np.empty((4096, 512), np.uint32)

    def work(first: int) -> None:
        row = first
        for stripe in repack.awq_stripes(packed, first, first + 1024):
            weight[row : row + len(stripe)] = stripe
            row += len(stripe)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(0, 4096, 1024)))
    assert np.array_equal(weight, awq_weight(packed))


def test_the_packed_words_are_left_as_they_were(rng):
    packed = awq_packed(codes(rng, 64, 64))
    packed.flags.writeable = False
    awq_weight(packed)
    legacy = legacy_packed(codes(rng, 4, 64))  # one block of 64, which a reshape need not copy
    legacy.flags.writeable = False
    repack.legacy_weight(legacy)


@pytest.mark.parametrize("inputs", [0, 4, 20])
def test_inputs_that_do_not_fill_words_are_refused(inputs):
    with pytest.raises(ValueError, match=f"multiple of 8 inputs, found {inputs}"):
        next(repack.awq_stripes(np.zeros((inputs, 8), np.int32)))


@pytest.mark.parametrize(("first", "last"), [(4, 64), (0, 60), (0, 72), (-8, 64), (16, 8)])
def test_ranges_outside_the_rows_or_between_eights_are_refused(first, last):
    with pytest.raises(ValueError, match=f"multiples of 8 up to 64, found {first}:{last}"):
        next(repack.awq_stripes(np.zeros((8, 8), np.int32), first, last))


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


def legacy_packed(raw: np.ndarray) -> np.ndarray:
    """Pack codes (N, K) in TinyChat's interleave, one nibble at a time."""
    outputs, inputs = raw.shape
    slots = np.zeros_like(raw)
    for start in range(0, inputs, 32):
        for c in range(32):
            slots[:, start + 8 * ((c % 8) // 2) + 4 * (c % 2) + c // 8] = raw[:, start + c]
    nibbles = slots.reshape(outputs // 4, 4, inputs // 64, 64).swapaxes(1, 2)
    words = nibbles.reshape(outputs // 4, inputs, 4).astype(np.uint16)
    packed = sum((words[:, :, i] << np.uint16(4 * i) for i in range(4)), np.uint16(0))
    return packed.astype(np.uint16).view(np.int16)


def test_native_scales_and_biases_have_the_public_loaders_bits(rng):
    import mlx.core as mx

    scaled_zeros = rng.uniform(-0.1, 0.1, (3, 32)).astype(np.float16)
    scaled_zeros[:, ::5] = 0
    scales = rng.uniform(0.001, 0.02, (3, 32)).astype(np.float16)
    weights = {
        "x.qlinear.qweight": mx.array(mlx_packed(codes(rng, 32, 96)).view(np.int16).reshape(8, 96)),
        "x.qlinear.scales": mx.array(scales),
        "x.qlinear.scaled_zeros": mx.array(scaled_zeros),
    }
    expected = public._convert_paro_native(weights, 32)
    biases = repack.native_biases(scaled_zeros)
    assert biases.tobytes() == np.array(expected["x.biases"]).tobytes()
    assert repack.group_scales(scales).tobytes() == np.array(expected["x.scales"]).tobytes()
    assert biases.flags.c_contiguous


def test_float32_scales_are_rounded_once_and_after_the_product(rng):
    scales = rng.uniform(0.001, 0.02, (4, 64)).astype(np.float32)
    zeros = codes(rng, 4, 64)
    biases = repack.awq_biases(scales, awq_packed(zeros))
    expected = (-scales * zeros.astype(np.float32)).astype(np.float16).T
    assert biases.dtype == np.float16
    assert biases.tobytes() == expected.tobytes()
    assert np.array_equal(repack.group_scales(scales), scales.astype(np.float16).T)


def test_legacy_padding_is_dropped(rng):
    padded = rng.normal(size=(8, 16)).astype(np.float16)
    assert np.array_equal(repack.legacy_group_rows(padded, 3), padded[:3])
    biases = repack.group_scales(repack.legacy_group_rows(padded, 3))
    assert biases.shape == (16, 3)
    assert biases.tobytes() == padded[:3].T.tobytes()


@pytest.mark.parametrize(("outputs", "inputs"), [(4, 64), (32, 128), (24, 320)])
def test_legacy_weights_are_packed_as_mlx_does(rng, outputs, inputs):
    raw = codes(rng, outputs, inputs)
    assert np.array_equal(repack.legacy_weight(legacy_packed(raw)), mlx_packed(raw))
