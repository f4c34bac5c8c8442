"""The rotation as two CUDA kernels, for few rows and for many: a warp per group and tile of rows.

For few rows the lanes of a warp share the pairs of a round, and every lane moves up to four rows of
a channel at once. Which channels meet is random, so lanes collide in the banks of shared memory:
that limits many rows, where four or eight lanes share a pair instead (cuda_rows.py).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import mlx.core as mx

from .cuda_rows import ROWS_SOURCE, many_rows_launch, suits_many_rows
from .packed import Tables
from .tables import RotationTables

MAX_GROUP_SIZE = 128
MAX_KROT = 16
"""A lane keeps the coefficients of its pairs of every round in registers."""
_WARPS = 4
"""Most warps per block; each works on rows of its own, so none waits for another."""
_TILE = 4
"""Rows that a warp rotates at once, for inputs of 32 rows or more; other values were slower."""
_BLOCKS = 8
"""Above this many blocks a warp rotates four tiles in a row, to reuse its coefficients."""
_INPUTS = ["x", "pairs", "cos_theta", "sin_theta", "channel_scales"]
_SOURCE = """
  constexpr int LANES = 32;
  constexpr int SHARE = (GROUP / 2 + LANES - 1) / LANES;  // pairs of a round that a lane rotates
  using Column = AlignedVector<float, ROWS>;              // one channel of every row of a tile
  __shared__ Column area[WARPS][GROUP];
  Column* y = area[threadIdx.y];
  const int lane = threadIdx.x;
  const int group = blockIdx.x;
  const int rows = x_shape[0];
  const int dims = x_shape[1];

  int word[KROT][SHARE];
  float c[KROT][SHARE], s[KROT][SHARE];
#pragma unroll
  for (int k = 0; k < KROT; ++k) {
#pragma unroll
    for (int n = 0; n < SHARE; ++n) {
      const int pair = lane + n * LANES;
      if (pair < GROUP / 2) {
        const int at = (k * (dims / GROUP) + group) * (GROUP / 2) + pair;
        word[k][n] = pairs[at];
        c[k][n] = cos_theta[at];
        s[k][n] = sin_theta[at];
      }
    }
  }

  const int step = gridDim.y * blockDim.y * ROWS;
  for (int row = (blockIdx.y * blockDim.y + threadIdx.y) * ROWS; row < rows; row += step) {
    for (int i = lane; i < GROUP; i += LANES) {
      const int channel = group * GROUP + i;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (row + r < rows) {
          y[i][r] = float(x[int64_t(row + r) * dims + channel]) * channel_scales[channel];
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < KROT; ++k) {
#pragma unroll
      for (int n = 0; n < SHARE; ++n) {
        if (lane + n * LANES < GROUP / 2) {
          const int i = word[k][n] & 0xffff, j = word[k][n] >> 16;
          const Column a = y[i], b = y[j];
          Column a_rotated, b_rotated;
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            a_rotated[r] = __fmaf_rn(b[r], s[k][n], __fmul_rn(a[r], c[k][n]));
            b_rotated[r] = __fmaf_rn(-a[r], s[k][n], __fmul_rn(b[r], c[k][n]));
          }
          y[i] = a_rotated;
          y[j] = b_rotated;
        }
      }
      __syncwarp();  // the next round pairs the channels differently
    }
    for (int i = lane; i < GROUP; i += LANES) {
      const int channel = group * GROUP + i;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (row + r < rows) {
          out[int64_t(row + r) * dims + channel] = T(y[i][r]);
        }
      }
    }
    // A lane stores and loads the same channels, so the next tile needs no barrier.
  }
"""


def usable(tables: RotationTables) -> bool:
    """Return whether the kernel can run this rotation on the default device."""
    return on_cuda() and tables.group_size <= MAX_GROUP_SIZE and tables.krot <= MAX_KROT


def on_cuda() -> bool:
    """Return whether the default device is an NVIDIA GPU."""
    return mx.cuda.is_available() and mx.default_device() == mx.gpu


@cache
def _kernel(many: bool) -> Any:
    """Describe a kernel, once per process; MLX compiles it at the first call of each template."""
    return mx.fast.cuda_kernel(
        name="rotation_of_many" if many else "rotation",
        input_names=_INPUTS,
        output_names=["out"],
        source=ROWS_SOURCE if many else _SOURCE,
    )


def rotate(x: mx.array, tables: RotationTables) -> mx.array:
    """Scale and rotate the channels of `x` on the GPU; requires `usable(tables)`.

    Args:
        x: (..., dims) in float16, bfloat16 or float32.
        tables: Of the rotation.

    Returns:
        An array in the shape and dtype of `x`.
    """
    rows = x.reshape(-1, tables.dims)
    count = rows.shape[0]
    if count == 0:  # a launch needs a grid that is not empty
        return x
    many = suits_many_rows(count, tables.group_size)
    return (rotate_many if many else rotate_few)(rows, tables).reshape(x.shape)


def rotate_few(rows: mx.array, tables: RotationTables) -> mx.array:
    """Rotate (count, dims) by the kernel for few rows; requires `usable(tables)`."""
    count = rows.shape[0]
    tile = 1 if count < 32 else _TILE
    warps = min(_WARPS, math.ceil(count / tile))
    blocks = math.ceil(count / (tile * warps))
    if blocks > _BLOCKS:
        blocks = max(_BLOCKS, blocks // 4)
    return _launch(rows, tables, {"ROWS": tile, "WARPS": _WARPS}, warps, blocks)


def rotate_many(rows: mx.array, tables: RotationTables) -> mx.array:
    """Rotate (count, dims) by the kernel for many rows, in groups of one of ROW_GROUP_SIZES."""
    count, dims = rows.shape
    constants, blocks = many_rows_launch(count, dims, tables.group_size, tables.krot)
    return _launch(rows, tables, constants, constants["WARPS"], blocks)


def _launch(
    rows: mx.array, tables: RotationTables, constants: dict[str, int], warps: int, blocks: int
) -> mx.array:
    """Launch blocks of warps for each group; the kernel for many rows has a constant UNROLL."""
    template = {"T": rows.dtype, "GROUP": tables.group_size, "KROT": tables.krot} | constants
    packed = tables.for_kernel(Tables)
    out: mx.array
    (out,) = _kernel("UNROLL" in constants)(
        inputs=[rows, packed.pairs, packed.cos, packed.sin, packed.channel_scales],
        template=list(template.items()),
        output_shapes=[rows.shape],
        output_dtypes=[rows.dtype],
        grid=(32 * tables.dims // tables.group_size, warps * blocks, 1),
        threadgroup=(32, warps, 1),
    )
    return out
