// bf16 and fp16 trilinear kernel for every GPU from sm_80: cp.async, ldmatrix, mma.sync, fp32 state in registers.
// The notebook is ../DESIGN.md.
#pragma once

#include <type_traits>

#include "../../core/tile.h"
#include "../ptx/cp_async.cuh"
#include "../ptx/fence.cuh"
#include "../ptx/launch_order.cuh"
#include "../ptx/ldmatrix.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/warpgroup.cuh"
#include "../simt/element.cuh"
#include "../simt/units.cuh"
#include "../tile/decay.cuh"
#include "../tile/half_pair.cuh"
#include "../tile/shared_tile.cuh"
#include "../trilinear.h"

namespace la2::sm80 {

// ---- config

// kTileA: Da rounded up to a tile, the missing columns read as zero. kSlice: the columns of c and out of a block.
// kSplit: the two operands that are rounded from float32, the state and the weighted c, go in as a sum of two 16-bit
// numbers. The gradients need it for an error below that of their own rounding (../DESIGN.md); out does not.
// kStateOnly: only the state is gathered, from zero, into job.local, or a piece of it.
template <class T_, int kTileA_, int kSlice_, bool kSplit_, bool kSlopeGrad_, bool kStateOnly_>
struct Config {
  using T = T_;
  static constexpr int kTileA = kTileA_;
  static constexpr int kSlice = kSlice_;
  static constexpr bool kSplit = kSplit_;
  static constexpr bool kStateOnly = kStateOnly_;
  static constexpr bool kSlopeGrad = kSlopeGrad_;
  static_assert(!kStateOnly || !kSlopeGrad, "states have nothing of it");

  // 64 tokens; 32 where 256 columns would not leave two stages room in 99 KB of shared memory.
  static constexpr int kChunk = kTileA <= 128 ? 64 : 32;

  // Four more warps copy, and compute a chunk's scores while the others walk the chunk before.
  static constexpr bool kAhead = sm80_is_ahead({kTileA, kSlice, kChunk}, kSlopeGrad);
  static constexpr int kHelpers = kAhead ? 4 : 0;
  // Out instead has two roles of four warps (two_roles.cuh), of which these four more make the outputs.
  static constexpr bool kTwoRoles = kAhead && !kSplit && !kStateOnly;
  // Each of the others owns 16 columns of c and out; of two roles each warp 32.
  static constexpr int kBlockCols = kTwoRoles ? 2 : 1;  // in blocks of 16
  static constexpr int kWarpCols = 16 * kBlockCols;
  static constexpr int kWarps = kSlice / kWarpCols;
  static constexpr int kThreads = 32 * (kWarps + kHelpers);
  static constexpr int kCopyThreads = kAhead ? 32 * kHelpers : kThreads;
  // Gradients' main pass with helpers, which also store the results. The others do not wait for each other.
  static constexpr bool kGradientsAhead = kAhead && kSplit && !kStateOnly;

  // The scores [kChunk, kChunk] are shared out among the warps in bands of 16 rows, and columns within a band.
  static constexpr int kBands = kChunk / 16;
  static constexpr int kScoreWarps = kAhead ? kHelpers : kWarps;
  static constexpr int kBandCols = kChunk * kBands / kScoreWarps;
  static_assert(kBandCols % 16 == 0, "a warp computes whole 16x16 blocks of scores");

  using TileA = tile::SharedTile<T, kChunk, kTileA>;
  using TileC = tile::SharedTile<T, kChunk, kSlice>;
  using TileP = tile::SharedTile<T, kChunk, kChunk>;
  using TileOut = tile::SharedTile<T, kChunk, kWarpCols>;  // a warp's columns of out, of two roles

  static constexpr int kScoreTiles = kAhead ? 2 : 1;
  // The state pass has no a and no scores, and room for as many. With five, a helper was stuck issuing copies that
  // nobody waited for (../DESIGN.md).
  static constexpr int kStages = (kAhead && !kTwoRoles) || kStateOnly ? 3 : 2;
};

template <class Cfg>
struct SlopeGradStorage {
  typename Cfg::TileP scores;  // [C, C] masked, times the distance
  const typename Cfg::T* x;    // the operand that pairs with out, at this segment and slice
  float* chunk_dots;           // nullptr: not wanted of this job
  float dots[Cfg::kWarps][3];
};

enum class StorageOf { kOneRole, kStatePass, kTwoRoles };
template <class Cfg, StorageOf = Cfg::kStateOnly  ? StorageOf::kStatePass
                                 : Cfg::kTwoRoles ? StorageOf::kTwoRoles
                                                  : StorageOf::kOneRole>
struct SharedStorage {
  typename Cfg::TileA a[Cfg::kStages];           // [C, Da]
  typename Cfg::TileA b[Cfg::kStages];           // [C, Da]
  typename Cfg::TileC c[Cfg::kStages];           // [C, slice]
  typename Cfg::TileP scores[Cfg::kScoreTiles];  // [C, C] masked
  tile::Decay<Cfg::kChunk> decay;
  SlopeGradStorage<Cfg> slope_grad[Cfg::kSlopeGrad ? 1 : 0];
};
template <class Cfg>
struct SharedStorage<Cfg, StorageOf::kStatePass> {
  typename Cfg::TileA b[Cfg::kStages];
  typename Cfg::TileC c[Cfg::kStages];
  tile::Decay<Cfg::kChunk> decay;
};

// ---- registers of one warp

// The state, transposed: rows are 16 of this warp's columns of c, columns are Da. As accumulator of the update
// Z^T += c^T b it is laid out exactly as a . Z wants its B operand, so the state never passes through memory.
template <class Cfg>
using StateFragment = float[Cfg::kBlockCols][Cfg::kTileA / 8][4];
// 16 rows of out, 8 columns a piece; and all rows.
template <class Cfg>
using OutRows = float[2 * Cfg::kBlockCols][4];
template <class Cfg>
using OutFragment = OutRows<Cfg>[Cfg::kChunk / 16];

struct Lane {
  int warp, lane, group, pair;  // lane = 4 group + pair
  __device__ explicit Lane(unsigned thread = threadIdx.x)
      : warp(thread / 32), lane(thread % 32), group(lane / 4), pair(lane % 4) {}
};

// ---- steps of the chunk loop

template <class T, class Tile>
__device__ __forceinline__ void store_pair(Tile& tile, uint32_t byte_offset, const float (&value)[2]) {
  *reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(tile.data) + byte_offset) = tile::pack<T>(value[0], value[1]);
}

// Scores of 16 rows from `row` and kBlocks blocks of columns from `col` on, times M and intra, rounded, to shared
// memory. M_ij = lambda^|i-j| on the causal side, else 0.
template <class Cfg, int kBlocks>
__device__ __forceinline__ void mask_scores(typename Cfg::TileP& scores_tile, const float (&p)[2 * kBlocks][4],
                                            SharedStorage<Cfg>& smem, int row, int col, float intra, bool reverse,
                                            const Lane& me) {
  using T = typename Cfg::T;
  const tile::BlockAddress<typename Cfg::TileP> out{Cfg::TileP::offset(row + me.group, col / 8) + me.pair * 4u};
  const int distance = row + me.group - (col + me.pair * 2);
  const float* mask = smem.decay.along(reverse) + distance;
#pragma unroll
  for (int n = 0; n < 2 * kBlocks; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float value[2], slope_value[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int x = 8 * half - 8 * n - e;
        value[e] = p[n][2 * half + e] * (intra * mask[x]);
        slope_value[e] = value[e] * static_cast<float>(abs(distance + x));
      }
      const uint32_t where = out.at(8 * half, n);
      store_pair<T>(scores_tile, where, value);
      if constexpr (Cfg::kSlopeGrad) store_pair<T>(smem.slope_grad[0].scores, where, slope_value);
    }
}

// scores = M . (a b^T) * intra of a chunk, this warp's part.
template <class Cfg>
__device__ __forceinline__ void scores(typename Cfg::TileP& scores_tile, SharedStorage<Cfg>& smem, int stage,
                                       float intra, bool reverse, int score_warp, const Lane& me) {
  using T = typename Cfg::T;
  constexpr int kWarpsPerBand = Cfg::kScoreWarps / Cfg::kBands;
  constexpr int kBlocks = Cfg::kBandCols / 16;
  const int band = score_warp / kWarpsPerBand;
  const int first_block = (score_warp % kWarpsPerBand) * kBlocks;
  const auto a = tile::blocks_rows_first(smem.a[stage], band * 16, 0, me.lane);
  const auto b = tile::blocks_units_first(smem.b[stage], first_block * 16, 0, me.lane);

  if constexpr (Cfg::kGradientsAhead) {  // without the blocks that are all masked, two at once where there are two
    uint32_t fa[Cfg::kTileA / 16][4];
#pragma unroll
    for (int d = 0; d < Cfg::kTileA / 16; ++d) ptx::ldmatrix_x4(fa[d], a.at(0, 2 * d));
    const int end = reverse ? Cfg::kBands : band + 1;
    const auto compute = [&](int block, auto count) {
      constexpr int kCount = decltype(count)::value;
      float p[2 * kCount][4] = {};
#pragma unroll
      for (int d = 0; d < Cfg::kTileA / 16; ++d)
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          uint32_t fb[4];
          ptx::ldmatrix_x4(fb, b.at((block + j) * 16, 2 * d));
          ptx::mma<T>(p[2 * j], fa[d], fb[0], fb[1]);
          ptx::mma<T>(p[2 * j + 1], fa[d], fb[2], fb[3]);
        }
      mask_scores<Cfg, kCount>(scores_tile, p, smem, band * 16, block * 16, intra, reverse, me);
      return kCount;
    };
    for (int block = reverse ? band : 0; block < end;) {
      if (block % 2 == 0 && block + 2 <= end)  // even, as mask_scores needs it
        block += compute(block, std::integral_constant<int, 2>());
      else
        block += compute(block, std::integral_constant<int, 1>());
    }
    return;
  }
  // Unrolled whole, the widest instance would prefetch more operands than it has registers.
  constexpr int kUnroll = Cfg::kSlopeGrad && Cfg::kTileA > 128 ? 4 : Cfg::kTileA / 16;
  float p[2 * kBlocks][4] = {};
#pragma unroll kUnroll
  for (int d = 0; d < Cfg::kTileA / 16; ++d) {
    uint32_t fa[4];
    ptx::ldmatrix_x4(fa, a.at(0, 2 * d));
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      uint32_t fb[4];
      ptx::ldmatrix_x4(fb, b.at(j * 16, 2 * d));
      ptx::mma<T>(p[2 * j], fa, fb[0], fb[1]);
      ptx::mma<T>(p[2 * j + 1], fa, fb[2], fb[3]);
    }
  }
  mask_scores<Cfg, kBlocks>(scores_tile, p, smem, band * 16, first_block * 16, intra, reverse, me);
}

// fp16 ends at 65504 above and loses digits from 2^-14 on below; a state does not. The power of two that brings the
// largest |Z| of the warp to [2^13, 2^14), and its inverse; 1 and 1 for bf16, which has float32's range.
template <class Cfg>
__device__ __forceinline__ float2 operand_range(const StateFragment<Cfg>& z) {
  if constexpr (sizeof(typename Cfg::T) != 2 || !std::is_same<typename Cfg::T, __half>::value) return {1.f, 1.f};
  float largest = 0.f;
#pragma unroll
  for (int g = 0; g < Cfg::kBlockCols; ++g)
#pragma unroll
    for (int n = 0; n < Cfg::kTileA / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(z[g][n][i]));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
  const int shift = exponent > -100 && exponent < 127 ? exponent - 13 : 0;
  return {__uint_as_float(static_cast<uint32_t>(127 - shift) << 23),
          __uint_as_float(static_cast<uint32_t>(127 + shift) << 23)};
}

// out = diag(inter lambda^n) a Z, n = i + 1 (reverse: rows - 1 - i). kGradientsAhead: also the update's first step,
// Z = lambda^rows Z, among the products, where it takes no time.
template <class Cfg>
__device__ __forceinline__ void inter(OutFragment<Cfg>& out, StateFragment<Cfg>& z, SharedStorage<Cfg>& smem, int stage,
                                      float factor, bool reverse, int rows, const Lane& me) {
  using T = typename Cfg::T;
  const auto a = tile::blocks_rows_first(smem.a[stage], 0, 0, me.lane);
  const float2 range = operand_range<Cfg>(z);
  const float state_decay = Cfg::kGradientsAhead ? smem.decay.ascending()[rows] : 1.f;
  // Two sets: 16 columns of a are loaded while the products with those before them are computed.
  uint32_t operands[2][Cfg::kChunk / 16][4];
  const auto load = [&](int d) {
#pragma unroll
    for (int m = 0; m < Cfg::kChunk / 16; ++m) ptx::ldmatrix_x4(operands[d % 2][m], a.at(m * 16, 2 * d));
  };
  if constexpr (Cfg::kGradientsAhead) load(0);
#pragma unroll
  for (int d = 0; d < Cfg::kTileA / 16; ++d) {
    uint32_t fz[2 * Cfg::kBlockCols][2], fz_rest[2 * Cfg::kBlockCols][2];
#pragma unroll
    for (int t = 0; t < 2 * Cfg::kBlockCols; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* pair = z[t / 2][2 * d + i] + 2 * (t % 2);
        tile::split_pair<T>(pair[0] * range.x, pair[1] * range.x, fz[t][i], fz_rest[t][i]);
        if constexpr (Cfg::kGradientsAhead) pair[0] *= state_decay, pair[1] *= state_decay;
      }
    if (Cfg::kGradientsAhead && d + 1 < Cfg::kTileA / 16) load(d + 1);
#pragma unroll
    for (int m = 0; m < Cfg::kChunk / 16; ++m) {
      uint32_t (&fa)[4] = operands[d % 2][m];
      if constexpr (!Cfg::kGradientsAhead) ptx::ldmatrix_x4(fa, a.at(m * 16, 2 * d));
#pragma unroll
      for (int t = 0; t < 2 * Cfg::kBlockCols; ++t) ptx::mma<T>(out[m][t], fa, fz[t][0], fz[t][1]);
      if constexpr (Cfg::kSplit) {
#pragma unroll
        for (int t = 0; t < 2 * Cfg::kBlockCols; ++t) ptx::mma<T>(out[m][t], fa, fz_rest[t][0], fz_rest[t][1]);
      }
    }
  }
  const float* decay = smem.decay.along(reverse) + (me.group + (reverse ? 1 - rows : 1));
#pragma unroll
  for (int m = 0; m < Cfg::kChunk / 16; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float weight = factor * decay[m * 16 + 8 * half] * range.y;
#pragma unroll
      for (int t = 0; t < 2 * Cfg::kBlockCols; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e) out[m][t][2 * half + e] *= weight;
    }
}

// 16 tokens of this warp's columns of c, as B operand of scores . c; the same registers are c^T as the A operand of the
// state update.
template <class Cfg>
using Values = uint32_t[Cfg::kBlockCols][4];

template <class Cfg>
struct ValueBlocks {
  tile::BlockAddress<typename Cfg::TileC> first;
  __device__ __forceinline__ ValueBlocks(const typename Cfg::TileC& c, const Lane& me)
      : first(Cfg::kGradientsAhead ? tile::blocks_rows_first(c, 0, 2 * Cfg::kBlockCols * me.warp, me.lane)
                                   : tile::blocks_units_first(c, 0, 2 * Cfg::kBlockCols * me.warp, me.lane)) {}
  __device__ __forceinline__ void load(Values<Cfg>& values, int k) const {
#pragma unroll
    for (int g = 0; g < Cfg::kBlockCols; ++g) {
      ptx::ldmatrix_x4_trans(values[g], first.at(k * 16, 2 * g));
      if constexpr (Cfg::kGradientsAhead) {  // loaded with the two registers of a B operand side by side: fewer moves
        const uint32_t second = values[g][1];
        values[g][1] = values[g][2], values[g][2] = second;
      }
    }
  }
};

// out += scores c for 16 rows, of block m, and 16 tokens, of block k.
template <class Cfg>
__device__ __forceinline__ void intra_block(OutRows<Cfg>& out, const tile::BlockAddress<typename Cfg::TileP>& scores,
                                            int m, int k, const Values<Cfg>& c) {
  using T = typename Cfg::T;
  uint32_t fp[4];
  ptx::ldmatrix_x4(fp, scores.at(m * 16, 2 * k));
#pragma unroll
  for (int t = 0; t < 2 * Cfg::kBlockCols; ++t) ptx::mma<T>(out[t], fp, c[t / 2][t % 2], c[t / 2][t % 2 + 2]);
}

// out += scores c, without the blocks that are all masked.
template <class Cfg, bool kReverse>
__device__ __forceinline__ void intra(OutFragment<Cfg>& out, const typename Cfg::TileP& scores_tile,
                                      const typename Cfg::TileC& c_tile, const Lane& me) {
  const auto scores = tile::blocks_rows_first(scores_tile, 0, 0, me.lane);
  const ValueBlocks<Cfg> blocks(c_tile, me);
#pragma unroll
  for (int k = 0; k < Cfg::kChunk / 16; ++k) {
    Values<Cfg> c;
    blocks.load(c, k);
#pragma unroll
    for (int m = 0; m < Cfg::kChunk / 16; ++m) {
      if (kReverse ? k < m : k > m) continue;
      intra_block<Cfg>(out[m], scores, m, k, c);
    }
  }
}

template <class Cfg>
__device__ __forceinline__ void scale_state(StateFragment<Cfg>& z, float factor) {
#pragma unroll
  for (int g = 0; g < Cfg::kBlockCols; ++g)
#pragma unroll
    for (int n = 0; n < Cfg::kTileA / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) z[g][n][i] *= factor;
}

// Z += b^T diag(update lambda^n) c, n = rows - 1 - j (reverse: j + 1). The weights go onto c, of which a warp holds 16
// columns, and not onto b, of which it would have to scale all.
template <class Cfg>
__device__ __forceinline__ void add_chunk(StateFragment<Cfg>& z, const typename Cfg::TileA& b_tile,
                                          const typename Cfg::TileC& c_tile, const tile::Decay<Cfg::kChunk>& decay,
                                          float factor, bool reverse, int rows, const Lane& me) {
  using T = typename Cfg::T;
  const auto b = tile::blocks_rows_first(b_tile, 0, 0, me.lane);
  const ValueBlocks<Cfg> values(c_tile, me);
  const float* weights = decay.against(reverse) + (me.pair * 2 + (reverse ? 1 : 1 - rows));
  constexpr int kUnroll = Cfg::kTileA > 128 ? 1 : Cfg::kChunk / 16;  // for want of registers
#pragma unroll kUnroll
  for (int k = 0; k < Cfg::kChunk / 16; ++k) {
    Values<Cfg> c, weighted, rest;
    values.load(c, k);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float weight[2] = {factor * weights[k * 16 + 8 * half], factor * weights[k * 16 + 8 * half + 1]};
#pragma unroll
      for (int g = 0; g < Cfg::kBlockCols; ++g)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const float2 value = tile::unpack<T>(c[g][i]);
          tile::split_pair<T>(value.x * weight[0], value.y * weight[1], weighted[g][i], rest[g][i]);
        }
    }
#pragma unroll
    for (int d = 0; d < Cfg::kTileA / 16; ++d) {
      uint32_t fb[4];
      ptx::ldmatrix_x4_trans(fb, b.at(k * 16, 2 * d));
#pragma unroll
      for (int g = 0; g < Cfg::kBlockCols; ++g) {
        ptx::mma<T>(z[g][2 * d], weighted[g], fb[0], fb[1]);
        ptx::mma<T>(z[g][2 * d + 1], weighted[g], fb[2], fb[3]);
        if constexpr (Cfg::kSplit) {
          ptx::mma<T>(z[g][2 * d], rest[g], fb[0], fb[1]);
          ptx::mma<T>(z[g][2 * d + 1], rest[g], fb[2], fb[3]);
        }
      }
    }
  }
}

// Z = lambda^rows Z + that; kGradientsAhead: inter has decayed it.
template <class Cfg>
__device__ __forceinline__ void update_state(StateFragment<Cfg>& z, SharedStorage<Cfg>& smem, int stage, float factor,
                                             bool reverse, int rows, const Lane& me) {
  if constexpr (!Cfg::kGradientsAhead) scale_state<Cfg>(z, smem.decay.ascending()[rows]);
  add_chunk<Cfg>(z, smem.b[stage], smem.c[stage], smem.decay, factor, reverse, rows, me);
}

// The four lanes of a quad hold w[i] = item i, part `pair`; afterwards lane `pair` holds item `pair`, part i.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4], int pair) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, pair & 1 ? w[i] : w[i + 1], 1);
    (pair & 1 ? w[i] : w[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, pair & 2 ? w[i] : w[i + 2], 2);
    (pair & 2 ? w[i] : w[i + 2]) = other;
  }
}

// Rows [0, rows) of the warp's columns, 16 bytes a lane.
template <class Cfg>
__device__ __forceinline__ void store_out(typename Cfg::T* out, int64_t stride, const OutFragment<Cfg>& o, int rows,
                                          int cols, const Lane& me) {
  using T = typename Cfg::T;
#pragma unroll
  for (int m = 0; m < Cfg::kChunk / 16; ++m)
#pragma unroll
    for (int g = 0; g < Cfg::kBlockCols; ++g) {
      const float (&left)[4] = o[m][2 * g], (&right)[4] = o[m][2 * g + 1];
      uint32_t w[4] = {tile::pack<T>(left[0], left[1]), tile::pack<T>(right[0], right[1]),
                       tile::pack<T>(left[2], left[3]), tile::pack<T>(right[2], right[3])};
      transpose_quad(w, me.pair);
      const int row = m * 16 + me.group + 8 * (me.pair >> 1);
      const int col = me.warp * Cfg::kWarpCols + g * 16 + (me.pair & 1) * 8;
      if (row < rows && col < cols) *reinterpret_cast<uint4*>(out + row * stride + col) = {w[0], w[1], w[2], w[3]};
    }
}

// Rounded, and so in half the registers.
template <class Cfg>
using PackedOut = uint32_t[Cfg::kChunk / 16][2 * Cfg::kBlockCols][2];

template <class Cfg>
__device__ __forceinline__ void pack_out(PackedOut<Cfg>& packed, const OutFragment<Cfg>& o) {
#pragma unroll
  for (int m = 0; m < Cfg::kChunk / 16; ++m)
#pragma unroll
    for (int t = 0; t < 2 * Cfg::kBlockCols; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        packed[m][t][half] = tile::pack<typename Cfg::T>(o[m][t][2 * half], o[m][t][2 * half + 1]);
}

// Into the tile of c, in place of this warp's columns, which no other warp reads and which this one is done with.
template <class Cfg>
__device__ __forceinline__ void stage_out(typename Cfg::TileC& c, const PackedOut<Cfg>& packed, const Lane& me) {
  const tile::BlockAddress<typename Cfg::TileC> to{Cfg::TileC::offset(me.group, 2 * Cfg::kBlockCols * me.warp) +
                                                   me.pair * 4u};
  __syncwarp();  // all lanes have read c
#pragma unroll
  for (int m = 0; m < Cfg::kChunk / 16; ++m)
#pragma unroll
    for (int t = 0; t < 2 * Cfg::kBlockCols; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(c.data) + to.at(m * 16 + 8 * half, t)) =
            packed[m][t][half];
}

// And from there to global memory by the helpers, whole rows. What a thread reads is what its next copy into the tile
// overwrites, and no other's.
template <class Cfg>
__device__ __forceinline__ void store_staged(typename Cfg::T* out, int64_t stride, const typename Cfg::TileC& staged,
                                             int rows, int cols, int helper) {
  using Rounds = tile::CopyRounds<typename Cfg::TileC, Cfg::kCopyThreads>;
  const Rounds rounds(helper);
  uint4 row[Rounds::kCount];
#pragma unroll
  for (int i = 0; i < Rounds::kCount; ++i)
    row[i] = *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(staged.data) + rounds.offset(i));
  const int count = rounds.count_within(rows, cols);
  out += rounds.row * stride + rounds.unit * 8;
#pragma unroll
  for (int i = 0; i < Rounds::kCount; ++i, out += Rounds::kRows * stride)
    if (i < count) *reinterpret_cast<uint4*>(out) = row[i];
}

// ---- the state in global memory

// Calls body(element of z, pointer to the state's element) for what this lane holds of [Da, slice of Dc].
template <class Cfg, class Element, class Body>
__device__ __forceinline__ void for_each_state_element(StateFragment<Cfg>& z, Element* state, int64_t stride_d,
                                                       int64_t stride_e, int dim_a, int cols, const Lane& me,
                                                       const Body& body) {
  const int first = me.warp * Cfg::kWarpCols;
  Element* at = state + me.pair * 2 * stride_d + (first + me.group) * stride_e;
#pragma unroll
  for (int n = 0; n < Cfg::kTileA / 8; ++n) {
    if (n * 8 < dim_a) {
#pragma unroll
      for (int g = 0; g < Cfg::kBlockCols; ++g)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int col = 16 * g + 8 * (i >> 1);
          if (first + col < cols) body(z[g][n][i], at + (i & 1) * stride_d + col * stride_e);
        }
    }
    at += 8 * stride_d;
    if (Cfg::kSlopeGrad && n % 8 == 7) ptx::scheduling_fence();  // all loads at once would need too many registers
  }
}

// ---- mainloop

constexpr int kFewChunks = 16;  // 0.7 us by a load of the slope, of 17 us and more (estimated)

// 16 rows of x . out, this lane's part, with and without the row's distance to the edge the state enters at.
template <class Cfg>
__device__ __forceinline__ void dot_rows(float& plain, float& weighted, const OutRows<Cfg>& out, int m,
                                         const typename Cfg::T* x, int64_t stride, bool reverse, int rows, int cols,
                                         const Lane& me) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = m * 16 + me.group + 8 * half;
    const float n = static_cast<float>(reverse ? rows - 1 - row : row + 1);
#pragma unroll
    for (int tile = 0; tile < 2 * Cfg::kBlockCols; ++tile) {
      const int col = me.warp * Cfg::kWarpCols + tile * 8 + me.pair * 2;
      if (row >= rows || col >= cols) continue;
      const float2 value = tile::unpack<typename Cfg::T>(*reinterpret_cast<const uint32_t*>(x + row * stride + col));
      const float dot = out[tile][2 * half] * value.x + out[tile][2 * half + 1] * value.y;
      plain += dot;
      weighted += n * dot;
    }
  }
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// One block walks one segment of one sequence, for one head and one slice of Dc.
//
// Grid: x = slices x heads x units (slices fastest, so that the blocks sharing a and b run together), y = jobs, z = the
// state pass's pieces, those that every segment has first.
// kAhead: x = slices x heads x jobs x units, since a sequence's last one may be short and fill what others leave;
// in the state pass slices x jobs x units x heads, the last head first, whose slope is the flattest as a rule and its
// window the longest.
//
// Chunk by chunk:   copy(i+1) ...................................................
//                   | scores(i), inter(i) | barrier | intra(i), out(i), update(i) | barrier
// kGradientsAhead:
//        helpers:   | copy(i+2) of a and b, scores(i+1) | out(i-1), copy(i+2) of c
//         others:   | inter(i), intra(i), update(i), results into c's tile
// kAhead, the state pass:
//        helpers:   | copy(i+2)
//         others:   | update(i)
template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    la2_trilinear_sm80_kernel(const __grid_constant__ TrilinearParams p) {
  using T = typename Cfg::T;
  constexpr bool kStateOnly = Cfg::kStateOnly;
  constexpr bool kPool = !Cfg::kSplit;  // states may be those of a pool; gradients' are not
  extern __shared__ __align__(128) char raw[];
  SharedStorage<Cfg>& smem = *reinterpret_cast<SharedStorage<Cfg>*>(raw);
  const Lane me;
  const Division& by_slices = p.jobs[0].by_slices;
  const int group = by_slices.small_quotient(blockIdx.x);
  const int slice = static_cast<int>(blockIdx.x) - group * static_cast<int>(by_slices.divisor);
  int unit_idx, head, job_idx = static_cast<int>(blockIdx.y);
  if constexpr (!Cfg::kAhead) {
    unit_idx = p.by_heads.small_quotient(group), head = group - unit_idx * static_cast<int>(p.sizes.heads);
  } else {
    int unit_and_job;
    if constexpr (kStateOnly) {
      const int of_head = static_cast<int>(p.num_units) * p.num_jobs, heads_before = group / of_head;
      unit_and_job = group - heads_before * of_head;
      head = static_cast<int>(p.sizes.heads) - 1 - heads_before;
    } else {
      unit_and_job = p.by_heads.small_quotient(group);
      head = group - unit_and_job * static_cast<int>(p.sizes.heads);
    }
    unit_idx = p.num_jobs == 1 ? unit_and_job : p.num_jobs == 2 ? unit_and_job / 2 : unit_and_job / kMaxJobs;
    job_idx = unit_and_job - unit_idx * p.num_jobs;
  }
  const TrilinearJob& job = p.jobs[job_idx];
  const bool reverse = job.reverse;
  const int first_col = slice * Cfg::kSlice;
  const int cols = min(job.dim_c - first_col, Cfg::kSlice);
  ptx::launch_dependents();
  const simt::Unit unit = simt::find_unit(p, unit_idx);
  if (cols <= 0 || !unit.valid) {
    ptx::wait_for_previous_kernel();  // as below
    return;
  }
  const bool is_last = unit.segment == (reverse ? 0 : unit.num_segments - 1);  // in the order of the sweep
  if (kStateOnly && is_last && !p.states_alone) return;

  const T* a = simt::first_row<const T>(job.a, unit, head);
  const T* b = simt::first_row<const T>(job.b, unit, head);
  const T* c = simt::first_row<const T>(job.c, unit, head, first_col);
  T* out = simt::first_row<T>(job.out, unit, head, first_col);

  // The dots count the slices of their own job; a launch has as many as its widest job.
  const int job_slices = (job.dim_c + Cfg::kSlice - 1) / Cfg::kSlice;
  if constexpr (Cfg::kSlopeGrad) {
    if (threadIdx.x == 0) {  // kept in shared memory: the registers are full
      const int64_t slot = simt::first_slot_of_unit(unit, p.segment_len, Cfg::kChunk);
      smem.slope_grad[0].x = simt::first_row<const T>(job.x, unit, head, first_col);
      smem.slope_grad[0].chunk_dots =
          job.dots == nullptr
              ? nullptr
              : static_cast<float*>(job.dots) + ((slot * p.sizes.heads + head) * job_slices + slice) * 3;
    }
  }

  const int num_chunks = static_cast<int>((unit.length + Cfg::kChunk - 1) / Cfg::kChunk);
  auto chunk_at = [&](int step) { return reverse ? num_chunks - 1 - step : step; };
  auto rows_of = [&](int chunk) {
    return static_cast<int>(min(unit.length - static_cast<int64_t>(chunk) * Cfg::kChunk, int64_t{Cfg::kChunk}));
  };
  constexpr int kStages = Cfg::kStages;
  const int copier = static_cast<int>(threadIdx.x) - (Cfg::kThreads - Cfg::kCopyThreads);
  int first_step = 0, end_step = num_chunks;
  auto start_copy = [&](int step) {
    const int chunk = chunk_at(step), rows = rows_of(chunk), stage = step % kStages;
    const int64_t row = static_cast<int64_t>(chunk) * Cfg::kChunk;
    if constexpr (!kStateOnly)
      tile::copy_rows_async<typename Cfg::TileA, Cfg::kCopyThreads>(
          tile::shared_address(smem.a[stage].data), a + row * job.a.stride_n, job.a.stride_n, rows, job.dim_a, copier);
    tile::copy_rows_async<typename Cfg::TileA, Cfg::kCopyThreads>(
        tile::shared_address(smem.b[stage].data), b + row * job.b.stride_n, job.b.stride_n, rows, job.dim_a, copier);
    tile::copy_rows_async<typename Cfg::TileC, Cfg::kCopyThreads>(
        tile::shared_address(smem.c[stage].data), c + row * job.c.stride_n, job.c.stride_n, rows, cols, copier);
  };
  // kGradientsAhead: in two parts, since the results leave c's tile later.
  auto copy = [&](auto& to, const T* from, int64_t stride, int columns, int step) {
    const int chunk = chunk_at(step), rows = rows_of(chunk);
    tile::copy_in_rounds_async<Cfg::kCopyThreads>(to, from + static_cast<int64_t>(chunk) * Cfg::kChunk * stride, stride,
                                                  rows, columns, copier);
  };
  auto start_copy_of_ab = [&](int step) {
    if constexpr (Cfg::kGradientsAhead) {
      if (step >= end_step) return;
      copy(smem.a[step % kStages], a, job.a.stride_n, job.dim_a, step);
      copy(smem.b[step % kStages], b, job.b.stride_n, job.dim_a, step);
    }
  };
  auto start_copy_of_c = [&](int step) {
    if constexpr (Cfg::kGradientsAhead)
      if (step < end_step) copy(smem.c[step % kStages], c, job.c.stride_n, cols, step);
  };
  // Behind it chunk `step` is there (kGradientsAhead: and its scores), and everyone is done with the one before.
  // Helpers and the others come to it from different places, so each arrives for the other: these at kTaken once they
  // are past kFilled, those the next time at kFilled once they are past kTaken. kGradientsAhead: each of the others has
  // a kFilled of its own with the helpers, so that none of them waits for the rest of them unless it is a chunk ahead.
  constexpr int kParties = Cfg::kGradientsAhead ? Cfg::kWarps : 1;
  constexpr int kFilledThreads = 32 * (Cfg::kHelpers + Cfg::kWarps / kParties);
  enum NamedBarrier { kFilled = 1, kTaken = kFilled + kParties };
  auto meet = [&] {
    if constexpr (Cfg::kAhead) {
      ptx::named_barrier_sync(kFilled + (kParties > 1 ? me.warp : 0), kFilledThreads);
      ptx::named_barrier_arrive(kTaken, Cfg::kThreads);
    } else {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();
    }
  };
  auto arrive_as_helper = [&] {
#pragma unroll
    for (int party = 0; party < kParties; ++party) ptx::named_barrier_arrive(kFilled + party, kFilledThreads);
  };
  auto meet_as_helper = [&] {
    ptx::cp_async_wait<Cfg::kGradientsAhead ? 0 : kStages - 2>();
    arrive_as_helper();
    ptx::named_barrier_sync(kTaken, Cfg::kThreads);
  };
  // What those who copy do then, but for kGradientsAhead.
  auto start_next_copy = [&](int step) {
    if (step + kStages - 1 < end_step) start_copy(step + kStages - 1);
    ptx::cp_async_commit();
  };
  const bool helps = Cfg::kAhead && me.warp >= Cfg::kWarps;
  // What decay leaves nothing of need not be gathered. Few chunks are not worth waiting for the slope.
  if (kStateOnly && !p.states_alone) {
    const int piece = static_cast<int>(blockIdx.z);
    if (piece > 0 && piece >= simt::pieces_of(p, simt::slope_of<float>(p, unit.sequence, head), unit.length)) return;
    if (num_chunks > kFewChunks)
      first_step =
          num_chunks - simt::window_chunks<Cfg::kChunk>(simt::slope_of<float>(p, unit.sequence, head), num_chunks);
    const int piece_chunks = p.piece_chunks * (simt::kWindowChunk / Cfg::kChunk);
    end_step -= piece * piece_chunks;
    if (piece + 1 < p.num_pieces) first_step = max(first_step, end_step - piece_chunks);
  }
  if (!Cfg::kAhead || helps) {
    if constexpr (Cfg::kGradientsAhead) {
      start_copy_of_ab(first_step);
      start_copy_of_c(first_step);
      ptx::cp_async_commit();
    } else {
      for (int step = first_step; step < first_step + kStages - 1; ++step) {
        if (step < end_step) start_copy(step);
        ptx::cp_async_commit();
      }
    }
  }
  smem.decay.fill(simt::slope_of<float>(p, unit.sequence, head), threadIdx.x, Cfg::kThreads);
  if (helps) {
    if constexpr (Cfg::kGradientsAhead) {
      auto score = [&](int step) {
        if (step < end_step)
          scores<Cfg>(smem.scores[step % 2], smem, step % kStages, static_cast<float>(job.intra), reverse,
                      me.warp - Cfg::kWarps, me);
      };
      auto store = [&](int step) {  // the others have waited for the kernel before this one
        const int chunk = chunk_at(step);
        const int64_t row = static_cast<int64_t>(chunk) * Cfg::kChunk;
        if (step >= first_step)
          store_staged<Cfg>(out + row * job.out.stride_n, job.out.stride_n, smem.c[step % kStages], rows_of(chunk),
                            cols, copier);
      };
      meet_as_helper();
      for (int step = first_step - 1; step < end_step; ++step) {  // chunk step - 1 is done with
        start_copy_of_ab(step + 2);
        ptx::cp_async_commit();
        score(step + 1);
        ptx::cp_async_wait<1>();  // c of step + 1
        arrive_as_helper();
        store(step - 1);
        start_copy_of_c(step + 2);
        ptx::cp_async_commit();
        ptx::cp_async_wait<1>();  // a and b of step + 2
        ptx::named_barrier_sync(kTaken, Cfg::kThreads);
      }
      store(end_step - 1);
    } else {
      for (int step = first_step; step < end_step; ++step) {
        meet_as_helper();
        start_next_copy(step);
      }
    }
    return;
  }
  if (Cfg::kGradientsAhead) meet();
  // The combine pass, whose states this one starts from; and whoever waits for this kernel waits for that one too.
  ptx::wait_for_previous_kernel();

  // Z as it enters this segment.
  StateFragment<Cfg> z = {};
  const void* entering = p.is_cut ? job.local.data : job.initial.data;
  const int64_t entering_slot = p.is_cut ? unit_idx : kPool ? simt::slot_of(job.initial, unit.state) : unit.sequence;
  bool has_state = (!kStateOnly || p.states_alone) && entering != nullptr && entering_slot >= 0;
  if (has_state) {
    const int64_t stride_s = p.is_cut ? job.local.stride_s : job.initial.stride_s;
    const int64_t stride_h = p.is_cut ? job.local.stride_h : job.initial.stride_h;
    const int64_t stride_d = p.is_cut ? job.local.stride_d : job.initial.stride_d;
    const int64_t stride_e = p.is_cut ? job.local.stride_e : job.initial.stride_e;
    const int64_t offset = entering_slot * stride_s + head * stride_h + first_col * stride_e;
    simt::with_state_type<float>(kPool && !p.is_cut && job.initial.is_bf16, [&](auto element_in_memory) {
      using Stored = decltype(element_in_memory);
      for_each_state_element<Cfg>(z, static_cast<const Stored*>(entering) + offset, stride_d, stride_e, job.dim_a, cols,
                                  me, [](float& element, const Stored* stored) { element = simt::to_acc(*stored); });
    });
  }

  const bool to_local = kStateOnly && !p.states_alone;
  const MutableState& leaving = to_local ? job.local : job.final;
  // Converted once, where there are registers to keep them.
  const float inter_factor = static_cast<float>(job.inter), update_factor = static_cast<float>(job.update);
  const bool wants_state = leaving.data != nullptr && (to_local || is_last);
  for (int step = first_step; step < end_step; ++step) {
    meet();
    if (!Cfg::kAhead) start_next_copy(step);
    const int chunk = chunk_at(step), rows = rows_of(chunk), stage = step % kStages;
    const int64_t row = static_cast<int64_t>(chunk) * Cfg::kChunk;

    float dots[3] = {};
    PackedOut<Cfg> packed;
    if constexpr (!kStateOnly) {
      OutFragment<Cfg> o = {};
      if (!Cfg::kGradientsAhead)
        scores<Cfg>(smem.scores[0], smem, stage, static_cast<float>(job.intra), reverse, me.warp, me);
      if (Cfg::kGradientsAhead || has_state)
        inter<Cfg>(o, z, smem, stage, Cfg::kGradientsAhead ? inter_factor : static_cast<float>(job.inter), reverse,
                   rows, me);
      if (!Cfg::kGradientsAhead) __syncthreads();  // the scores are complete
      if (Cfg::kSlopeGrad && smem.slope_grad[0].chunk_dots != nullptr) {
        const T* x_chunk = smem.slope_grad[0].x + row * job.x.stride_n;
#pragma unroll
        for (int m = 0; m < Cfg::kChunk / 16; ++m) {
          ptx::scheduling_fence();
          dot_rows<Cfg>(dots[0], dots[1], o[m], m, x_chunk, job.x.stride_n, reverse, rows, cols, me);
          ptx::scheduling_fence();
          if (reverse) continue;
          OutRows<Cfg> by_distance = {};
          float unused = 0.f;
          const auto by_distance_scores = tile::blocks_rows_first(smem.slope_grad[0].scores, 0, 0, me.lane);
#pragma unroll
          for (int k = 0; k <= m; ++k) {
            Values<Cfg> values;
            ValueBlocks<Cfg>(smem.c[stage], me).load(values, k);
            intra_block<Cfg>(by_distance, by_distance_scores, m, k, values);
          }
          dot_rows<Cfg>(dots[2], unused, by_distance, m, x_chunk, job.x.stride_n, reverse, rows, cols, me);
        }
      }
      const typename Cfg::TileP& scores_tile = smem.scores[step % Cfg::kScoreTiles];
      if (reverse)  // one branch: in straight-line code the loads of operands overlap the products
        intra<Cfg, true>(o, scores_tile, smem.c[stage], me);
      else
        intra<Cfg, false>(o, scores_tile, smem.c[stage], me);
      if constexpr (Cfg::kGradientsAhead)
        pack_out<Cfg>(packed, o);
      else
        store_out<Cfg>(out + row * job.out.stride_n, job.out.stride_n, o, rows, cols, me);
    }
    if (step + 1 < num_chunks || wants_state) {
      update_state<Cfg>(z, smem, stage, Cfg::kGradientsAhead ? update_factor : static_cast<float>(job.update), reverse,
                        rows, me);
      has_state = true;
    }
    if constexpr (Cfg::kGradientsAhead) stage_out<Cfg>(smem.c[stage], packed, me);
    if constexpr (Cfg::kSlopeGrad) {
      if (smem.slope_grad[0].chunk_dots == nullptr) continue;
      for (int i = 0; i < 3; ++i) {
        const float sum = sum_of_warp(dots[i]);
        if (me.lane == 0) smem.slope_grad[0].dots[me.warp][i] = sum;
      }
      __syncthreads();
      if (threadIdx.x < 3) {
        float sum = 0.f;
        for (int w = 0; w < Cfg::kWarps; ++w) sum += smem.slope_grad[0].dots[w][threadIdx.x];
        smem.slope_grad[0].chunk_dots[chunk * p.sizes.heads * job_slices * 3 + threadIdx.x] = sum;
      }
    }
  }

  if constexpr (Cfg::kGradientsAhead) meet();  // for the last chunk's results

  if (wants_state) {
    const int piece = to_local ? ptx::opaque(static_cast<int>(blockIdx.z)) : 0;
    if (kStateOnly && piece > 0)  // behind it are whole chunks
      scale_state<Cfg>(z, rounded_decay_power(simt::slope_of<float>(p, unit.sequence, head),
                                              piece * p.piece_chunks * simt::kWindowChunk));
    const int64_t slot = to_local ? unit_idx + piece * p.num_units
                         : kPool  ? simt::slot_of(leaving, unit.state)
                                  : unit.sequence;
    if (slot < 0) return;
    // Computed once more: the loop has no register to keep it.
    const int block = ptx::opaque(static_cast<int>(blockIdx.x)), slices = static_cast<int>(job.by_slices.divisor);
    const int64_t col = int64_t{block - job.by_slices.small_quotient(block) * slices} * Cfg::kSlice;
    const int64_t offset = slot * leaving.stride_s + head * leaving.stride_h + col * leaving.stride_e;
    simt::with_state_type<float>(kPool && leaving.is_bf16, [&](auto element_in_memory) {
      using Stored = decltype(element_in_memory);
      for_each_state_element<Cfg>(z, static_cast<Stored*>(leaving.data) + offset, leaving.stride_d, leaving.stride_e,
                                  job.dim_a, cols, me,
                                  [](float& element, Stored* stored) { simt::from_acc(*stored, element); });
    });
  }
}

}  // namespace la2::sm80
