// The steps of a chunk that the sm_90 kernels share, each by one warpgroup. "Issued": the product runs on; wgmma_wait
// waits for it.
#pragma once

#include <type_traits>

#include "../ptx/ldmatrix.cuh"
#include "../ptx/stmatrix.cuh"
#include "../ptx/wgmma.cuh"
#include "../tile/decay.cuh"
#include "../tile/half_pair.cuh"
#include "work.cuh"

namespace la2::sm90 {

struct WarpgroupLane {
  int warp, lane, group, pair;  // warp within the warpgroup; lane = 4 group + pair
  __device__ WarpgroupLane() : warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32), group(lane / 4), pair(lane % 4) {}
};

template <int kRegs>
using Accumulators = float[kRegs];

template <class Tile>
__device__ __forceinline__ tile::RowsOperand<Tile> rows_operand(const Tile& tile) {
  return tile::RowsOperand<Tile>(shared_address(&tile));
}
// The same, held in registers: this warp's 16.
template <class Tile>
struct HeldRows {
  static constexpr int kSteps = Tile::kCols / 16;
  uint32_t rows[kSteps][4];

  __device__ __forceinline__ void load(const Tile& tile, const WarpgroupLane& me) {
    const auto from = tile::swizzled_rows_first<Tile>(shared_address(&tile), me.warp * 16, 0, me.lane);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) ptx::ldmatrix_x4(rows[k], from.at(0, 2 * k));
  }
  __device__ __forceinline__ const uint32_t (&step(int k) const)[4] { return rows[k]; }
};

// d += the k-th step of a b, a's rows in shared memory or in registers.
template <class T, class Tile, class OperandB, int kRegs>
__device__ __forceinline__ void multiply(Accumulators<kRegs>& d, const tile::RowsOperand<Tile>& a, const OperandB& b,
                                         int k, int accumulate) {
  ptx::wgmma<T, ptx::Major::kK, OperandB::kMajor>(d, a.step(k), b.step(k), accumulate);
}
template <class T, class Tile, class OperandB, int kRegs>
__device__ __forceinline__ void multiply(Accumulators<kRegs>& d, const HeldRows<Tile>& a, const OperandB& b, int k,
                                         int accumulate) {
  ptx::wgmma<T, OperandB::kMajor>(d, a.step(k), b.step(k), accumulate);
}

// scores [C, C] = a b^T, issued.
template <class T, class OperandA, class Tile>
__device__ __forceinline__ void issue_scores(Accumulators<kChunk / 2>& p, const OperandA& a, const Tile& b_tile) {
  const tile::RowsOperand<Tile> b(shared_address(&b_tile));
  ptx::pin_registers(p);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < OperandA::kSteps; ++k) multiply<T>(p, a, b, k, k != 0);
  ptx::wgmma_commit();
}

// What a job multiplies its scores and rows by, filled for one head.
struct Weights {
  float mask_[2 * kChunk + 1];  // intra lambda^|x| by the signed distance x = i - j, -C .. C; 0 on the acausal side
  float row[kChunk + 1];        // inter lambda^n

  __device__ const float* mask() const { return mask_ + kChunk; }

  __device__ void fill(float slope, float inter, float intra, bool reverse, int thread, int num_threads) {
    for (int x = thread; x <= kChunk; x += num_threads) {
      const float power = rounded_decay_power(slope, x);
      mask_[kChunk + (reverse ? -x : x)] = intra * power;
      if (x > 0) mask_[kChunk + (reverse ? x : -x)] = 0.f;
      row[x] = inter * power;
    }
  }
};

// The scores under the mask M_ij = lambda^|i-j| (causal side), times intra, as A operand. kSplit: `rest` is what the
// rounding left; else it is not touched.
template <class T, bool kSplit>
__device__ __forceinline__ void mask_scores(uint32_t (&masked)[kChunk / 16][4], uint32_t (&rest)[kChunk / 16][4],
                                            const Accumulators<kChunk / 2>& p, const Weights& weights,
                                            const WarpgroupLane& me) {
  const float* mask = weights.mask() + (me.warp * 16 + me.group - me.pair * 2);
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int x = 8 * half - 8 * n, i = 2 * (n % 2) + half;
      const float low = p[4 * n + 2 * half] * mask[x], high = p[4 * n + 2 * half + 1] * mask[x - 1];
      if constexpr (kSplit) {
        tile::split_pair<T>(low, high, masked[n / 2][i], rest[n / 2][i]);
      } else {
        masked[n / 2][i] = tile::pack<T>(low, high);
      }
    }
}

template <int kRegs>
__device__ __forceinline__ void scale_rows(Accumulators<kRegs>& out, float upper, float lower) {
#pragma unroll
  for (int i = 0; i < kRegs; ++i) out[i] *= i & 2 ? lower : upper;
}

// out [C, kCols] += scores c, issued; kSplit: and += rest c.
template <class T, bool kSplit, class Tile>
__device__ __forceinline__ void issue_intra(Accumulators<Tile::kCols / 2>& out,
                                            const uint32_t (&masked)[kChunk / 16][4],
                                            const uint32_t (&rest)[kChunk / 16][4], const Tile& c_tile) {
  const tile::ColumnsOperand<Tile> c(shared_address(&c_tile));
  ptx::pin_registers(out);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kChunk / 16; ++k) {
    ptx::wgmma<T, ptx::Major::kMN>(out, masked[k], c.step(k), 1);
    if constexpr (kSplit) ptx::wgmma<T, ptx::Major::kMN>(out, rest[k], c.step(k), 1);
  }
  ptx::wgmma_commit();
}

// Accumulators of 16 rows of this warp, times `factor`, rounded to rows `row`.. of a tile in shared memory; with kParts
// 2 what the rounding left to a second one.
template <class Tile, class T, int kParts, int kRegs>
__device__ __forceinline__ void store_rounded(Tile (&tiles)[kParts], int row, const Accumulators<kRegs>& d,
                                              float factor, int lane) {
  static_assert(kParts == 1 || kParts == 2);
  const auto to = tile::swizzled_rows_first<Tile>(shared_address(&tiles[0]), row, 0, lane);
#pragma unroll
  for (int g = 0; g < kRegs / 8; ++g) {
    uint32_t pairs[4], rest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = d[8 * g + 2 * i] * factor, high = d[8 * g + 2 * i + 1] * factor;
      if constexpr (kParts == 2) {
        tile::split_pair<T>(low, high, pairs[i], rest[i]);
      } else {
        pairs[i] = tile::pack<T>(low, high);
      }
    }
    ptx::stmatrix_x4(to.at(0, 2 * g), pairs);
    if constexpr (kParts == 2) ptx::stmatrix_x4(to.at(0, 2 * g) + Tile::kBytes, rest);
  }
}

// A chunk of out goes to memory in two steps, by every warp for its own 16 rows: to its rows of `staging`, and from
// there, once ptx::fence_proxy_async() stands between. Apart: the fence waits for the stores before it.
template <class T, class Tile>
__device__ __forceinline__ void stage_out(Tile (&staging)[1], const Accumulators<Tile::kCols / 2>& out,
                                          const WarpgroupLane& me) {
  if (ptx::elect_one()) ptx::tma_store_wait_read();
  __syncwarp();
  store_rounded<Tile, T>(staging, me.warp * 16, out, 1.f, me.lane);
}
template <class T, class Tile>
__device__ __forceinline__ void store_staged(const Tile (&staging)[1], const CUtensorMap& map, const TrilinearJob& job,
                                             const Item& item, int chunk, bool is_packed, int first_row, int lane) {
  const uint32_t tile = shared_address(&staging[0]);
  const int rows = item.rows_of(chunk);
  __syncwarp();
  if (is_packed && rows < kChunk) {  // the map does not end where the sequence does
    T* to = static_cast<T*>(job.out.data) + item.batch * job.out.stride_b + item.head * job.out.stride_h +
            static_cast<int64_t>(item.row_begin + chunk * kChunk) * job.out.stride_n + item.first_col;
    store_rows_directly<Tile>(to, job.out.stride_n, tile, first_row, rows, job.dim_c - item.first_col,
                              ptx::opaque(lane));
    return;
  }
  if (ptx::elect_one()) {
    ptx::TmaBox box = item.box(chunk);
    box.row += first_row;
    box.col = item.first_col;
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block, box.col += 64)
      ptx::tma_store(&map, tile + block * Tile::kBlockBytes + first_row * 128, box);
    ptx::tma_store_commit();
  }
}

// 64 columns of c transposed, from column 64 `block` on, as A operand of a state's update: rows are this warp's 16 of
// those columns. weigh(k, i, values of two tokens): what becomes of them, element [k][i] of the operand.
template <class Tile, class Weigh>
__device__ __forceinline__ void for_each_pair_of_tokens(const Tile& c_tile, int block, const WarpgroupLane& me,
                                                        Weigh weigh) {
  const auto values = tile::swizzled_units_first<Tile>(shared_address(&c_tile), 0, 2 * me.warp, me.lane);
#pragma unroll
  for (int k = 0; k < kChunk / 16; ++k) {
    uint32_t c[4];
    ptx::ldmatrix_x4_trans(c, values.at(k * 16, 8 * block));
#pragma unroll
    for (int i = 0; i < 4; ++i) weigh(k, i, c[i]);
  }
}
// They, weighted by the token. kSplit: `rest` is what the rounding left.
template <class T, bool kSplit, class Tile>
__device__ __forceinline__ void weigh_columns(uint32_t (&weighted)[kChunk / 16][4], uint32_t (&rest)[kChunk / 16][4],
                                              const Tile& c_tile, int block, const float* weights, float factor,
                                              const WarpgroupLane& me) {
  for_each_pair_of_tokens(c_tile, block, me, [&](int k, int i, uint32_t c) {
    const int token = k * 16 + 8 * (i / 2);
    const float2 value = tile::unpack<T>(c);
    const float low = value.x * (factor * weights[token]), high = value.y * (factor * weights[token + 1]);
    if constexpr (kSplit) {
      tile::split_pair<T>(low, high, weighted[k][i], rest[k][i]);
    } else {
      weighted[k][i] = tile::pack<T>(low, high);
    }
  });
}

// Where the weights of a chunk's tokens begin for this lane: lambda^n, n = rows - 1 - j (reverse: j + 1).
__device__ __forceinline__ const float* token_weights(const tile::Decay<kChunk>& decay, bool reverse, int rows,
                                                      const WarpgroupLane& me) {
  return decay.against(reverse) + (me.pair * 2 + (reverse ? 1 : 1 - rows));
}
// Whether a kernel weighs by bfloat16 arithmetic (float16 has no numbers for small weights). No matter of its slices:
// the state pass and the kernel behind it may have different ones, and sums of the same bits nevertheless.
template <class T, int kTileA, bool kSplit>
constexpr bool kWeighsByPairs = !std::is_same<T, __half>::value && (kSplit || kTileA <= 128);

// The weights for it: of two tokens each, `factor` in them, as sums of two bfloat16. Of a warpgroup.
struct PairWeights {
  uint2 of_tokens[kChunk / 2];

  // Where they are not those that `filled` names, of the chunk before. barrier: this warpgroup's.
  __device__ __forceinline__ void fill(const tile::Decay<kChunk>& powers, float factor, bool reverse, int rows,
                                       int& filled, int barrier) {
    const int wanted = reverse ? kChunk : rows;  // a reverse sweep counts from the chunk's begin
    if (filled == wanted) return;
    filled = wanted;
    const int pair = threadIdx.x % 128;
    ptx::named_barrier_sync(barrier, 128);  // nobody reads the last ones any more
    if (pair < kChunk / 2) {
      const float* weights = powers.against(reverse) + (2 * pair + (reverse ? 1 : 1 - rows));
      uint2& to = of_tokens[pair];
      tile::split_pair<__nv_bfloat16>(factor * weights[0], factor * weights[1], to.x, to.y);
    }
    ptx::named_barrier_sync(barrier, 128);
  }
};
template <class T, bool kSplit, class Tile>
__device__ __forceinline__ void weigh_columns(uint32_t (&weighted)[kChunk / 16][4], uint32_t (&rest)[kChunk / 16][4],
                                              const Tile& c_tile, int block, const PairWeights& weights,
                                              const WarpgroupLane& me) {
  const uint2* pairs = weights.of_tokens + me.pair;
  for_each_pair_of_tokens(c_tile, block, me, [&](int k, int i, uint32_t c) {
    const uint2& weight = pairs[k * 8 + 4 * (i / 2)];
    if constexpr (kSplit) {
      tile::split_product(c, weight, weighted[k][i], rest[k][i]);
    } else {
      weighted[k][i] = tile::product(c, weight);
    }
  });
}

// A lane's weights of a chunk's tokens, `factor` in them, in registers: they are those of the chunk before as long as
// chunks are whole.
template <class T>
struct HeldWeights {
  static constexpr bool kInPairs = !std::is_same<T, __half>::value;
  std::conditional_t<kInPairs, uint2, float2> of_tokens[kChunk / 16][2];
  int rows = -1;

  __device__ __forceinline__ void load(const tile::Decay<kChunk>& decay, bool reverse, int wanted_rows, float factor,
                                       const WarpgroupLane& me) {
    if (rows == wanted_rows) return;
    rows = wanted_rows;
    const float* from = token_weights(decay, reverse, rows, me);
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = factor * from[k * 16 + 8 * half], high = factor * from[k * 16 + 8 * half + 1];
        if constexpr (kInPairs) {
          tile::split_pair<T>(low, high, of_tokens[k][half].x, of_tokens[k][half].y);
        } else {
          of_tokens[k][half] = {low, high};
        }
      }
  }
};

// weigh_columns in two steps, of 64 columns, so that the reads can come long before: the columns, and their weights.
template <class Tile>
__device__ __forceinline__ void load_columns(uint32_t (&c)[kChunk / 16][4], const Tile& c_tile,
                                             const WarpgroupLane& me) {
  const auto values = tile::swizzled_units_first<Tile>(shared_address(&c_tile), 0, 2 * me.warp, me.lane);
#pragma unroll
  for (int k = 0; k < kChunk / 16; ++k) ptx::ldmatrix_x4_trans(c[k], values.at(k * 16, 0));
}
template <class T>
__device__ __forceinline__ void weigh_columns(uint32_t (&weighted)[kChunk / 16][4], const uint32_t (&c)[kChunk / 16][4],
                                              const HeldWeights<T>& weights) {
#pragma unroll
  for (int k = 0; k < kChunk / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto& weight = weights.of_tokens[k][i / 2];
      if constexpr (HeldWeights<T>::kInPairs) {
        weighted[k][i] = tile::product(c[k][i], weight);
      } else {
        const float2 value = tile::unpack<T>(c[k][i]);
        weighted[k][i] = tile::pack<T>(value.x * weight.x, value.y * weight.y);
      }
    }
}

// The weight of row `row` of out: inter lambda^n, n = i + 1 (reverse: rows - 1 - i; rows behind the end: any).
__device__ __forceinline__ float row_weight(const Weights& weights, bool reverse, int rows, int row) {
  return weights.row[reverse ? max(rows - 1 - row, 0) : row + 1];
}

// fp16 ends at 65504 above and loses digits from 2^-14 on below; a state does not: the power of two that brings
// `largest` to [2^13, 2^14).
__device__ __forceinline__ int range_exponent(float largest) {
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
  return exponent > -100 && exponent < 127 ? exponent - 13 : 0;
}
__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
}
template <int kRegs>
__device__ __forceinline__ float largest_of_warp(const Accumulators<kRegs>& z, float largest) {
#pragma unroll
  for (int i = 0; i < kRegs; ++i) largest = fmaxf(largest, fabsf(z[i]));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  return largest;
}

// This warp is done with a stage: one lane arrives for all.
__device__ __forceinline__ void release_stage(uint64_t& empty, int lane) {
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(shared_address(&empty));
}

}  // namespace la2::sm90
