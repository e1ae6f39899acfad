// 64 rows of the transposed state [Dc, Da] in the accumulators of one warpgroup: in, out, and a chunk further.
#pragma once

#include "../simt/element.cuh"
#include "steps.cuh"

namespace la2::sm90 {

template <int kRegs>
__device__ __forceinline__ void clear(Accumulators<kRegs>& z) {
#pragma unroll
  for (int i = 0; i < kRegs; ++i) z[i] = 0.f;
}
template <int kRegs>
__device__ __forceinline__ void scale(Accumulators<kRegs>& z, float factor) {
#pragma unroll
  for (int i = 0; i < kRegs; ++i) z[i] *= factor;
}

// Z^T = lambda^C Z^T + (weighted c)^T b for 64 columns of c. The chunk is summed from zero: a tensor core cuts off what
// it adds to a larger sum, always towards zero, and without decay a state grows from chunk to chunk; the addition to Z
// rounds (../DESIGN.md). In two steps: the sum, issued (kSplit: of both parts of c) for the columns of b from first_col
// on, and the addition. is_more: to what another chunk has issued.
template <class T, bool kSplit, class Tile, int kRegs>
__device__ __forceinline__ void issue_update(Accumulators<kRegs>& sum, const uint32_t (&weighted)[kChunk / 16][4],
                                             const uint32_t (&rest)[kChunk / 16][4], const Tile& b_tile,
                                             int first_col = 0, bool is_more = false) {
  const tile::ColumnsOperand<Tile> b(shared_address(&b_tile) + first_col / 64 * Tile::kBlockBytes);
  ptx::pin_registers(sum);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kChunk / 16; ++k) {
    ptx::wgmma<T, ptx::Major::kMN>(sum, weighted[k], b.step(k), k != 0 || is_more);
    if constexpr (kSplit) ptx::wgmma<T, ptx::Major::kMN>(sum, rest[k], b.step(k), 1);
  }
  ptx::wgmma_commit();
}
template <int kRegs, int kPart>
__device__ __forceinline__ void add_update(Accumulators<kRegs>& z, float lambda_rows, const Accumulators<kPart>& sum,
                                           int first = 0) {
#pragma unroll
  for (int i = 0; i < kPart; ++i) z[first + i] = fmaf(z[first + i], lambda_rows, sum[i]);
}
// Both, kAtOnce accumulators of a sum at a time, as the registers allow.
template <class T, bool kSplit, int kAtOnce, class Tile, int kRegs>
__device__ __forceinline__ void update_rows(Accumulators<kRegs>& z, const uint32_t (&weighted)[kChunk / 16][4],
                                            const uint32_t (&rest)[kChunk / 16][4], const Tile& b_tile,
                                            float lambda_rows, int first_col = 0) {
  constexpr int kPart = kRegs < kAtOnce ? kRegs : kAtOnce;
  static_assert(kRegs % kPart == 0);
#pragma unroll
  for (int part = 0; part < kRegs / kPart; ++part) {
    Accumulators<kPart> sum;
    issue_update<T, kSplit>(sum, weighted, rest, b_tile, first_col + part * 2 * kPart);
    ptx::wgmma_wait<0>();
    ptx::pin_registers(sum);
    add_update(z, lambda_rows, sum, part * kPart);
  }
}

// 64 rows of Z^T [64 columns of Dc, Da], from column `first_col` of the item's slice on, from and to a state [Da, Dc]
// in memory. An absent state leaves z as it is.
template <class Element, int kRegs, class Body>
__device__ __forceinline__ void for_each_state_element(Accumulators<kRegs>& z, Element* state, int64_t stride_d,
                                                       int64_t stride_e, int dim_a, int cols, const WarpgroupLane& me,
                                                       const Body& body) {
  const int col = me.warp * 16 + me.group;
  Element* at = state + me.pair * 2 * stride_d + col * stride_e;
#pragma unroll
  for (int n = 0; n < kRegs / 4; ++n) {
    if (n * 8 < dim_a) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (col + 8 * (i >> 1) < cols) body(z[4 * n + i], at + (i & 1) * stride_d + (i >> 1) * 8 * stride_e);
    }
    at += 8 * stride_d;
    if (n % 4 == 3) ptx::scheduling_fence();  // all loads at once would need too many registers
  }
}
// kPool: the state may be one of a pool (State::slots, is_bf16); gradients' are not, and have no registers for it.
// first_row: of Da, where z holds what lies from there on.
template <bool kPool, int kRegs>
__device__ __forceinline__ void load_state(Accumulators<kRegs>& z, const State& s, const Item& item, int first_col,
                                           int dim_a, int cols, const WarpgroupLane& me, int first_row = 0) {
  if (s.data == nullptr) return;
  const int64_t slot = kPool ? simt::slot_of(s, item.state) : item.sequence;
  if (slot < 0) return;
  const int64_t offset =
      slot * s.stride_s + item.head * s.stride_h + first_row * s.stride_d + (item.first_col + first_col) * s.stride_e;
  simt::with_state_type<float>(kPool && s.is_bf16, [&](auto element_in_memory) {
    using Stored = decltype(element_in_memory);
    for_each_state_element(z, static_cast<const Stored*>(s.data) + offset, s.stride_d, s.stride_e, dim_a - first_row,
                           cols - first_col, me,
                           [](float& element, const Stored* stored) { element = simt::to_acc(*stored); });
  });
}
template <bool kPool, int kRegs>
__device__ __forceinline__ void store_state(Accumulators<kRegs>& z, const MutableState& s, const Item& item,
                                            int first_col, int dim_a, int cols, const WarpgroupLane& me) {
  const int64_t slot = kPool ? simt::slot_of(s, item.state) : item.sequence;
  if (slot < 0) return;
  const int64_t offset = slot * s.stride_s + item.head * s.stride_h + (item.first_col + first_col) * s.stride_e;
  simt::with_state_type<float>(kPool && s.is_bf16, [&](auto element_in_memory) {
    using Stored = decltype(element_in_memory);
    for_each_state_element(z, static_cast<Stored*>(s.data) + offset, s.stride_d, s.stride_e, dim_a, cols - first_col,
                           me, [](float& element, Stored* stored) { simt::from_acc(*stored, element); });
  });
}

// A state between segments stays in the order of the registers, 16 bytes a lane: of a unit and head, blocks of 64
// columns of Dc (the planner's state_floats). Where this lane's part of a block begins, of what leaves `unit`.
template <int kTileA>
__device__ __forceinline__ float4* fragment_of(const TrilinearJob& job, const Item& item, int unit, int block,
                                               const WarpgroupLane& me) {
  float* state = static_cast<float*>(job.local.data) + unit * job.local.stride_s + item.head * job.local.stride_h;
  return reinterpret_cast<float4*>(state + (item.first_col / 64 + block) * (64 * kTileA)) + me.warp * 32 + me.lane;
}
// Segments run side by side, and the last one may be done with a slot of a pool before the first one reads it. So of a
// request that is cut the state pass leaves a copy of the initial state, in place of what leaves the last segment,
// which nobody wants.
__device__ __forceinline__ bool has_copy_of_initial(const TrilinearParams& p, const Item& item) {
  return p.units != nullptr && item.num_segments > 1;
}
__device__ __forceinline__ int unit_of_copy(const Item& first) { return first.unit + first.num_segments - 1; }

template <int kRegs>
__device__ __forceinline__ void load_fragment(Accumulators<kRegs>& z, const float4* from) {
#pragma unroll
  for (int i = 0; i < kRegs / 4; ++i) {
    const float4 part = __ldcg(from + i * 128);
    z[4 * i] = part.x;
    z[4 * i + 1] = part.y;
    z[4 * i + 2] = part.z;
    z[4 * i + 3] = part.w;
  }
}
// Z^T = lambda^len Z^T + next, over `count` states that lie `step` apart, from the first one on. The loads of two are
// under way at once: ptxas waits for all that are, and then adds both.
template <int kRegs>
__device__ __forceinline__ void load_sum(Accumulators<kRegs>& z, const float4* from, int64_t step, int count,
                                         float decay) {
  Accumulators<kRegs> next[2];
  load_fragment(z, from);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (1 + i < count) load_fragment(next[i], from += step);
#pragma unroll 1
  for (int first = 1; first < count; first += 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first + i >= count) break;
      add_update(z, decay, next[i]);
      if (first + i + 2 < count) load_fragment(next[i], from += step);
    }
  }
}
// The same where registers are few: of half of Z^T at a time, one state's under way.
template <int kRegs>
__device__ __forceinline__ void load_sum_in_halves(Accumulators<kRegs>& z, const float4* from, int64_t step, int count,
                                                   float decay) {
  constexpr int kHalf = kRegs / 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4* next_from = from + half * (kHalf / 4) * 128;
    Accumulators<kHalf> sum, next;
    clear(sum);
    load_fragment(next, next_from);
#pragma unroll 1
    for (int n = 1; n <= count; ++n) {
      add_update(sum, decay, next);
      if (n < count) load_fragment(next, next_from += step);
    }
#pragma unroll
    for (int i = 0; i < kHalf; ++i) z[half * kHalf + i] = sum[i];
  }
}
template <int kRegs>
__device__ __forceinline__ void store_fragment(const Accumulators<kRegs>& z, float4* to) {
#pragma unroll
  for (int i = 0; i < kRegs / 4; ++i) to[i * 128] = {z[4 * i], z[4 * i + 1], z[4 * i + 2], z[4 * i + 3]};
}

}  // namespace la2::sm90
