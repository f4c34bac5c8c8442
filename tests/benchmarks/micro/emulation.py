"""Prints the errors of the emulated Metal kernel against float64, beside those of the reference.

    python -m tests.benchmarks.micro.emulation [--krot 1 8 16]

The kernel's source is compiled with g++ and every thread runs on the CPU, in shuffled order
(tests/helpers/emulation.py); the reference is plain MLX on the CPU. An error is
norm(y - expected) / norm(expected); the table has the largest one of each line. Without --krot all
from 1 to 17, in a minute or two.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from paroquant_stream.rotation import reference
from tests.helpers.emulation import Program
from tests.helpers.kernel_source import launch_of
from tests.helpers.rotations import (
    BOUNDS,
    error,
    make_rotation,
    make_x,
    rotate_float64,
    tables_of,
    to_float64,
)

GROUP_SIZES = (32, 64, 128)
KROTS = range(1, 18)
"""17: more than the registers of a lane hold at once for groups of 128."""
ROWS = (1, 7, 31, 32, 33, 70)
NAMES = {mx.float16: "float16", mx.bfloat16: "bfloat16", mx.float32: "float32"}


@dataclass
class Line:
    """The largest errors of one group size and dtype."""

    group_size: int
    dtype: mx.Dtype
    cases: int = 0
    kernel: float = 0.0
    reference: float = 0.0


def lines(krots: Iterable[int] = KROTS) -> Iterator[Line]:
    """Measure every combination of group size, krot, rows and dtype."""
    for group_size in GROUP_SIZES:
        for dtype in BOUNDS:
            yield measured(group_size, dtype, krots)


def measured(group_size: int, dtype: mx.Dtype, krots: Iterable[int]) -> Line:
    """One line of the table."""
    line, cases, dims = Line(group_size, dtype), [], 3 * group_size
    for krot in krots:
        parameters = make_rotation(dims, group_size, krot, seed=krot)
        tables = tables_of(parameters, group_size)
        x = make_x((max(ROWS), dims), dtype, seed=krot)
        expected = rotate_float64(to_float64(x), *parameters, group_size)
        cases += [(tables, x[:rows], expected[:rows], launch_of(x[:rows], tables)) for rows in ROWS]
    with tempfile.TemporaryDirectory() as folder:
        program = Program([launch for *_, launch in cases], Path(folder))
        for tables, x, expected, launch in cases:
            line.cases += 1
            line.kernel = max(line.kernel, error(program.run(launch, order=2), expected))
            line.reference = max(line.reference, error(reference.rotate(x, tables), expected))
    return line


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--krot", type=int, nargs="+", default=list(KROTS))
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    print("| group size | dtype | cases | Metal kernel, emulated | reference, CPU |")
    print("|---|---|---|---|---|")
    for line in lines(options.krot):
        found = f"{line.kernel:.1e} | {line.reference:.1e}"
        print(f"| {line.group_size} | {NAMES[line.dtype]} | {line.cases} | {found} |", flush=True)


if __name__ == "__main__":
    main()
