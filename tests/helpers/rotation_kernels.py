"""The Metal and CUDA kernels simulated in numpy, for machines without such a GPU."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from paroquant_stream.rotation import cuda, metal
from tests.helpers.rotations import to_float64


def rotate_tile(values, out, rows, group, group_size, coefficients):
    """Do the work of one threadgroup or warp: all rounds of a group for some rows."""
    channels = slice(group * group_size, (group + 1) * group_size)
    mine = slice(group * group_size // 2, (group + 1) * group_size // 2)
    words, cos, sin = (np.array(table)[:, mine] for table in coefficients)
    area = values[rows, channels].copy()
    for word, c, s in zip(words, cos, sin, strict=True):
        i, j = word & 0xFFFF, word >> 16
        a, b = area[:, i].copy(), area[:, j].copy()
        area[:, i], area[:, j] = a * c + b * s, b * c - a * s
    out[rows, channels] = area


def simulate_metal(monkeypatch, launches):
    """Replace the Metal kernel by numpy, which takes the rows as its SIMD groups do."""
    kernel = simulated_kernel(launches, "SIMD_GROUPS")
    monkeypatch.setattr(metal, "_kernel", lambda: kernel)  # private: MLX's function
    monkeypatch.setattr(metal, "on_metal", lambda: True)
    monkeypatch.setattr(metal, "_is_right", lambda *_: True)  # private: would launch it first


def simulate_cuda(monkeypatch, launches):
    """Replace the CUDA kernels by numpy, which takes the rows as its warps do."""
    kernel = simulated_kernel(launches, "WARPS")
    monkeypatch.setattr(cuda, "_kernel", lambda *_: kernel)  # private: MLX's function
    monkeypatch.setattr(cuda, "on_cuda", lambda: True)


def simulated_kernel(launches, most):
    """Make a kernel of 32 lanes a tile that notes tile and grid of each launch.

    `most` is the constant that bounds its tiles at once.
    """

    def launch(*, inputs, template, output_shapes, output_dtypes, grid, threadgroup):
        x, words, cos, sin, scales = inputs
        constants = dict(template)
        group_size, tile = constants["GROUP"], constants["ROWS"]
        (rows, dims), (lanes, together, _) = x.shape, threadgroup
        assert (lanes, words.dtype, x.dtype) == (32, mx.int32, constants["T"])
        assert words.shape == cos.shape == sin.shape == (constants["KROT"], dims // 2)
        assert scales.shape == (dims,)
        assert together <= constants[most]
        assert grid[1] % together == 0
        assert (rows, dims) == output_shapes[0]
        launches.append((tile, grid))
        values, out = to_float64(x) * to_float64(scales), np.full((rows, dims), np.nan)
        for first in range(grid[1]):
            for start in range(first * tile, rows, grid[1] * tile):
                for group in range(grid[0] // lanes):
                    here = slice(start, start + tile)
                    rotate_tile(values, out, here, group, group_size, (words, cos, sin))
        return [mx.array(out.astype(np.float32)).astype(output_dtypes[0])]

    return launch
