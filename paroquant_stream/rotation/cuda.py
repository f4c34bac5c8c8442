"""The rotation as two CUDA kernels, for few rows and for many: a warp per group and tile of rows.

For few rows the lanes of a warp share the pairs of a round, and every lane moves up to four rows of
a channel at once. Which channels meet is random, so their accesses collide in the banks of shared
memory, and every round ends at a barrier. For many rows each lane has a row of its own instead: all
lanes rotate the same pair, in banks of their own, and wait for nobody. Both compute each value by
the same two operations, so a row has the same bits in either.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import mlx.core as mx

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
MANY = 128
"""Rows from which each lane has a row of its own."""
_BATCH = 8
"""Pairs of a round whose loads are under way together, there."""
SHARED_BYTES = 48 << 10
"""The most shared memory of a block without asking for more."""
_INPUTS = ["x", "pairs", "cos_theta", "sin_theta", "channel_scales"]
_FEW_ROWS = """
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
_MANY_ROWS = """
  constexpr int LANES = 32;
  constexpr int PAIRS = GROUP / 2;
  constexpr int SHARE = (GROUP + LANES - 1) / LANES;  // channels that a lane loads of a row
  constexpr int PITCH = LANES + 1;  // floats from channel to channel, so that both ways of
                                    // access, along rows and along channels, meet every bank once
  struct alignas(16) Pair {
    int i, j;  // where the two channels begin
    float c, s;
  };
  __shared__ float area[WARPS][GROUP * PITCH];
  __shared__ Pair table[KROT * PAIRS];
  float* y = area[threadIdx.y];
  const int lane = threadIdx.x;
  const int group = blockIdx.x;
  const int rows = x_shape[0];
  const int dims = x_shape[1];
  const int begin = (blockIdx.y * WARPS + threadIdx.y) * LANES;

  for (int n = threadIdx.y * LANES + lane; n < KROT * PAIRS; n += WARPS * LANES) {
    const int at = (n / PAIRS * (dims / GROUP) + group) * PAIRS + n % PAIRS;
    const int word = pairs[at];
    table[n] = Pair{(word & 0xffff) * PITCH, (word >> 16) * PITCH, cos_theta[at], sin_theta[at]};
  }
  float scale[SHARE];
#pragma unroll
  for (int n = 0; n < SHARE; ++n) {
    const int i = lane + n * LANES;
    scale[n] = i < GROUP ? channel_scales[group * GROUP + i] : 0.0f;
  }
#pragma unroll 8
  for (int r = 0; r < LANES; ++r) {
    if (begin + r < rows) {
#pragma unroll
      for (int n = 0; n < SHARE; ++n) {
        const int i = lane + n * LANES;
        if (i < GROUP) {
          const int64_t at = int64_t(begin + r) * dims + group * GROUP + i;
          y[i * PITCH + r] = float(x[at]) * scale[n];
        }
      }
    }
  }
  __syncthreads();

  float* mine = y + lane;
  for (int first = 0; first < KROT * PAIRS; first += BATCH) {  // never over the end of a round
    Pair pair[BATCH];
    float a[BATCH], b[BATCH];
#pragma unroll
    for (int n = 0; n < BATCH; ++n) {
      pair[n] = table[first + n];
    }
#pragma unroll
    for (int n = 0; n < BATCH; ++n) {
      a[n] = mine[pair[n].i];
      b[n] = mine[pair[n].j];
    }
#pragma unroll
    for (int n = 0; n < BATCH; ++n) {
      mine[pair[n].i] = __fmaf_rn(b[n], pair[n].s, __fmul_rn(a[n], pair[n].c));
      mine[pair[n].j] = __fmaf_rn(-a[n], pair[n].s, __fmul_rn(b[n], pair[n].c));
    }
  }
  __syncwarp();

#pragma unroll 8
  for (int r = 0; r < LANES; ++r) {
    if (begin + r < rows) {
#pragma unroll
      for (int n = 0; n < SHARE; ++n) {
        const int i = lane + n * LANES;
        if (i < GROUP) {
          out[int64_t(begin + r) * dims + group * GROUP + i] = T(y[i * PITCH + r]);
        }
      }
    }
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
        source=_MANY_ROWS if many else _FEW_ROWS,
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
    many = count >= MANY and tables.group_size % (2 * _BATCH) == 0
    out = _of_many(rows, tables) if many else _of_few(rows, tables)
    return out.reshape(x.shape)


def _of_few(rows: mx.array, tables: RotationTables) -> mx.array:
    """Rotate rows whose channels the lanes of a warp share."""
    count = rows.shape[0]
    tile = 1 if count < 32 else _TILE
    warps = min(_WARPS, math.ceil(count / tile))
    blocks = math.ceil(count / (tile * warps))
    if blocks > _BLOCKS:
        blocks = max(_BLOCKS, blocks // 4)
    return _launch(rows, tables, warps, blocks, many=False, ROWS=tile, WARPS=_WARPS)


def _of_many(rows: mx.array, tables: RotationTables, batch: int = _BATCH) -> mx.array:
    """Rotate rows of which each lane has one."""
    group, pairs = tables.group_size, tables.krot * tables.group_size // 2
    warps = next(n for n in (4, 2, 1) if 4 * n * 33 * group + 16 * pairs <= SHARED_BYTES)
    blocks = math.ceil(rows.shape[0] / (32 * warps))
    return _launch(rows, tables, warps, blocks, many=True, BATCH=batch, WARPS=warps)


def _launch(
    rows: mx.array, tables: RotationTables, warps: int, blocks: int, many: bool, **more: int
) -> mx.array:
    """Launch blocks of warps for each group; `more`: constants of the kernel."""
    packed = tables.for_kernel(Tables)
    constants = {"T": rows.dtype, "GROUP": tables.group_size, "KROT": tables.krot, **more}
    (out,) = _kernel(many)(
        inputs=[rows, packed.pairs, packed.cos, packed.sin, packed.channel_scales],
        template=list(constants.items()),
        output_shapes=[rows.shape],
        output_dtypes=[rows.dtype],
        grid=(32 * tables.dims // tables.group_size, warps * blocks, 1),
        threadgroup=(32, warps, 1),
    )
    result: mx.array = out
    return result
