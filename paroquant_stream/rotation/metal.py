"""The rotation as a Metal kernel: one SIMD group per group of channels and tile of rows.

No Mac has run it. tests/rotation/test_metal.py compiles the source that MLX generates of it as C++
and runs every thread (tests/helpers/emulated_metal.h): right by emulation, its speed unknown. So
before its first use it must give the results of plain MLX, or plain MLX is used instead.

A row alone is limited by the launch and by the latency of the tables: a rotation is one launch
without another operation around it, and a lane asks for its coefficients of all rounds at once,
before the first barrier. Many rows are limited by threadgroup memory: a lane moves four rows of a
channel as one float4, 2 KiB hold a tile of 128 channels, and the lanes of a SIMD group wait for
none but each other.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from . import reference
from .packed import Tables
from .tables import RotationTables

logger = logging.getLogger(__name__)

THREADGROUP_BYTES = 32_768
"""The most that Metal gives a threadgroup on Apple silicon."""
_TILE = 4
"""Rows that a SIMD group rotates at once, for inputs of 32 rows or more."""
MAX_GROUP_SIZE = THREADGROUP_BYTES // (4 * _TILE)
_SIMD_GROUPS = 4
"""Most SIMD groups per threadgroup; each works on rows of its own."""
_THREADGROUPS = 8
"""Above this many threadgroups a SIMD group rotates four tiles in a row, to reuse its registers."""
_NEAR = {mx.float16: 1e-2, mx.bfloat16: 8e-2, mx.float32: 1e-5}
"""How near values up to 8 are when they are equal but for rounding."""
_HEADER = """
template <int ROWS> struct Columns;  // one channel of every row of a tile
template <> struct Columns<1> { using type = float; };
template <> struct Columns<4> { using type = float4; };

inline float row_of(float column, int) { return column; }
inline float row_of(float4 column, int row) { return column[row]; }
inline void set_row(thread float& column, int, float value) { column = value; }
inline void set_row(thread float4& column, int row, float value) { column[row] = value; }
"""
_SOURCE = """
  using Column = typename Columns<ROWS>::type;
  constexpr int LANES = 32;
  constexpr int PAIRS = GROUP / 2;
  constexpr int SHARE = (PAIRS + LANES - 1) / LANES;  // pairs of a round that a lane rotates
  constexpr int KEPT = 32 / SHARE < KROT ? 32 / SHARE : KROT;  // rounds held in registers at once
  threadgroup Column area[SIMD_GROUPS * GROUP];
  const int mine = thread_position_in_threadgroup.y * GROUP;
  const int lane = thread_position_in_threadgroup.x;
  const int group = thread_position_in_grid.x / LANES;
  const int rows = x_shape[0];
  const int dims = x_shape[1];

  int word[KEPT * SHARE];
  float c[KEPT * SHARE], s[KEPT * SHARE];
  const int begin = thread_position_in_grid.y * ROWS;
  const int step = threads_per_grid.y * ROWS;
  for (int row = begin; row < rows; row += step) {
    for (int i = lane; i < GROUP; i += LANES) {
      const int channel = group * GROUP + i;
      const float scale = channel_scales[channel];
      Column column = Column(0.0f);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (row + r < rows) {
          set_row(column, r, float(x[size_t(row + r) * size_t(dims) + channel]) * scale);
        }
      }
      area[mine + i] = column;
    }
    for (int start = 0; start < KROT; start += KEPT) {
      if (KEPT < KROT || row == begin) {
#pragma unroll
        for (int m = 0; m < KEPT * SHARE; ++m) {
          const int k = start + m / SHARE;
          const int pair = lane * SHARE + m % SHARE;
          if (k < KROT && pair < PAIRS) {
            const int at = (k * (dims / GROUP) + group) * PAIRS + pair;
            word[m] = pairs[at];
            c[m] = cos_theta[at];
            s[m] = sin_theta[at];
          }
        }
      }
#pragma unroll
      for (int m = 0; m < KEPT * SHARE; ++m) {
        if (m % SHARE == 0) {
          simdgroup_barrier(mem_flags::mem_threadgroup);  // a round pairs the channels anew
        }
        if (start + m / SHARE < KROT && lane * SHARE + m % SHARE < PAIRS) {
          const int i = mine + (word[m] & 0xffff);
          const int j = mine + (word[m] >> 16);
          const Column a = area[i];
          const Column b = area[j];
          area[i] = metal::fma(b, Column(s[m]), a * c[m]);
          area[j] = metal::fma(-a, Column(s[m]), b * c[m]);
        }
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    // A lane stores and loads the same channels, so the next tile needs no barrier.
    for (int i = lane; i < GROUP; i += LANES) {
      const int channel = group * GROUP + i;
      const Column column = area[mine + i];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (row + r < rows) {
          out[size_t(row + r) * size_t(dims) + channel] = T(row_of(column, r));
        }
      }
    }
  }
"""


def usable(tables: RotationTables) -> bool:
    """Return whether the kernel can run this rotation on the default device."""
    return on_metal() and tables.group_size <= MAX_GROUP_SIZE


def on_metal() -> bool:
    """Return whether the default device is a Metal GPU."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


@cache
def _kernel() -> Any:
    """Describe the kernel, once per process; MLX compiles it at the first call of each template."""
    return mx.fast.metal_kernel(
        name="rotation",
        input_names=["x", "pairs", "cos_theta", "sin_theta", "channel_scales"],
        output_names=["out"],
        header=_HEADER,
        source=_SOURCE,
    )


def rotate(x: mx.array, tables: RotationTables) -> mx.array:
    """Scale and rotate the channels of `x` on the GPU; requires `usable(tables)`.

    Args:
        x: (..., dims) in float16, bfloat16 or float32.
        tables: Of the rotation.

    Returns:
        An array in the shape and dtype of `x`.
    """
    if x.size == 0:  # a launch needs a grid that is not empty
        return x
    if not _is_right(x.dtype, tables.group_size, tables.krot):
        return reference.rotate(x, tables)
    return _launch(x, tables)


@cache
def _is_right(dtype: mx.Dtype, group_size: int, krot: int) -> bool:
    """Return whether the kernel gives the reference's results here, tried once per process."""
    random = np.random.default_rng(0)
    pairs = np.stack([random.permutation(group_size) for _ in range(krot)]).astype(np.int16)
    theta, scales = random.uniform(-3, 3, (krot, group_size // 2)), np.ones((1, group_size))
    tables = RotationTables(mx.array(theta), mx.array(pairs), mx.array(scales), group_size)
    problem = "its results are wrong"
    try:
        x = mx.array(random.standard_normal((35, group_size)), dtype=mx.float32).astype(dtype)
        tried = [(_launch(some, tables), reference.rotate(some, tables)) for some in (x[:1], x)]
        if all(mx.allclose(y, right, rtol=0, atol=_NEAR[dtype]) for y, right in tried):
            return True
    except (RuntimeError, ValueError) as error:  # the source does not compile
        problem = str(error)
    logger.warning(
        "the rotation's Metal kernel does not work here, so plain MLX is used, which is slower; "
        "please report this: %s",
        problem,
    )
    return False


def _launch(x: mx.array, tables: RotationTables) -> mx.array:
    """Launch the kernel for at least one row."""
    rows = x.reshape(-1, tables.dims)
    count = rows.shape[0]
    packed = tables.for_kernel(Tables)
    tile = 1 if count < 32 else _TILE
    column = 4 * tile  # bytes
    most = min(_SIMD_GROUPS, THREADGROUP_BYTES // (column * tables.group_size))
    simd_groups = min(most, math.ceil(count / tile))
    threadgroups = math.ceil(count / (tile * simd_groups))
    if threadgroups > _THREADGROUPS:
        threadgroups = max(_THREADGROUPS, threadgroups // 4)
    constants = {
        "T": x.dtype,
        "GROUP": tables.group_size,
        "KROT": tables.krot,
        "ROWS": tile,
        "SIMD_GROUPS": most,
    }
    (out,) = _kernel()(
        inputs=[rows, packed.pairs, packed.cos, packed.sin, packed.channel_scales],
        template=list(constants.items()),
        output_shapes=[rows.shape],
        output_dtypes=[rows.dtype],
        grid=(32 * tables.dims // tables.group_size, simd_groups * threadgroups, 1),
        threadgroup=(32, simd_groups, 1),
    )
    result: mx.array = out.reshape(x.shape)
    return result
