// bf16 and fp16 trilinear kernel for every GPU from sm_80: cp.async, ldmatrix, mma.sync, fp32 state in registers.
// The notebook is ../DESIGN.md.
#pragma once

#include <type_traits>

#include "../ptx/cp_async.cuh"
#include "../ptx/fence.cuh"
#include "../ptx/launch_order.cuh"
#include "../ptx/ldmatrix.cuh"
#include "../ptx/mma.cuh"
#include "../simt/element.cuh"
#include "../simt/units.cuh"
#include "../tile/decay.cuh"
#include "../tile/half_pair.cuh"
#include "../tile/shared_tile.cuh"
#include "../trilinear.h"

namespace la2::sm80 {

// ---- config

// kTileA: Da rounded up to a tile, the missing columns read as zero. Each warp owns 16 columns of c and out, so a
// block covers a slice of 16 kWarps of the Dc columns.
// kSplit: the two operands that are rounded from float32, the state and the weighted c, go in as a sum of two 16-bit
// numbers. The gradients need it for an error below that of their own rounding (../DESIGN.md); out does not.
template <class T_, int kTileA_, int kWarps_, bool kSplit_, bool kSlopeGrad_>
struct Config {
  using T = T_;
  static constexpr int kTileA = kTileA_;
  static constexpr int kWarps = kWarps_;
  static constexpr bool kSplit = kSplit_;
  static constexpr bool kSlopeGrad = kSlopeGrad_;

  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSlice = 16 * kWarps;
  // 64 tokens; 32 where 256 columns would not leave two stages room in 99 KB of shared memory.
  static constexpr int kChunk = kTileA <= 128 ? 64 : 32;
  static constexpr int kStages = 2;

  // The scores [kChunk, kChunk] are shared out among the warps in bands of 16 rows, and columns within a band.
  static constexpr int kBands = kChunk / 16;
  static constexpr int kBandCols = kChunk * kBands / kWarps;
  static_assert(kBandCols % 16 == 0, "a warp computes whole 16x16 blocks of scores");

  using TileA = tile::SharedTile<T, kChunk, kTileA>;
  using TileC = tile::SharedTile<T, kChunk, kSlice>;
  using TileP = tile::SharedTile<T, kChunk, kChunk>;
};

template <class Cfg>
struct SlopeGradStorage {
  typename Cfg::TileP scores;  // [C, C] masked, times the distance
  const typename Cfg::T* x;    // the operand that pairs with out, at this segment and slice
  float* chunk_dots;           // nullptr: not wanted of this job
  float dots[Cfg::kWarps][3];
};

template <class Cfg>
struct SharedStorage {
  typename Cfg::TileA a[Cfg::kStages];  // [C, Da]
  typename Cfg::TileA b[Cfg::kStages];  // [C, Da]
  typename Cfg::TileC c[Cfg::kStages];  // [C, slice]
  typename Cfg::TileP scores;           // [C, C] masked
  tile::Decay<Cfg::kChunk> decay;
  SlopeGradStorage<Cfg> slope_grad[Cfg::kSlopeGrad ? 1 : 0];
};

// ---- registers of one warp

// The state, transposed: rows are this warp's 16 columns of c, columns are Da. As accumulator of the update
// Z^T += c^T b it is laid out exactly as a . Z wants its B operand, so the state never passes through memory.
template <class Cfg>
using StateFragment = float[Cfg::kTileA / 8][4];
// [C, 16] of out.
template <class Cfg>
using OutFragment = float[Cfg::kChunk / 16][2][4];
// [C, 16] of c, as B operand of scores . c; four of its registers, 16 tokens, are also c^T as the A operand of the
// state update.
template <class Cfg>
using ValueFragment = uint32_t[Cfg::kChunk / 16][4];

struct Lane {
  int warp, lane, group, pair;  // lane = 4 group + pair
  __device__ Lane() : warp(threadIdx.x / 32), lane(threadIdx.x % 32), group(lane / 4), pair(lane % 4) {}
};

// ---- steps of the chunk loop

template <class T, class Tile>
__device__ __forceinline__ void store_pair(Tile& tile, uint32_t byte_offset, const float (&value)[2]) {
  *reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(tile.data) + byte_offset) = tile::pack<T>(value[0], value[1]);
}

// scores = M . (a b^T) * intra, rounded, to shared memory. M_ij = lambda^|i-j| on the causal side, else 0.
template <class Cfg>
__device__ __forceinline__ void scores(SharedStorage<Cfg>& smem, int stage, float intra, bool reverse, const Lane& me) {
  using T = typename Cfg::T;
  constexpr int kWarpsPerBand = Cfg::kWarps / Cfg::kBands;
  constexpr int kBlocks = Cfg::kBandCols / 16;
  const int band = me.warp / kWarpsPerBand;
  const int first_block = (me.warp % kWarpsPerBand) * kBlocks;
  const auto a = tile::blocks_rows_first(smem.a[stage], band * 16, 0, me.lane);
  const auto b = tile::blocks_units_first(smem.b[stage], first_block * 16, 0, me.lane);

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

  const int row = band * 16 + me.group, col = first_block * 16 + me.pair * 2;
  const float* mask = smem.decay.along(reverse) + (row - col);
  const tile::BlockAddress<typename Cfg::TileP> out{Cfg::TileP::offset(row, first_block * 2) + me.pair * 4u};
#pragma unroll
  for (int n = 0; n < 2 * kBlocks; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float value[2], slope_value[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int x = 8 * half - 8 * n - e;
        value[e] = p[n][2 * half + e] * (intra * mask[x]);
        slope_value[e] = value[e] * static_cast<float>(abs(row - col + x));
      }
      const uint32_t where = out.at(8 * half, n);
      store_pair<T>(smem.scores, where, value);
      if constexpr (Cfg::kSlopeGrad) store_pair<T>(smem.slope_grad[0].scores, where, slope_value);
    }
}

// fp16 ends at 65504 above and loses digits from 2^-14 on below; a state does not. The power of two that brings the
// largest |Z| of the warp to [2^13, 2^14), and its inverse; 1 and 1 for bf16, which has float32's range.
template <class Cfg>
__device__ __forceinline__ float2 operand_range(const StateFragment<Cfg>& z) {
  if constexpr (sizeof(typename Cfg::T) != 2 || !std::is_same<typename Cfg::T, __half>::value) return {1.f, 1.f};
  float largest = 0.f;
#pragma unroll
  for (int n = 0; n < Cfg::kTileA / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(z[n][i]));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
  const int shift = exponent > -100 && exponent < 127 ? exponent - 13 : 0;
  return {__uint_as_float(static_cast<uint32_t>(127 - shift) << 23),
          __uint_as_float(static_cast<uint32_t>(127 + shift) << 23)};
}

// out = diag(inter lambda^n) a Z, n = i + 1 (reverse: rows - 1 - i).
template <class Cfg>
__device__ __forceinline__ void inter(OutFragment<Cfg>& out, const StateFragment<Cfg>& z, SharedStorage<Cfg>& smem,
                                      int stage, float factor, bool reverse, int rows, const Lane& me) {
  using T = typename Cfg::T;
  const auto a = tile::blocks_rows_first(smem.a[stage], 0, 0, me.lane);
  const float2 range = operand_range<Cfg>(z);
#pragma unroll
  for (int d = 0; d < Cfg::kTileA / 16; ++d) {
    const float pairs[4][2] = {{z[2 * d][0] * range.x, z[2 * d][1] * range.x},
                               {z[2 * d + 1][0] * range.x, z[2 * d + 1][1] * range.x},
                               {z[2 * d][2] * range.x, z[2 * d][3] * range.x},
                               {z[2 * d + 1][2] * range.x, z[2 * d + 1][3] * range.x}};
    uint32_t fz[4], fz_rest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) tile::split_pair<T>(pairs[i][0], pairs[i][1], fz[i], fz_rest[i]);
#pragma unroll
    for (int m = 0; m < Cfg::kChunk / 16; ++m) {
      uint32_t fa[4];
      ptx::ldmatrix_x4(fa, a.at(m * 16, 2 * d));
      ptx::mma<T>(out[m][0], fa, fz[0], fz[1]);
      ptx::mma<T>(out[m][1], fa, fz[2], fz[3]);
      if constexpr (Cfg::kSplit) {
        ptx::mma<T>(out[m][0], fa, fz_rest[0], fz_rest[1]);
        ptx::mma<T>(out[m][1], fa, fz_rest[2], fz_rest[3]);
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
      for (int e = 0; e < 2; ++e) {
        out[m][0][2 * half + e] *= weight;
        out[m][1][2 * half + e] *= weight;
      }
    }
}

// 16 rows of out += scores c, without the blocks that are all masked.
template <class Cfg, bool kReverse>
__device__ __forceinline__ void intra_rows(float (&out)[2][4], int m, const typename Cfg::TileP& scores_tile,
                                           const ValueFragment<Cfg>& c, const Lane& me) {
  using T = typename Cfg::T;
  const auto p = tile::blocks_rows_first(scores_tile, 0, 0, me.lane);
#pragma unroll
  for (int k = 0; k < Cfg::kChunk / 16; ++k) {
    if (kReverse ? k < m : k > m) continue;
    uint32_t fp[4];
    ptx::ldmatrix_x4(fp, p.at(m * 16, 2 * k));
    ptx::mma<T>(out[0], fp, c[k][0], c[k][2]);
    ptx::mma<T>(out[1], fp, c[k][1], c[k][3]);
  }
}

template <class Cfg, bool kReverse>
__device__ __forceinline__ void intra(OutFragment<Cfg>& out, SharedStorage<Cfg>& smem, const ValueFragment<Cfg>& c,
                                      const Lane& me) {
#pragma unroll
  for (int m = 0; m < Cfg::kChunk / 16; ++m) intra_rows<Cfg, kReverse>(out[m], m, smem.scores, c, me);
}

template <class Cfg>
__device__ __forceinline__ void load_values(ValueFragment<Cfg>& c, SharedStorage<Cfg>& smem, int stage,
                                            const Lane& me) {
  const auto tile = tile::blocks_units_first(smem.c[stage], 0, 2 * me.warp, me.lane);
#pragma unroll
  for (int k = 0; k < Cfg::kChunk / 16; ++k) ptx::ldmatrix_x4_trans(c[k], tile.at(k * 16, 0));
}

// Z = lambda^rows Z + b^T diag(update lambda^n) c, n = rows - 1 - j (reverse: j + 1). The weights go onto c, of
// which a warp holds 16 columns, and not onto b, of which it would have to scale all.
template <class Cfg>
__device__ __forceinline__ void update_state(StateFragment<Cfg>& z, SharedStorage<Cfg>& smem, int stage, float factor,
                                             bool reverse, int rows, const Lane& me) {
  using T = typename Cfg::T;
  const float decay = smem.decay.ascending()[rows];
#pragma unroll
  for (int n = 0; n < Cfg::kTileA / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) z[n][i] *= decay;

  const auto b = tile::blocks_rows_first(smem.b[stage], 0, 0, me.lane);
  const auto values = tile::blocks_units_first(smem.c[stage], 0, 2 * me.warp, me.lane);
  const float* weights = smem.decay.against(reverse) + (me.pair * 2 + (reverse ? 1 : 1 - rows));
  constexpr int kUnroll = Cfg::kTileA > 128 ? 1 : Cfg::kChunk / 16;  // for want of registers
#pragma unroll kUnroll
  for (int k = 0; k < Cfg::kChunk / 16; ++k) {
    uint32_t c[4], weighted[4], rest[4];
    ptx::ldmatrix_x4_trans(c, values.at(k * 16, 0));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float weight[2] = {factor * weights[k * 16 + 8 * half], factor * weights[k * 16 + 8 * half + 1]};
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        const float2 value = tile::unpack<T>(c[i]);
        tile::split_pair<T>(value.x * weight[0], value.y * weight[1], weighted[i], rest[i]);
      }
    }
#pragma unroll
    for (int d = 0; d < Cfg::kTileA / 16; ++d) {
      uint32_t fb[4];
      ptx::ldmatrix_x4_trans(fb, b.at(k * 16, 2 * d));
      ptx::mma<T>(z[2 * d], weighted, fb[0], fb[1]);
      ptx::mma<T>(z[2 * d + 1], weighted, fb[2], fb[3]);
      if constexpr (Cfg::kSplit) {
        ptx::mma<T>(z[2 * d], rest, fb[0], fb[1]);
        ptx::mma<T>(z[2 * d + 1], rest, fb[2], fb[3]);
      }
    }
  }
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

// Rows [0, rows) of the warp's 16 columns, 16 bytes a lane.
template <class Cfg>
__device__ __forceinline__ void store_out(typename Cfg::T* out, int64_t stride, const OutFragment<Cfg>& o, int rows,
                                          int cols, const Lane& me) {
  using T = typename Cfg::T;
  const int col = me.warp * 16 + (me.pair & 1) * 8;
#pragma unroll
  for (int m = 0; m < Cfg::kChunk / 16; ++m) {
    uint32_t w[4] = {tile::pack<T>(o[m][0][0], o[m][0][1]), tile::pack<T>(o[m][1][0], o[m][1][1]),
                     tile::pack<T>(o[m][0][2], o[m][0][3]), tile::pack<T>(o[m][1][2], o[m][1][3])};
    transpose_quad(w, me.pair);
    const int row = m * 16 + me.group + 8 * (me.pair >> 1);
    if (row < rows && col < cols) *reinterpret_cast<uint4*>(out + row * stride + col) = {w[0], w[1], w[2], w[3]};
  }
}

// ---- the state in global memory

// Calls body(element of z, pointer to the state's element) for what this lane holds of [Da, slice of Dc].
template <class Cfg, class Element, class Body>
__device__ __forceinline__ void for_each_state_element(StateFragment<Cfg>& z, Element* state, int64_t stride_d,
                                                       int64_t stride_e, int dim_a, int cols, const Lane& me,
                                                       const Body& body) {
  Element* at = state + me.pair * 2 * stride_d + (me.warp * 16 + me.group) * stride_e;
#pragma unroll
  for (int n = 0; n < Cfg::kTileA / 8; ++n) {
    if (n * 8 < dim_a) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (me.warp * 16 + 8 * (i >> 1) < cols) body(z[n][i], at + (i & 1) * stride_d + (i >> 1) * 8 * stride_e);
    }
    at += 8 * stride_d;
    if (Cfg::kSlopeGrad && n % 8 == 7) ptx::scheduling_fence();  // all loads at once would need too many registers
  }
}

// ---- mainloop

// 16 rows of x . out, this lane's part, with and without the row's distance to the edge the state enters at.
template <class Cfg>
__device__ __forceinline__ void dot_rows(float& plain, float& weighted, const float (&out)[2][4], int m,
                                         const typename Cfg::T* x, int64_t stride, bool reverse, int rows, int cols,
                                         const Lane& me) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = m * 16 + me.group + 8 * half;
    const float n = static_cast<float>(reverse ? rows - 1 - row : row + 1);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int col = me.warp * 16 + tile * 8 + me.pair * 2;
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

// One block walks one segment of one sequence, for one head and one slice of Dc. kStateOnly: only the state is
// gathered, from zero, into job.local.
//
// Grid: x = slices x heads x units (slices fastest, so that the blocks sharing a and b run together), y = jobs.
// Chunk by chunk, two stages:   copy(i+1) ...................................................
//                               | scores(i), inter(i) | barrier | intra(i), out(i), update(i) | barrier
template <class Cfg, bool kStateOnly>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    la2_trilinear_sm80_kernel(const __grid_constant__ TrilinearParams p) {
  using T = typename Cfg::T;
  constexpr bool kPool = !Cfg::kSplit;  // states may be those of a pool; gradients' are not
  extern __shared__ __align__(128) char raw[];
  SharedStorage<Cfg>& smem = *reinterpret_cast<SharedStorage<Cfg>*>(raw);
  const Lane me;
  const TrilinearJob& job = p.jobs[blockIdx.y];
  const bool reverse = job.reverse;

  const int group = job.by_slices.small_quotient(blockIdx.x);
  const int slice = static_cast<int>(blockIdx.x) - group * static_cast<int>(job.by_slices.divisor);
  const int unit_idx = p.by_heads.small_quotient(group), head = group - unit_idx * static_cast<int>(p.sizes.heads);
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

  const T* a = static_cast<const T*>(job.a.data) + unit.batch * job.a.stride_b + head * job.a.stride_h +
               unit.row_begin * job.a.stride_n;
  const T* b = static_cast<const T*>(job.b.data) + unit.batch * job.b.stride_b + head * job.b.stride_h +
               unit.row_begin * job.b.stride_n;
  const T* c = static_cast<const T*>(job.c.data) + unit.batch * job.c.stride_b + head * job.c.stride_h +
               unit.row_begin * job.c.stride_n + first_col;
  T* out = static_cast<T*>(job.out.data) + unit.batch * job.out.stride_b + head * job.out.stride_h +
           unit.row_begin * job.out.stride_n + first_col;

  // The dots count the slices of their own job; a launch has as many as its widest job.
  const int job_slices = (job.dim_c + Cfg::kSlice - 1) / Cfg::kSlice;
  if constexpr (Cfg::kSlopeGrad) {
    if (threadIdx.x == 0) {  // kept in shared memory: the registers are full
      const int64_t slot = simt::first_slot_of_unit(unit, p.segment_len, Cfg::kChunk);
      smem.slope_grad[0].x = static_cast<const T*>(job.x.data) + unit.batch * job.x.stride_b + head * job.x.stride_h +
                             unit.row_begin * job.x.stride_n + first_col;
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
  auto start_copy = [&](int step) {
    const int chunk = chunk_at(step), rows = rows_of(chunk), stage = step % Cfg::kStages;
    const int64_t row = static_cast<int64_t>(chunk) * Cfg::kChunk;
    if constexpr (!kStateOnly)
      tile::copy_rows_async<typename Cfg::TileA, Cfg::kThreads>(tile::shared_address(smem.a[stage].data),
                                                                a + row * job.a.stride_n, job.a.stride_n, rows,
                                                                job.dim_a, threadIdx.x);
    tile::copy_rows_async<typename Cfg::TileA, Cfg::kThreads>(tile::shared_address(smem.b[stage].data),
                                                              b + row * job.b.stride_n, job.b.stride_n, rows, job.dim_a,
                                                              threadIdx.x);
    tile::copy_rows_async<typename Cfg::TileC, Cfg::kThreads>(
        tile::shared_address(smem.c[stage].data), c + row * job.c.stride_n, job.c.stride_n, rows, cols, threadIdx.x);
  };
  if (num_chunks > 0) start_copy(0);
  smem.decay.fill(simt::slope_of<float>(p, unit.sequence, head), threadIdx.x, Cfg::kThreads);
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
  const bool wants_state = leaving.data != nullptr && (to_local || is_last);
  for (int step = 0; step < num_chunks; ++step) {
    const int chunk = chunk_at(step), rows = rows_of(chunk), stage = step % Cfg::kStages;
    const int64_t row = static_cast<int64_t>(chunk) * Cfg::kChunk;
    ptx::cp_async_wait_all();
    __syncthreads();  // this stage is full, and every warp is done with the other one and with the scores
    if (step + 1 < num_chunks) start_copy(step + 1);

    OutFragment<Cfg> o = {};
    float dots[3] = {};
    if constexpr (!kStateOnly) {
      scores<Cfg>(smem, stage, static_cast<float>(job.intra), reverse, me);
      if (has_state) inter<Cfg>(o, z, smem, stage, static_cast<float>(job.inter), reverse, rows, me);
      __syncthreads();  // the scores are complete
    }
    if constexpr (!kStateOnly) {
      ValueFragment<Cfg> values;
      load_values<Cfg>(values, smem, stage, me);
      if (Cfg::kSlopeGrad && smem.slope_grad[0].chunk_dots != nullptr) {
        const T* x_chunk = smem.slope_grad[0].x + row * job.x.stride_n;
#pragma unroll
        for (int m = 0; m < Cfg::kChunk / 16; ++m) {
          ptx::scheduling_fence();
          dot_rows<Cfg>(dots[0], dots[1], o[m], m, x_chunk, job.x.stride_n, reverse, rows, cols, me);
          ptx::scheduling_fence();
          if (reverse) continue;
          float by_distance[2][4] = {}, unused = 0.f;
          intra_rows<Cfg, false>(by_distance, m, smem.slope_grad[0].scores, values, me);
          dot_rows<Cfg>(dots[2], unused, by_distance, m, x_chunk, job.x.stride_n, reverse, rows, cols, me);
        }
      }
      if (reverse)  // one branch: in straight-line code the loads of operands overlap the products
        intra<Cfg, true>(o, smem, values, me);
      else
        intra<Cfg, false>(o, smem, values, me);
      store_out<Cfg>(out + row * job.out.stride_n, job.out.stride_n, o, rows, cols, me);
    }
    if (step + 1 < num_chunks || wants_state) {
      update_state<Cfg>(z, smem, stage, static_cast<float>(job.update), reverse, rows, me);
      has_state = true;
    }
    if (Cfg::kSlopeGrad && !kStateOnly && smem.slope_grad[0].chunk_dots != nullptr) {
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

  if (wants_state) {
    const int64_t slot = to_local ? unit_idx : kPool ? simt::slot_of(leaving, unit.state) : unit.sequence;
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
