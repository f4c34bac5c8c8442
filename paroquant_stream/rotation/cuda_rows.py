"""The body of the CUDA kernel for many rows, and how it is launched.

A warp rotates a tile of 32 rows of a group. The rows of a channel are 128 bytes side by side, which
eight lanes read at once, each four rows: so no two of them meet in a bank of shared memory. Where
that makes too few warps to hide latency, a tile has 16 rows, and eight lanes read two channels of
64 bytes: those of adjacent pairs, which the tables arrange (packed.py) to be in other banks.
"""

from __future__ import annotations

import math

MANY_ROWS = 64
"""From this many rows on the kernel is used."""
ROW_GROUP_SIZES = (32, 64, 128)
_UNROLL = 4
"""Steps of a round, of four or eight pairs, whose loads come before the first store; 2 ** n."""
_MOST_WARPS = 4
"""Most warps per block; they share its tables and each has a tile of its own."""
_FEWEST_BLOCKS = 8
"""With twice as many blocks of a group a warp rotates two tiles in a row, at most four."""
_SHARED_BYTES = 48 << 10
"""The most that a block can declare."""
_FEWEST_TILES = 4096
"""With fewer tiles of 32 rows they have 16."""
ROWS_SOURCE = """
  constexpr int LANES = 32;
  constexpr int PAIRS = GROUP / 2;
  constexpr int QUADS = ROWS / 4;
  constexpr int TOGETHER = LANES / QUADS;                    // pairs that a warp rotates at once
  constexpr int STEPS = PAIRS / TOGETHER;                    // of a round
  constexpr int BATCH = UNROLL < STEPS ? UNROLL : STEPS;
  constexpr int V = 16 / sizeof(T);                          // channels of a piece
  constexpr int WIDE = GROUP / V < 8 ? GROUP / V : 8;        // lanes side by side in a row
  constexpr int OWN = QUADS * 4 * WIDE / LANES;              // quads of rows that a lane moves
  constexpr int PIECES = GROUP * ROWS / (V * LANES);         // of a tile that a lane moves
  using Piece = AlignedVector<T, V>;
  using Scales = AlignedVector<float, V>;
  using Quad = AlignedVector<float, 4>;                      // four rows of a channel
  using Turn = AlignedVector<float, 2>;
  __shared__ Quad area[WARPS][GROUP * QUADS];
  __shared__ Turn turns[KROT * PAIRS];                       // cos, sin
  __shared__ int slots[KROT * PAIRS];                        // of i and j
  Quad* y = area[threadIdx.y];
  const int lane = threadIdx.x;
  const int group = blockIdx.x;
  const int rows = x_shape[0];
  const int dims = x_shape[1];
  const int quad = lane % QUADS;

  // Channels c and c + 16 lie side by side: their 16 rows are one half of 128 bytes each. The quads
  // of a channel are permuted, so that the lanes with pieces of a row meet no bank twice.
  auto home = [](int channel) { return channel / 32 * 32 + channel % 16 * 2 + channel / 16 % 2; };
  auto first_quad = [](int wide) { return (wide ^ wide / 2) % QUADS; };
  auto slot = [&](int channel) {
    return home(channel) * QUADS + first_quad(channel / V % WIDE);
  };
  // Piece n of a lane is in row `4 * quad_of(n) + row_of_quad` from channel `channel_of(n)` on.
  const int row_of_quad = lane / WIDE % 4;
  auto quad_of = [&](int n) { return n % OWN + lane / (4 * WIDE) * OWN; };
  auto channel_of = [&](int n) { return (n / OWN * WIDE + lane % WIDE) * V; };
  auto place = [&](int n, int v) -> float& {                 // of channel v of a piece in the tile
    const int channel = home(lane % WIDE * V) + n / OWN * WIDE * V + 2 * v;
    return y[channel * QUADS + (first_quad(lane % WIDE) ^ quad_of(n))][row_of_quad];
  };
  // Rows after the last are the last one again: each lane that has it stores the same bits.
  auto offset_of = [&](int row, int n) {
    const int r = row + 4 * quad_of(n) + row_of_quad;
    return int64_t(r < rows ? r : rows - 1) * dims + group * GROUP + channel_of(n);
  };

  const int step = gridDim.y * WARPS * ROWS;
  int row = (blockIdx.y * WARPS + threadIdx.y) * ROWS;
  const float* scales = channel_scales + group * GROUP;
  const bool aligned = is_aligned<V>(x);                     // not where it begins inside an array
  bool first = true;
  do {
    Piece piece[PIECES];
    if (aligned) {
#pragma unroll
      for (int n = 0; n < PIECES; ++n) {
        piece[n] = *reinterpret_cast<const Piece*>(x + offset_of(row, n));
      }
    }
    if (first) {                                             // while the first tile comes
#pragma unroll
      for (int m = 0; m < KROT * PAIRS; m += WARPS * LANES) {
        int n = m + threadIdx.y * LANES + lane;
        n = n < KROT * PAIRS ? n : KROT * PAIRS - 1;         // no branch, so all loads come first
        const int at = (n / PAIRS * (dims / GROUP) + group) * PAIRS + n % PAIRS;
        const int word = pairs[at];
        slots[n] = slot(word & 0xffff) | slot(word >> 16) << 16;
        Turn turn;
        turn[0] = cos_theta[at];
        turn[1] = sin_theta[at];
        turns[n] = turn;
      }
    }
    if (aligned) {
#pragma unroll
      for (int n = 0; n < PIECES; ++n) {
        const Scales scale = *reinterpret_cast<const Scales*>(scales + channel_of(n));
#pragma unroll
        for (int v = 0; v < V; ++v) {
          place(n, v) = float(piece[n][v]) * scale[v];
        }
      }
    } else {
      for (int n = 0; n < PIECES; ++n) {
        for (int v = 0; v < V; ++v) {
          place(n, v) = float(x[offset_of(row, n) + v]) * scales[channel_of(n) + v];
        }
      }
    }
    if (first) {
      __syncthreads();
      first = false;
    } else {
      __syncwarp();
    }
    for (int k = 0; k < KROT; ++k) {
      for (int n = 0; n < STEPS; n += BATCH) {  // all loads of a batch before its first store
        int i[BATCH], j[BATCH];
        Turn turn[BATCH];
        Quad a[BATCH], b[BATCH];
#pragma unroll
        for (int m = 0; m < BATCH; ++m) {
          const int at = k * PAIRS + (n + m) * TOGETHER + lane / QUADS;
          i[m] = (slots[at] & 0xffff) ^ quad;
          j[m] = (slots[at] >> 16) ^ quad;
          turn[m] = turns[at];
          a[m] = y[i[m]];
          b[m] = y[j[m]];
        }
#pragma unroll
        for (int m = 0; m < BATCH; ++m) {
          const float c = turn[m][0], s = turn[m][1];
          Quad a_rotated, b_rotated;
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            a_rotated[r] = __fmaf_rn(b[m][r], s, __fmul_rn(a[m][r], c));
            b_rotated[r] = __fmaf_rn(-a[m][r], s, __fmul_rn(b[m][r], c));
          }
          y[i[m]] = a_rotated;
          y[j[m]] = b_rotated;
        }
      }
      __syncwarp();  // the next round pairs the channels differently
    }
#pragma unroll
    for (int n = 0; n < PIECES; ++n) {
      Piece piece;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        piece[v] = T(place(n, v));
      }
      *reinterpret_cast<Piece*>(out + offset_of(row, n)) = piece;
    }
    row += step;
    // A lane stores and loads the same places, so the next tile needs no barrier.
  } while (row < rows);
"""


def suits_many_rows(count: int, group_size: int) -> bool:
    """Return whether the kernel is used for this many rows."""
    return count >= MANY_ROWS and group_size in ROW_GROUP_SIZES


def many_rows_launch(
    count: int, dims: int, group_size: int, krot: int
) -> tuple[dict[str, int], int]:
    """Return the constants of the kernel, and how many blocks of WARPS warps a group has."""
    tile = 16 if dims // group_size * math.ceil(count / 32) < _FEWEST_TILES else 32
    tables = 12 * krot * group_size // 2
    fitting = (_SHARED_BYTES - tables) // (4 * tile * group_size)
    warps = min(_MOST_WARPS, fitting)
    blocks = math.ceil(count / (tile * warps))
    in_a_row = max(1, min(4, blocks // _FEWEST_BLOCKS))
    constants = {"ROWS": tile, "WARPS": warps, "UNROLL": _UNROLL}
    return constants, math.ceil(blocks / in_a_row)
