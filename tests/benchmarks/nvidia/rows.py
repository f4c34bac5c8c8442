"""Prints microseconds of the CUDA rotation kernels by the number of rows, beside a plain copy.

    python -m tests.benchmarks.nvidia.rows [--dims 8192 28672] [--rows 1 64 512 8192] [--repeats 9]
        [--dtype bfloat16] [--tile 16 32] [--unroll 2 4 8] [--warps 1 2] [--blocks 8 16]

copy      a kernel that copies x, 16 bytes a thread: no rotation can be faster
few       the rotation by the kernel for few rows
many ...  by the kernel for many rows, with each --tile (rows), --unroll, --warps (most) and
          --blocks (fewest)
chosen    which of the two the rotation uses, and the rows of a tile, with the package's constants

All run once per round of measurement, in turn; the figures are medians of a chain of 20, divided
by 20. MLX needs about 14 us to launch one. It stops when a result is off, or the kernels differ.
"""

from __future__ import annotations

import argparse
import itertools
from functools import cache, partial
from typing import Any

import mlx.core as mx
import numpy as np

from paroquant_stream.rotation import cuda, cuda_rows
from paroquant_stream.rotation.tables import RotationTables
from tests.benchmarks.micro.rotation import Rotate, seconds
from tests.helpers.rotations import BOUNDS, error, make_rotation, rotate_float64, to_float64

GROUP, KROT, CHAIN = 128, 8, 20
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
TILES = {16: 1 << 60, 32: 0}
"""The fewest tiles with which a tile has so many rows."""
_COPY = """
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t count = int64_t(x_shape[0]) * x_shape[1] * sizeof(T) / 16;
  if (n < count) reinterpret_cast<int4*>(out)[n] = reinterpret_cast<const int4*>(x)[n];
"""


@cache
def copy_kernel() -> Any:
    """The plain copy."""
    return mx.fast.cuda_kernel(
        name="plain_copy", input_names=["x"], output_names=["out"], source=_COPY
    )


def copied(x: mx.array) -> mx.array:
    """A copy of x."""
    threads = -(-x.nbytes // 16 // 256) * 256
    (out,) = copy_kernel()(
        inputs=[x],
        template=[("T", x.dtype)],
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
        grid=(threads, 1, 1),
        threadgroup=(256, 1, 1),
    )
    return out


def rotated_by_many(x: mx.array, tables: RotationTables, constants: dict[str, int]) -> mx.array:
    """The rotation by the kernel for many rows, with other constants of its module."""
    vars(cuda_rows).update(constants)  # private; a mock would take longer than the launch
    return cuda.rotate_many(x, tables)


def forms(tables: RotationTables, options: argparse.Namespace) -> dict[str, Rotate]:
    """All by their names."""
    found = {"copy": copied, "few": partial(cuda.rotate_few, tables=tables)}
    for tile, unroll, warps, blocks in itertools.product(
        options.tile, options.unroll, options.warps, options.blocks
    ):
        constants = {"_FEWEST_TILES": TILES[tile], "_UNROLL": unroll}
        constants |= {"_MOST_WARPS": warps, "_FEWEST_BLOCKS": blocks}
        name = f"many t{tile} u{unroll} w{warps} b{blocks}"
        found[name] = partial(rotated_by_many, tables=tables, constants=constants)
    return found


def chosen(rows: int, dims: int, fewest: int) -> str:
    """The kernel that the rotation uses, with this value of `_FEWEST_TILES`."""
    if not cuda_rows.suits_many_rows(rows, GROUP):
        return "few"
    vars(cuda_rows).update(_FEWEST_TILES=fewest)
    constants, _ = cuda_rows.many_rows_launch(rows, dims, GROUP, KROT)
    return f"many t{constants['ROWS']}"


def check(candidates: dict[str, Rotate], x: mx.array, parameters: tuple[np.ndarray, ...]) -> None:
    """Stop unless the copy is one, three rotated rows are right, and all kernels agree."""
    assert mx.array_equal(candidates["copy"](x), x)
    rotated = candidates["few"](x)
    rows = sorted({0, x.shape[0] // 2, x.shape[0] - 1})
    some = mx.array(rows)
    expected = rotate_float64(to_float64(x[some]), *parameters, GROUP)
    assert error(rotated[some], expected) < BOUNDS[x.dtype]
    for name in list(candidates)[2:]:
        assert mx.array_equal(candidates[name](x), rotated), name


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[8192, 28672])
    default = [1, 32, 64, 128, 256, 512, 2048, 8192]
    parser.add_argument("--rows", type=int, nargs="+", default=default)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--tile", type=int, nargs="+", choices=TILES, default=[*TILES])
    parser.add_argument("--unroll", type=int, nargs="+", default=[cuda_rows._UNROLL])
    parser.add_argument("--warps", type=int, nargs="+", default=[cuda_rows._MOST_WARPS])
    parser.add_argument("--blocks", type=int, nargs="+", default=[cuda_rows._FEWEST_BLOCKS])
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    options, fewest = parsed(), cuda_rows._FEWEST_TILES
    device = mx.device_info().get("device_name", mx.default_device())
    print(f"{device}, MLX {mx.__version__}, {options.dtype}, group {GROUP}, krot {KROT}; us")
    for dims in options.dims:
        parameters = make_rotation(dims, GROUP, KROT)
        candidates = forms(RotationTables(*map(mx.array, parameters), GROUP), options)
        print(f"| dims | rows | {' | '.join(candidates)} | chosen |")
        print("|" + "---|" * (len(candidates) + 3))
        for rows in options.rows:
            # scales near 1, or a chain of 20 leaves float16
            x = (mx.random.normal((rows, dims)) * 1e-3).astype(DTYPES[options.dtype])
            mx.eval(x)
            check(candidates, x, parameters)
            found = seconds(candidates, x, options.repeats, CHAIN)
            cells = [f"{1e6 * found[name]:.1f}" for name in candidates]
            cells.append(chosen(rows, dims, fewest))
            print(f"| {dims} | {rows} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
