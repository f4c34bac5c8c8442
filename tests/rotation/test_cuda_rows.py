"""The CUDA kernel for many rows: its source emulated, also with faults put in."""

from __future__ import annotations

from unittest import mock

import mlx.core as mx
import pytest

from paroquant_stream.rotation import cuda, cuda_rows, packed
from tests.helpers.emulation import Program, noticed, random_launch
from tests.helpers.kernel_source import cuda_launch_of
from tests.helpers.rotations import BOUNDS, error, make_rotation, make_x, tables_of

CASES = [
    # group size, krot, rows, dtype
    *((32, 1, 65, mx.float16), (32, 7, 129, mx.bfloat16), (32, 16, 31, mx.float32)),
    *((64, 2, 257, mx.float16), (64, 8, 96, mx.bfloat16), (64, 5, 70, mx.float32)),
    *((128, 8, 131, mx.float16), (128, 16, 64, mx.bfloat16), (128, 3, 33, mx.float32)),
]


TILES = {16: 1 << 60, 32: 0}
"""The fewest tiles with which a tile has so many rows."""


@pytest.fixture
def few_blocks(monkeypatch):
    """Warps rotate several tiles in a row from two blocks on."""
    monkeypatch.setattr(cuda_rows, "_FEWEST_BLOCKS", 1)  # private: 16 blocks would be slow


def launched(*case, tile, source=None):
    """A launch with tiles of so many rows."""
    with mock.patch.object(cuda_rows, "_FEWEST_TILES", TILES[tile]):  # private: a choice by speed
        return random_launch(*case, source, cuda.rotate_many)


def compare(cases, folder):
    """All kernels have the same bits, in each order; lanes meet in no bank."""
    few = [random_launch(*case, rotate=cuda.rotate_few)[0] for case in cases]
    many = {tile: [launched(*case, tile=tile) for case in cases] for tile in TILES}
    program = Program(few + [launch for found in many.values() for launch, _ in found], folder)
    rotated = [program.run(launch) for launch in few]
    for tile, found in many.items():
        for case, (launch, expected), other in zip(cases, found, rotated, strict=True):
            y = program.run(launch)
            assert program.most_in_a_bank == 1, (tile, case)
            assert error(y, expected) < BOUNDS[launch.dtype], (tile, case)
            for order in (1, 2):
                assert mx.array_equal(program.run(launch, order), y), (tile, case)
            assert mx.array_equal(other, y), (tile, case)


@pytest.mark.usefixtures("few_blocks")
def test_all_kernels_have_the_same_bits_when_emulated(tmp_path):
    compare(CASES[::4], tmp_path)  # each group size and each dtype once


@pytest.mark.slow
@pytest.mark.usefixtures("few_blocks")
def test_all_kernels_have_the_same_bits_for_every_size_and_dtype(tmp_path):
    compare(CASES, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", cuda_rows.ROW_GROUP_SIZES)
def test_all_kernels_agree_for_every_krot(tmp_path, group_size):
    dtypes = [*BOUNDS] * 6
    compare([(group_size, k, 30 + 5 * k, dtypes[k]) for k in range(1, 17)], tmp_path)


def test_rows_that_begin_inside_an_array_are_rotated(tmp_path):
    cases = [launched(64, 2, 67, dtype, tile=tile) for dtype in BOUNDS for tile in TILES]
    program = Program([launch for launch, _ in cases], tmp_path)
    for launch, expected in cases:
        y = program.run(launch, after=launch.dtype.size)
        assert error(y, expected) < BOUNDS[launch.dtype]
        assert mx.array_equal(program.run(launch), y)


def test_the_blocks_of_each_size_fit_in_shared_memory():
    """Program refuses more; these are the largest."""
    for group_size in cuda_rows.ROW_GROUP_SIZES:
        for krot in range(1, cuda.MAX_KROT + 1):
            for rows, tile in ((1000, 16), (5000, 32)):
                constants, blocks = cuda_rows.many_rows_launch(
                    rows, 64 * group_size, group_size, krot
                )
                warps = constants["WARPS"]
                assert constants["ROWS"] == tile
                assert 4 * tile * group_size * warps + 6 * group_size * krot <= 48 << 10
                assert warps == (2 if (group_size, tile) == (128, 32) else 4)
                assert tile * warps * blocks * 4 >= rows


def test_few_tiles_have_sixteen_rows_each():
    chosen = [
        cuda_rows.many_rows_launch(rows, dims, 128, 8)[0]["ROWS"]
        for rows, dims in ((512, 8192), (2016, 8192), (2017, 8192), (512, 28672), (8192, 28672))
    ]
    assert chosen == [16, 16, 32, 16, 32]


MUTATIONS = {
    "no barrier after the tables": ("__syncthreads()", "__syncwarp()"),
    "no barrier after a later tile": ("} else {\n      __syncwarp();", "} else {"),
    "no barrier after a round": ("__syncwarp();  // the", "// the"),
    "warps share a tile": ("y = area[threadIdx.y];", "y = area[0];"),
    "other places of pairs": (" + first_quad(channel / V % WIDE)", ""),
    "other places of a tile": ("^ quad_of(n)", "^ n % OWN"),
    "another order of quads": ("(wide ^ wide / 2) % QUADS", "wide % QUADS"),
    "halves of other channels": ("channel % 16 * 2 + channel / 16 % 2", "channel % 32"),
    "a quad is not moved": ("(slots[at] >> 16) ^ quad", "(slots[at] >> 16) + quad"),
    "rows after the last": ("r < rows ? r : rows - 1", "r"),
    "the tables end later": ("n < KROT * PAIRS ? n : KROT * PAIRS - 1", "n"),
    "the next tile is left out": ("while (row < rows)", "while (false)"),
    "a step is left out": ("n < STEPS; n += BATCH", "n < STEPS; n += 2 * BATCH"),
    "a round is left out": ("k < KROT; ++k", "k < KROT; k += 2"),
    "stores before loads": ("y[i[m]] = a_rotated", "y[i[0]] = a_rotated"),
    "i for j": ("b[m] = y[j[m]]", "b[m] = y[i[m]]"),
    "the other direction": ("-a[m][r], s", "a[m][r], s"),
    "no scale": ("float(piece[n][v]) * scale[v]", "float(piece[n][v])"),
    "no scale inside an array": (" * scales[channel_of(n) + v]", ""),
    "always aligned": ("aligned = is_aligned<V>(x)", "aligned = true"),
}
SPECIAL = {
    "other places of a tile": (32, 2, 70, mx.float16),
    "another order of quads": (64, 2, 70, mx.float16),
    "a step is left out": (128, 2, 70, mx.float16),
    "the tables end later": (32, 1, 70, mx.float32),
}
RIGHT = {32: {"another order of quads"}}
"""Mutations that change nothing with tiles of so many rows."""
INSIDE = {"no scale inside an array", "always aligned"}


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.usefixtures("few_blocks")
def test_every_mutation_of_the_kernel_is_noticed(tmp_path, tile):
    cases = {}
    for what, (old, new) in MUTATIONS.items():
        assert old in cuda_rows.ROWS_SOURCE, what
        case = SPECIAL.get(what, (64, 3, 523, mx.float32))
        source = cuda_rows.ROWS_SOURCE.replace(old, new)
        cases[what] = launched(*case, tile=tile, source=source)
    program = Program([launch for launch, _ in cases.values()], tmp_path)
    assert {
        what
        for what, (launch, expected) in cases.items()
        if not noticed(program, launch, expected, 4 * (what in INSIDE), banks=1)
    } == RIGHT.get(tile, set())


@pytest.mark.slow
@pytest.mark.parametrize(("tile", "meet"), [(16, 4), (32, 8)])
def test_channels_without_permuted_quads_meet_in_a_bank(tmp_path, tile, meet):
    """So their results are right; only the counting of the banks notices."""
    source = cuda_rows.ROWS_SOURCE
    for old, new in (
        (" + first_quad(channel / V % WIDE)", ""),
        ("first_quad(lane % WIDE) ^ quad_of(n)", "quad_of(n)"),
    ):
        assert old in source
        source = source.replace(old, new)
    launch, expected = launched(128, 2, 70, mx.float16, tile=tile, source=source)
    program = Program([launch], tmp_path)
    assert error(program.run(launch), expected) < BOUNDS[mx.float16]
    assert program.most_in_a_bank == meet


def test_arranged_pairs_have_the_bits_of_the_others(tmp_path, monkeypatch):
    """Signs of zero too; without it two channels of 16 rows meet in a bank."""
    theta, pairs, scales = make_rotation(128, 64, 3)
    theta[:, ::5] = 0
    x = make_x((65, 128))
    x = mx.where(mx.abs(x) < 0.7, 0.0 * x, x)
    arguments = x, tables_of((theta, pairs, scales), 64)
    launches = [cuda_launch_of(*arguments, rotate=f) for f in (cuda.rotate_many, cuda.rotate_few)]
    monkeypatch.setattr(packed, "_arranged", lambda *arrays: arrays[:3])
    arguments = x, tables_of((theta, pairs, scales), 64)
    launches.append(cuda_launch_of(*arguments, rotate=cuda.rotate_many))
    assert launches[0].source == launches[2].source
    program = Program(launches, tmp_path)
    arranged, few, plain = (program.run(launch).view(mx.uint32) for launch in launches)
    assert program.most_in_a_bank == 2
    assert mx.array_equal(arranged, plain)
    assert mx.array_equal(arranged, few)
    assert mx.any(arranged == 1 << 31)  # -0.0


def test_the_kernel_is_chosen_by_rows_and_group_size():
    many = cuda_rows.MANY_ROWS
    chosen = [
        (rows, size)
        for rows in (1, many - 1, many, 8192)
        for size in (16, 32, 64, 96, 128)
        if cuda_rows.suits_many_rows(rows, size)
    ]
    assert chosen == [(rows, size) for rows in (many, 8192) for size in (32, 64, 128)]
