"""Prints time, error and table bytes of the forms of the rotation, on the default device.

    python -m tests.benchmarks.micro.rotation [--dims 4096 8192 28672] [--rows 1 64 512]
        [--repeats 9]

chosen       what layers call (`kernels.rotate`): a device's kernel, or the reference
rounds       the reference: krot gathers with float32 coefficients
last axis    the same gathers along the last axis, all rows in one pass
block        one orthogonal matrix per group, composed in float64, in the dtype of x
block f32    the same in float32, whatever x is

Every form runs once per round of measurement, in turn; the figures are medians. On a GPU a run is
a chain of 20, as a model is one, divided by 20: a lone call measures the way there and back. Errors
are norm(y - ref) / norm(ref) against float64 in numpy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from paroquant_stream.rotation import kernels, reference
from paroquant_stream.rotation.tables import RotationTables, Rounds
from tests.helpers.rotations import make_rotation

GROUP, KROT = 128, 8
CHANNELS_70B = 80 * (6 * 8192 + 28672)
"""Rotated channels of a Llama 70B: 80 layers, inputs of q, k, v, o, gate, up and down."""
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
Rotate = Callable[[mx.array], mx.array]


def rotate_float64(x: NDArray[np.float64], rounds: Rounds) -> NDArray[np.float64]:
    """The definition, a round at a time."""
    y = x * rounds.channel_scales
    for k in range(KROT):
        i, j = rounds.first[k] + rounds.group_start, rounds.second[k] + rounds.group_start
        cos, sin = rounds.cos[k].astype(np.float64), rounds.sin[k].astype(np.float64)
        y_i, y_j = y[:, i], y[:, j]
        y[:, i], y[:, j] = y_i * cos + y_j * sin, y_j * cos - y_i * sin
    return y


def block_matrices(rounds: Rounds) -> NDArray[np.float64]:
    """(groups, GROUP, GROUP) with rotate(x) = x @ matrix in each group, channel scales left out."""
    dims = rounds.channel_scales.size
    unscaled = rounds._replace(
        channel_scales=np.ones(dims, np.float32)
    )  # folded in, they lose bits
    rows = np.tile(np.eye(GROUP), dims // GROUP)
    return rotate_float64(rows, unscaled).reshape(GROUP, -1, GROUP).swapaxes(0, 1)


def block_form(matrices: mx.array, scales: mx.array) -> Rotate:
    """The rotation as one batched product of `matrices`."""

    def rotate(x: mx.array) -> mx.array:
        scaled = (x.astype(mx.float32) * scales).astype(matrices.dtype)
        groups = scaled.reshape(x.shape[0], -1, GROUP).swapaxes(0, 1)
        return (groups @ matrices).swapaxes(0, 1).reshape(x.shape).astype(x.dtype)

    return rotate


def last_axis_form(form: reference.Tables) -> Rotate:
    """The rotation as gathers along the last axis."""
    cos, sin = ([table.reshape(-1) for table in tables] for tables in (form.cos, form.sin))

    def rotate(x: mx.array) -> mx.array:
        y = x.astype(mx.float32) * form.channel_scales
        for k, partner in enumerate(form.partner):
            y = y * cos[k] + mx.take(y, partner, axis=-1) * sin[k]
        return y.astype(x.dtype)

    return rotate


def forms(dims: int, dtype: mx.Dtype, tables: RotationTables, rounds: Rounds) -> dict[str, Rotate]:
    """Every form by its name, its tables evaluated."""
    scales = mx.array(rounds.channel_scales)
    exact = mx.array(block_matrices(rounds).astype(np.float32))
    matrices = exact.astype(dtype)
    mx.eval(matrices)
    return {
        "chosen": lambda x: kernels.rotate(x, tables),
        "rounds": lambda x: reference.rotate(x, tables),
        "last axis": last_axis_form(tables.for_kernel(reference.Tables)),
        "block": block_form(matrices, scales),
        "block f32": block_form(exact, scales),
    }


def seconds(
    candidates: dict[str, Rotate], x: mx.array, repeats: int, chain: int
) -> dict[str, float]:
    """The median time of each in a chain, in turn after a first call that does not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, rotate in candidates.items():
            start = time.perf_counter()
            y = x
            for _ in range(chain):
                y = rotate(y)
            mx.eval(y)
            if repeat:
                times[name].append((time.perf_counter() - start) / chain)
    return {name: statistics.median(values) for name, values in times.items()}


def table_lines(dims: int, rows: list[int], repeats: int) -> Iterator[str]:
    """One line per dtype and number of rows, then the tables' sizes and build times."""
    parameters = [mx.array(values) for values in make_rotation(dims, GROUP, KROT)]
    tables = RotationTables(*parameters, GROUP)
    rounds = Rounds.from_parameters(*parameters, GROUP)
    chain = 1 if mx.default_device() == mx.cpu else 20
    for name, dtype in DTYPES.items():
        candidates = forms(dims, dtype, tables, rounds)
        for count in rows:
            x = mx.random.normal((count, dims)).astype(dtype)
            times = seconds(candidates, x, repeats if count > 1 else 5 * repeats, chain)
            expected = rotate_float64(np.array(x.astype(mx.float32), np.float64), rounds)
            cells = []
            for form, rotate in candidates.items():
                found = np.array(rotate(x).astype(mx.float32), np.float64)
                error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
                cells.append(f"{1e3 * times[form]:8.3f} {error:.0e}")
            yield f"| {dims:5} | {name:8} | {count:4} | " + " | ".join(cells) + " |"
    start = time.perf_counter()
    block_matrices(rounds)
    composed = time.perf_counter() - start
    nbytes = sum(array.nbytes for array in tables.for_kernel(reference.Tables).arrays)
    yield (
        f"tables, dims {dims}: "
        f"rounds {nbytes / 1e6:.2f} MB in {tables.build_seconds:.3f} s, "
        f"block float16 {dims * GROUP * 2 / 1e6:.2f} MB, float32 {dims * GROUP * 4 / 1e6:.2f} MB "
        f"in {composed:.3f} s; a 70B model: rounds "
        f"{CHANNELS_70B * nbytes / dims / 1e9:.2f} GB, "
        f"block {CHANNELS_70B * GROUP * 2 / 1e9:.2f} / {CHANNELS_70B * GROUP * 4 / 1e9:.2f} GB"
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[4096, 8192, 28672])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    names = ("chosen", "rounds", "last axis", "block", "block f32")
    print(f"{mx.default_device()}, group_size {GROUP}, krot {KROT}; milliseconds and error")
    print("|  dims | dtype    | rows | " + " | ".join(f"{name:14}" for name in names) + " |")
    for dims in options.dims:
        for line in table_lines(dims, options.rows, options.repeats):
            print(line, flush=True)


if __name__ == "__main__":
    main()
