"""The Metal kernel, emulated: its source compiled as C++, every thread run. No Mac has run it."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import mlx.core as mx
import pytest

from paroquant_stream.rotation import kernels, metal, reference
from tests.benchmarks.micro import emulation
from tests.helpers.emulation import Program, RefusedError, check, noticed
from tests.helpers.kernel_source import (
    Launch,
    bits_of,
    described_kernel,
    generated,
    launch_of,
    parameters_of,
)
from tests.helpers.opencl import errors_of
from tests.helpers.rotation_kernels import simulate_metal
from tests.helpers.rotations import (
    BOUNDS,
    error,
    make_rotation,
    make_x,
    rotate_float64,
    tables_of,
    to_float64,
)

FEW = [
    # group size, krot, rows, dtype
    *((32, 1, rows, mx.float16) for rows in (1, 33)),
    *((64, 8, rows, dtype) for rows in (1, 70) for dtype in BOUNDS),
    *((64, 8, rows, mx.float16) for rows in (7, 31, 32)),
    *((128, 8, rows, mx.float16) for rows in (3, 513)),  # 513: each SIMD group takes several tiles
    (128, 17, 35, mx.bfloat16),  # more rounds than registers hold at once
]


def launched(group_size, krot, rows, dtype):
    """A launch of random rows, its tables, and what it should give in float64."""
    dims = 3 * group_size
    parameters = make_rotation(dims, group_size, krot, seed=krot)
    x, tables = make_x((rows, dims), dtype, seed=rows), tables_of(parameters, group_size)
    expected = rotate_float64(to_float64(x), *parameters, group_size)
    return launch_of(x, tables), (x, tables), expected


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The launches of FEW, compiled."""
    cases = [launched(*case) for case in FEW]
    return Program([launch for launch, *_ in cases], tmp_path_factory.mktemp("metal")), cases


def test_emulated_rows_are_within_their_bound_of_float64(few):
    program, cases = few
    for (launch, (x, tables), expected), (*_, dtype) in zip(cases, FEW, strict=True):
        y = program.run(launch)
        assert (y.dtype, y.shape) == (dtype, x.shape)
        assert error(y, expected) < BOUNDS[dtype]
        assert error(reference.rotate(x, tables), expected) < BOUNDS[dtype]


@pytest.mark.slow  # two minutes of compiling
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("on_the_cpu")
def test_every_size_is_within_its_bound_of_float64():
    for line in emulation.lines():
        assert line.cases == len(emulation.KROTS) * len(emulation.ROWS)
        assert max(line.kernel, line.reference) < BOUNDS[line.dtype]


@pytest.mark.slow
def test_emulated_threads_give_the_same_bits_in_any_order(few):
    program, cases = few
    for launch, *_ in cases:
        upwards = program.run(launch)
        assert all(mx.array_equal(program.run(launch, order), upwards) for order in (1, 2, 3))


def test_emulated_rows_have_the_same_bits_alone_and_in_tiles(few):
    program, cases = few
    made = {case: launch for (launch, *_), case in zip(cases, FEW, strict=True)}
    for dtype in BOUNDS:
        tiles, single = (made[64, 8, rows, dtype] for rows in (70, 1))
        together = program.run(tiles)
        for row in (0, 3, 69):
            x, *tables = tiles.inputs
            alone = replace(single, inputs=(x[row : row + 1], *tables))
            assert mx.array_equal(program.run(alone)[0], together[row])


def test_emulated_results_are_float32_rounded_once(few):
    program, cases = few
    made = dict(zip(FEW, cases, strict=True))
    wide, *_ = made[64, 8, 70, mx.float32]
    for dtype in (mx.float16, mx.bfloat16):
        narrow, (x, _), _ = made[64, 8, 70, dtype]
        same = replace(wide, inputs=(bits_of(x.astype(mx.float32)), *narrow.inputs[1:]))
        assert mx.array_equal(program.run(same).astype(dtype), program.run(narrow))


@pytest.mark.slow
def test_address_spaces_and_language_are_metals(few):
    _, cases = few
    check(list({launch.source for launch, *_ in cases}))


def test_clang_finds_the_address_spaces_right(few):
    """By the compiler that Metal's is made of, where it is installed."""
    _, cases = few
    for source in {launch.source for launch, *_ in cases if launch.dtype != mx.bfloat16}:
        assert errors_of(source) == []
    begin = "const int dims = x_shape[1];"
    for wrong, message in {
        "thread Column* p = area;": "'__local Column",
        "const device int* p = x_shape;": "'const __constant int",
        "device float* p = cos_theta;": "'const __global float",
        "threadgroup float* p = (threadgroup float*)x;": "address space",
    }.items():
        (found,) = errors_of(source.replace(begin, begin + wrong))
        assert message in found


def test_mlx_binds_what_the_kernel_reads_in_this_order(few):
    _, cases = few
    for (launch, *_), (*_, dtype) in zip(cases, FEW, strict=True):
        name = {mx.float16: "float16_t", mx.bfloat16: "bfloat16_t", mx.float32: "float"}[dtype]
        found = [(p.kind, p.pointer, p.name) for p in parameters_of(launch.source)]
        assert found == [
            (f"const device {name}", "*", "x"),
            ("const constant int", "*", "x_shape"),
            ("const device int32_t", "*", "pairs"),
            *(("const device float", "*", f"{what}_theta") for what in ("cos", "sin")),
            ("const device float", "*", "channel_scales"),
            (f"device {name}", "*", "out"),
            ("uint3", "", "thread_position_in_grid"),
            ("uint3", "", "thread_position_in_threadgroup"),
            ("uint3", "", "threads_per_grid"),
        ]


def test_a_rotation_is_one_launch_and_nothing_else():
    """One row of a model: no copy, cast or array of sizes stands before or after the kernel."""
    x, tables = make_x((1, 256), mx.float16), tables_of(make_rotation(256, 64, 8), 64)
    launches = []
    kernel = mock.Mock(side_effect=lambda **options: launches.append(options) or [x])
    right = mock.patch.object(metal, "_is_right", return_value=True)
    with right, mock.patch.object(metal, "_kernel", return_value=kernel):
        assert metal.rotate(x, tables).shape == x.shape
    (launch,) = launches
    assert [a.dtype for a in launch["inputs"]] == [mx.float16, mx.int32, *[mx.float32] * 3]
    assert sum(a.nbytes for a in launch["inputs"][1:]) == 52 * 256


MUTATIONS = {
    "no barrier between rounds": ("if (m % SHARE == 0) {", "if (start + m == 0) {"),
    "no barrier before the first round": ("if (m % SHARE == 0) {", "if (m % SHARE == 0 && m) {"),
    "no barrier before the store": (
        "    simdgroup_barrier(mem_flags::mem_threadgroup);\n    // A lane",
        "    // A lane",
    ),
    "SIMD groups share an area": ("thread_position_in_threadgroup.y * GROUP", "0"),
    "the wrong group": ("thread_position_in_grid.x / LANES;", "0;"),
    "the wrong round": ("(dims / GROUP) + group) * PAIRS", "(dims / GROUP)) * PAIRS"),
    "i for j": ("(word[m] >> 16)", "(word[m] & 0xffff)"),
    "a sign": ("metal::fma(-a,", "metal::fma(a,"),
    "two lanes rotate one pair": ("pair = lane * SHARE", "pair = lane / 2 * 2 * SHARE"),
    "rows beyond the last tile of four": ("row + r < rows", "row + r < rows / 4 * 4"),
    "a row after the last": ("if (row + r < rows) {\n          out", "{\n          out"),
    "a tile is left out": ("row += step", "row += 2 * step"),
    "lanes that do not meet": ("if (m % SHARE == 0) {", "if (m % SHARE == 0 && lane) {"),
}


@pytest.mark.slow
def test_every_mutation_of_the_kernel_is_noticed(tmp_path):
    """One program holds all: a wrong kernel gives wrong numbers or stops the emulation."""
    cases = {}
    for what, (old, new) in MUTATIONS.items():
        assert old in metal._SOURCE, what
        described = described_kernel(
            name="rotation",
            input_names=["x", "pairs", "cos_theta", "sin_theta", "channel_scales"],
            output_names=["out"],
            header=metal._HEADER,
            source=metal._SOURCE.replace(old, new),
        )
        with mock.patch.object(metal, "_kernel", return_value=described):
            cases[what] = launched(128, 3, 131, mx.float32)
    program = Program([launch for launch, *_ in cases.values()], tmp_path)
    for what, (launch, _, expected) in cases.items():
        assert noticed(program, launch, expected), what


def small_launch(body, dtype=mx.bfloat16):
    """A launch of a kernel with this body for a row of 32."""
    x = mx.zeros((1, 32), dtype)
    kernel = described_kernel(
        name="small", input_names=["x"], output_names=["out"], source=body + "\n(void)x_shape;"
    )
    options = {"inputs": [x], "template": [("T", dtype)], "output_shapes": [x.shape]}
    options |= {"output_dtypes": [dtype], "grid": (32, 1, 1), "threadgroup": (32, 1, 1)}
    source = generated(lambda: kernel(**options, verbose=True))
    return Launch(source, (bits_of(x),), x.shape, dtype, (32, 1, 1), (32, 1, 1))


BEGIN = "threadgroup float area[32];\nconst int lane = thread_position_in_threadgroup.x;\n"
REFUSED = {
    "double": ("out[0] = T(double(x[0]));", "Metal_has_no_double"),
    "a float becomes a bfloat": ("bfloat y = 1.0f; out[0] = T(y);", "conversion from 'float'"),
    "a half becomes a bfloat": ("bfloat y = half(1.0f); out[0] = T(y);", "conversion from 'half'"),
    "no address space": ("const T* y = x; out[0] = y[0];", "without an address space"),
    "device memory as thread memory": ("const thread T* y = x; out[0] = y[0];", "volatile"),
    "constant memory as device memory": (
        "const device int* y = x_shape; out[0] = T(y[0]);",
        "volatile",
    ),
    "threadgroup memory as device memory": (
        "device float* y = area; out[0] = T(y[0]);",
        "volatile",
    ),
    "threadgroup memory by reference": (
        "thread float& y = area[0]; out[0] = T(y);",
        "volatile",
    ),
    "a write to an input": ("x[0] = T(1.0f);", "read-only|const"),
    "a barrier without memory": ("simdgroup_barrier(mem_flags::mem_none);", "mem_none"),
    "C++17": ("if constexpr (sizeof(T) == 2) out[0] = x[0];", "if constexpr"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.slow
def test_what_metal_refuses_is_refused(what):
    body, message = REFUSED[what]
    with pytest.raises(RefusedError, match=message):
        check([small_launch(BEGIN + body).source])


@pytest.mark.slow
def test_what_metal_allows_is_allowed():
    spaces = "const device T* y = x; thread int z = 0; const constant int* n = x_shape; "
    check(
        [small_launch(BEGIN + spaces + "area[lane] = y[lane]; out[n[z]] = T(area[lane]);").source]
    )


@pytest.mark.parametrize(("floats", "fits"), [(8192, True), (8193, False)])
@pytest.mark.slow
def test_threadgroup_arrays_are_bounded_by_32_kib(floats, fits, tmp_path):
    body = BEGIN.replace("32", str(floats)) + "area[lane] = 1.0f; out[lane] = T(area[lane]);"
    launch = small_launch(body)
    if fits:
        assert mx.all(Program([launch], tmp_path).run(launch) == 1)
    else:
        with pytest.raises(RefusedError, match="32,772 bytes of threadgroup memory"):
            Program([launch], tmp_path)


STOPPED = {
    "beyond an input": ("out[lane] = x[lane + 32];", "signal 11"),
    "lanes at two barriers": (
        "if (lane % 2) {\nsimdgroup_barrier(mem_flags::mem_threadgroup);\n} else {\n"
        "simdgroup_barrier(mem_flags::mem_threadgroup);\n}",
        "not at one barrier",
    ),
    "a lane that ended": (
        "if (lane == 7) return;\nthreadgroup_barrier(mem_flags::mem_threadgroup);",
        "not at one barrier",
    ),
}


@pytest.mark.slow
def test_threads_that_go_astray_stop_the_emulation(tmp_path):
    launches = [small_launch(f"{BEGIN} area[lane] = 0;\n{body}") for body, _ in STOPPED.values()]
    program = Program(launches, tmp_path)
    for launch, (_, message) in zip(launches, STOPPED.values(), strict=True):
        with pytest.raises(RefusedError, match=message):
            program.run(launch)


@pytest.mark.parametrize(("group_size", "krot"), [(32, 1), (64, 8), (128, 16)])
@pytest.mark.parametrize("batch", [1, 7, 32, 64, 513])
def test_tables_and_launch_compute_the_rotation(monkeypatch, group_size, krot, batch):
    """Simulated, so also where no compiler is: tables, constants and grid are right."""
    launches = []
    simulate_metal(monkeypatch, launches)
    dims = 3 * group_size
    parameters = make_rotation(dims, group_size, krot)
    x = make_x((batch, dims), mx.float16)
    y = kernels.rotate(x, tables_of(parameters, group_size))
    assert error(y, rotate_float64(to_float64(x), *parameters, group_size)) < 1e-3
    tile = 1 if batch < 32 else 4
    simd_groups = min(4, -(-batch // tile))
    threadgroups = {1: 1, 7: 2, 32: 2, 64: 4, 513: 8}[batch]
    assert launches == [(tile, (32 * 3, simd_groups * threadgroups, 1))]


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("works", ["right", "wrong", "does not compile"])
def test_a_kernel_that_is_not_right_on_this_mac_is_not_used(monkeypatch, caplog, works, dtype):
    """Simulated: before its first use it is compared with the reference, which then serves."""
    is_right, launches = metal._is_right.__wrapped__, []
    simulate_metal(monkeypatch, launches)
    simulated = metal._kernel()

    def kernel(**options):
        if works == "does not compile":
            raise RuntimeError("[metal::Device] Unable to build metal library from source")
        (y,) = simulated(**options)
        return [-y if works == "wrong" else y]

    monkeypatch.setattr(metal, "_kernel", lambda: kernel)
    monkeypatch.setattr(metal, "_is_right", is_right)
    x, tables = make_x((40, 192), dtype), tables_of(make_rotation(192, 64, 8), 64)
    y = kernels.rotate(x, tables)
    assert error(y, to_float64(reference.rotate(x, tables))) < BOUNDS[dtype]
    assert (works == "right") == (len(launches) == 3)
    assert (works != "right") == ("plain MLX is used" in caplog.text)
    assert ("Unable to build" in caplog.text) == (works == "does not compile")


@pytest.mark.parametrize("group_size", [32, 128, 256, 1024, 2048])
@pytest.mark.parametrize("rows", [1, 64])
def test_every_size_that_is_taken_fits_threadgroup_memory(group_size, rows):
    x, tables = (
        make_x((rows, group_size)),
        tables_of(make_rotation(group_size, group_size, 1), group_size),
    )
    launch = launch_of(x, tables)
    constants = launch.source.split("decltype(")[-1].split("<")[1].split(">")[0].split(", ")
    _, size, _, tile, simd_groups = constants
    assert int(size) == group_size
    assert 4 * int(tile) * group_size * int(simd_groups) <= metal.THREADGROUP_BYTES
    assert launch.threadgroup[1] <= int(simd_groups)
