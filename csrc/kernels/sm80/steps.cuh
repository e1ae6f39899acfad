// The steps of a chunk that the sm80 kernels share: scores, a Z, scores c, update, results to memory; and the state in
// memory.
#pragma once

#include <type_traits>

#include "../ptx/fence.cuh"
#include "../ptx/ldmatrix.cuh"
#include "../ptx/mma.cuh"
#include "../tile/half_pair.cuh"
#include "config.cuh"

namespace la2::sm80 {

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

}  // namespace la2::sm80
