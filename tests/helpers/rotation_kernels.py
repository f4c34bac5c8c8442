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
    """Replace the package's Metal kernel by numpy, launched as the package launches it."""

    def get_kernel(tile):
        def launch(*, inputs, output_shapes, output_dtypes, grid, threadgroup):
            x, words, cos, sin, scales, sizes = inputs
            rows, dims, krot, group_size = sizes.tolist()
            threads = group_size // 2
            assert threadgroup == (threads, 1, 1)
            assert words.dtype == sizes.dtype == mx.int32
            assert words.shape == cos.shape == sin.shape == (krot, dims // 2)
            assert scales.shape == (dims,)
            assert (rows, dims) == x.shape == output_shapes[0]
            launches.append((tile, grid))
            values, out = to_float64(x) * to_float64(scales), np.zeros((rows, dims))
            for block in range(grid[0] // threads):
                for group in range(grid[1]):
                    here = slice(block * tile, (block + 1) * tile)
                    rotate_tile(values, out, here, group, group_size, (words, cos, sin))
            return [mx.array(out.astype(np.float32)).astype(output_dtypes[0])]

        return launch

    monkeypatch.setattr(metal, "on_metal", lambda: True)
    monkeypatch.setattr(metal, "package_kernel", lambda: get_kernel)


def simulate_cuda(monkeypatch, launches):
    """Replace the CUDA kernel by numpy, which takes the rows warp by warp as the kernel does."""

    def launch(*, inputs, template, output_shapes, output_dtypes, grid, threadgroup):
        x, words, cos, sin, scales = inputs
        constants = dict(template)
        group_size, tile = constants["GROUP"], constants["ROWS"]
        (rows, dims), (lanes, warps, _) = x.shape, threadgroup
        assert (lanes, words.dtype, x.dtype) == (32, mx.int32, constants["T"])
        assert words.shape == cos.shape == sin.shape == (constants["KROT"], dims // 2)
        assert scales.shape == (dims,)
        assert warps <= constants["WARPS"]
        assert (rows, dims) == output_shapes[0]
        launches.append((tile, grid))
        values, out = to_float64(x) * to_float64(scales), np.full((rows, dims), np.nan)
        for warp in range(grid[1]):
            for start in range(warp * tile, rows, grid[1] * tile):
                for group in range(grid[0] // lanes):
                    here = slice(start, start + tile)
                    rotate_tile(values, out, here, group, group_size, (words, cos, sin))
        return [mx.array(out.astype(np.float32)).astype(output_dtypes[0])]

    monkeypatch.setattr(cuda, "on_cuda", lambda: True)
    monkeypatch.setattr(cuda, "_kernel", lambda: launch)  # private: compiles the kernel
