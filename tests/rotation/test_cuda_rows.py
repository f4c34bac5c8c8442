"""The CUDA kernel for many rows: its source emulated, also with faults put in."""

from __future__ import annotations

import mlx.core as mx
import pytest

from paroquant_stream.rotation import cuda, cuda_rows
from tests.helpers.emulation import Program, noticed, random_launch
from tests.helpers.rotations import BOUNDS, error

CASES = [
    # group size, krot, rows, dtype
    *((32, 1, 65, mx.float16), (32, 7, 129, mx.bfloat16), (32, 16, 31, mx.float32)),
    *((64, 2, 257, mx.float16), (64, 8, 96, mx.bfloat16), (64, 5, 70, mx.float32)),
    *((128, 8, 131, mx.float16), (128, 16, 64, mx.bfloat16), (128, 3, 33, mx.float32)),
]


@pytest.fixture
def few_blocks(monkeypatch):
    """Warps rotate several tiles in a row from two blocks on."""
    monkeypatch.setattr(cuda_rows, "_FEWEST_BLOCKS", 1)  # private: 16 blocks would be slow


def compare(cases, folder):
    """Both kernels have the same bits, in each order; lanes meet in no bank."""
    many = [random_launch(*case, rotate=cuda.rotate_many) for case in cases]
    few = [random_launch(*case, rotate=cuda.rotate_few)[0] for case in cases]
    program = Program([launch for launch, _ in many] + few, folder)
    for case, (launch, expected), other in zip(cases, many, few, strict=True):
        y = program.run(launch)
        assert program.most_in_a_bank == 1, case
        assert error(y, expected) < BOUNDS[launch.dtype], case
        assert all(mx.array_equal(program.run(launch, order), y) for order in (1, 2)), case
        assert mx.array_equal(program.run(other), y), case


@pytest.mark.usefixtures("few_blocks")
def test_both_kernels_have_the_same_bits_when_emulated(tmp_path):
    compare(CASES, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", cuda_rows.ROW_GROUP_SIZES)
def test_both_kernels_agree_for_every_krot(tmp_path, group_size):
    dtypes = [*BOUNDS] * 6
    compare([(group_size, k, 30 + 5 * k, dtypes[k]) for k in range(1, 17)], tmp_path)


def test_rows_that_begin_inside_an_array_are_rotated(tmp_path):
    cases = [random_launch(64, 2, 67, dtype, rotate=cuda.rotate_many) for dtype in BOUNDS]
    program = Program([launch for launch, _ in cases], tmp_path)
    for launch, expected in cases:
        y = program.run(launch, after=launch.dtype.size)
        assert error(y, expected) < BOUNDS[launch.dtype]
        assert mx.array_equal(program.run(launch), y)


def test_the_blocks_of_each_size_fit_in_shared_memory():
    """Program refuses more; these are the largest."""
    for group_size in cuda_rows.ROW_GROUP_SIZES:
        for krot in range(1, cuda.MAX_KROT + 1):
            constants, blocks = cuda_rows.many_rows_launch(5000, group_size, krot)
            warps = constants["WARPS"]
            assert 128 * group_size * warps + 6 * group_size * krot <= 48 << 10
            assert warps == (2 if group_size == 128 else 4)
            assert 32 * warps * blocks * 4 >= 5000


MUTATIONS = {
    "no barrier after the tables": ("__syncthreads()", "__syncwarp()"),
    "no barrier after a later tile": ("} else {\n      __syncwarp();", "} else {"),
    "no barrier after a round": ("__syncwarp();  // the", "// the"),
    "warps share a tile": ("y = area[threadIdx.y];", "y = area[0];"),
    "other places of pairs": ("channel * QUADS + channel / V % QUADS", "channel * QUADS"),
    "other places of a tile": ("lane % WIDE ^ quad_of(n)", "lane % WIDE ^ n % WIDE"),
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
    "the tables end later": (32, 1, 70, mx.float32),
}
INSIDE = {"no scale inside an array", "always aligned"}


@pytest.mark.slow
@pytest.mark.usefixtures("few_blocks")
def test_every_mutation_of_the_kernel_is_noticed(tmp_path):
    cases = {}
    for what, (old, new) in MUTATIONS.items():
        assert old in cuda_rows.ROWS_SOURCE, what
        case = SPECIAL.get(what, (64, 3, 523, mx.float32))
        source = cuda_rows.ROWS_SOURCE.replace(old, new)
        cases[what] = random_launch(*case, source, cuda.rotate_many)
    program = Program([launch for launch, _ in cases.values()], tmp_path)
    assert [
        what
        for what, (launch, expected) in cases.items()
        if not noticed(program, launch, expected, 4 * (what in INSIDE), banks=1)
    ] == []


@pytest.mark.slow
def test_channels_without_permuted_quads_meet_in_a_bank(tmp_path):
    """So their results are right; only the counting of the banks notices."""
    source = cuda_rows.ROWS_SOURCE
    for old, new in (
        ("channel * QUADS + channel / V % QUADS", "channel * QUADS"),
        ("lane % WIDE ^ quad_of(n)", "quad_of(n)"),
    ):
        assert old in source
        source = source.replace(old, new)
    launch, expected = random_launch(128, 2, 70, mx.float16, source, cuda.rotate_many)
    program = Program([launch], tmp_path)
    assert error(program.run(launch), expected) < BOUNDS[mx.float16]
    assert program.most_in_a_bank == 8


def test_the_kernel_is_chosen_by_rows_and_group_size():
    many = cuda_rows.MANY_ROWS
    chosen = [
        (rows, size)
        for rows in (1, many - 1, many, 8192)
        for size in (16, 32, 64, 96, 128)
        if cuda_rows.suits_many_rows(rows, size)
    ]
    assert chosen == [(rows, size) for rows in (many, 8192) for size in (32, 64, 128)]
