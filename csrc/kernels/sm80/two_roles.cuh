// Forwards of tile 128 x 128, bf16 and fp16, by two roles of four warps each: keepers hold the state and update it,
// makers make the outputs. The notebook is ../DESIGN.md.
#pragma once

#include <stddef.h>

#include <type_traits>

#include "../ptx/cp_async.cuh"
#include "../ptx/launch_order.cuh"
#include "../ptx/warpgroup.cuh"
#include "../simt/element.cuh"
#include "../simt/units.cuh"
#include "../trilinear.h"
#include "steps.cuh"

namespace la2::sm80 {

// Z as its keeper rounded it, in the order in which the maker of the same columns wants it, as B operand of a Z.
template <class Cfg>
struct HandedState {
  uint4 z[Cfg::kWarps][Cfg::kTileA / 16][Cfg::kBlockCols][32];
  float range[Cfg::kWarps];  // fp16: what a maker multiplies a Z by (operand_range)
};

template <class Cfg>
struct SharedStorage<Cfg, StorageOf::kTwoRoles> {
  typename Cfg::TileA a[Cfg::kStages];  // [C, Da]
  typename Cfg::TileA b[Cfg::kStages];  // [C, Da]
  typename Cfg::TileC c[Cfg::kStages];  // [C, slice]
  typename Cfg::TileP scores;           // [C, C] masked
  typename Cfg::TileOut out[Cfg::kWarps];
  HandedState<Cfg> handed;
  tile::Decay<Cfg::kChunk> decay;
};

// Each role arrives for the other: at kHanded the keepers, once the state as it enters chunk i is in shared memory, and
// the chunk; at kStateTaken the makers, once they are done with that state; at kFreed the makers, once they are done
// with chunk i - 1. kDecayFilled: decay is there. kGathered, kUsed: one_pass.cuh.
enum TwoRolesBarrier { kDecayFilled = 1, kFreed, kHanded, kStateTaken, kMakers, kKeepers, kGathered, kUsed };

// ---- steps of the makers

// Of the causal scores, 20 blocks of 16 rows and 8 columns, a maker computes five: those of columns 8 low and 8 high,
// low = its number and high = 7 - low.
struct ScoreBlocks {
  float low[3][4];  // of bands 1, 2, 3
  float high[4];    // of band 3
  float other[4];   // low of band 0, or high of band 2
};

// Calls body(band of rows, block of 8 columns, block of scores...).
template <class Body, class... Blocks>
__device__ __forceinline__ void for_each_score_block(const Lane& me, const Body& body, Blocks&... scores) {
  const int low = me.warp, high = 7 - me.warp;
  const bool other_is_low = me.warp < 2;
#pragma unroll
  for (int m = 1; m < 4; ++m) body(m, low, scores.low[m - 1]...);
  body(3, high, scores.high...);
  body(other_is_low ? 0 : 2, other_is_low ? low : high, scores.other...);
}

// What the scores and a Z are multiplied by, the same for all chunks.
struct MakerWeights {
  ScoreBlocks mask;  // M intra
  float rows[4][2];  // inter lambda^(i+1)

  template <class Cfg>
  __device__ __forceinline__ void fill(const SharedStorage<Cfg>& smem, float inter, float intra, const Lane& me) {
    const float* power = smem.decay.ascending();
    for_each_score_block(
        me,
        [&](int band, int block, float (&m)[4]) {
          const int distance = 16 * band + me.group - (8 * block + me.pair * 2);
#pragma unroll
          for (int i = 0; i < 4; ++i) m[i] = intra * power[distance + 8 * (i / 2) - i % 2];
        },
        mask);
#pragma unroll
    for (int i = 0; i < 8; ++i) rows[i / 2][i % 2] = inter * power[me.group + 1 + 8 * i];
  }
};

// out = a Z, and the scores a b^T, which want the same of a.
template <class Cfg>
__device__ __forceinline__ void inter_and_scores(OutFragment<Cfg>& out, ScoreBlocks& scores,
                                                 const HandedState<Cfg>& handed, const typename Cfg::TileA& a_tile,
                                                 const typename Cfg::TileA& b_tile, const Lane& me) {
  using T = typename Cfg::T;
  static_assert(Cfg::kChunk == 64 && Cfg::kWarps == 4, "five blocks of scores to a maker");
  const auto a = tile::blocks_rows_first(a_tile, 0, 0, me.lane);
  const auto b_low = tile::rows_of_units(b_tile, 8 * me.warp, me.lane);
  const auto b_high = tile::rows_of_units(b_tile, 8 * (7 - me.warp), me.lane);
  const bool other_is_low = me.warp < 2;
  // What the next 16 columns of a want is loaded before the products of these.
  uint32_t fa[2][Cfg::kChunk / 16][4], low[2][4], high[2][4];
  uint4 fz[2][Cfg::kBlockCols];
  auto load = [&](int d) {
#pragma unroll
    for (int g = 0; g < Cfg::kBlockCols; ++g) fz[d % 2][g] = handed.z[me.warp][d][g][me.lane];
    if (d % 2 == 0) {
      ptx::ldmatrix_x4(low[d / 2 % 2], b_low.at(0, 2 * d));
      ptx::ldmatrix_x4(high[d / 2 % 2], b_high.at(0, 2 * d));
    }
#pragma unroll
    for (int m = 0; m < Cfg::kChunk / 16; ++m) ptx::ldmatrix_x4(fa[d % 2][m], a.at(m * 16, 2 * d));
  };
  load(0);
#pragma unroll
  for (int d = 0; d < Cfg::kTileA / 16; ++d) {
    if (d + 1 < Cfg::kTileA / 16) load(d + 1);
    const int now = d % 2, of = d / 2 % 2;
    const uint32_t fl[2] = {low[of][2 * now], low[of][2 * now + 1]}, fh[2] = {high[of][2 * now], high[of][2 * now + 1]};
#pragma unroll
    for (int m = 0; m < Cfg::kChunk / 16; ++m) {
#pragma unroll
      for (int g = 0; g < Cfg::kBlockCols; ++g) {
        ptx::mma<T>(out[m][2 * g], fa[now][m], fz[now][g].x, fz[now][g].y);
        ptx::mma<T>(out[m][2 * g + 1], fa[now][m], fz[now][g].z, fz[now][g].w);
      }
      if (m > 0) ptx::mma<T>(scores.low[m - 1], fa[now][m], fl[0], fl[1]);
      if (m == 3) ptx::mma<T>(scores.high, fa[now][m], fh[0], fh[1]);
      if (m == 0) ptx::mma_if<T>(other_is_low, scores.other, fa[now][m], fl[0], fl[1]);
      if (m == 2) ptx::mma_if<T>(!other_is_low, scores.other, fa[now][m], fh[0], fh[1]);
    }
  }
}

// The scores, masked and rounded, to shared memory.
template <class Cfg>
__device__ __forceinline__ void store_scores(typename Cfg::TileP& tile, const ScoreBlocks& scores,
                                             const ScoreBlocks& mask, const Lane& me) {
  using T = typename Cfg::T;
  using Tile = typename Cfg::TileP;
  for_each_score_block(
      me,
      [&](int band, int block, const float (&p)[4], const float (&m)[4]) {
        const uint32_t at = Tile::offset(16 * band + me.group, block) + me.pair * 4u;
        store_pair<T>(tile, at, {p[0] * m[0], p[1] * m[1]});
        store_pair<T>(tile, at + 8 * Tile::kUnits * 16, {p[2] * m[2], p[3] * m[3]});
      },
      scores, mask);
}

// This warp's columns of c, as B operand of scores c alone: as Values have them, each product would want its two
// registers side by side first.
template <class Cfg>
using ChunkValues = Values<Cfg>[Cfg::kChunk / 16];
template <class Cfg>
__device__ __forceinline__ void load_values(ChunkValues<Cfg>& c, const typename Cfg::TileC& tile, const Lane& me) {
  const auto blocks = tile::blocks_rows_first(tile, 0, 2 * Cfg::kBlockCols * me.warp, me.lane);
#pragma unroll
  for (int k = 0; k < Cfg::kChunk / 16; ++k)
#pragma unroll
    for (int g = 0; g < Cfg::kBlockCols; ++g) ptx::ldmatrix_x4_trans(c[k][g], blocks.at(k * 16, 2 * g));
}
// out += scores c, without the blocks that are all masked.
template <class Cfg>
__device__ __forceinline__ void intra_of_values(OutFragment<Cfg>& out, const typename Cfg::TileP& tile,
                                                const ChunkValues<Cfg>& c, const Lane& me) {
  using T = typename Cfg::T;
  constexpr int kBands = Cfg::kBands;
  const auto scores = tile::blocks_rows_first(tile, 0, 0, me.lane);
  uint32_t fp[kBands * (kBands + 1) / 2][4];
#pragma unroll
  for (int k = 0, i = 0; k < kBands; ++k)
#pragma unroll
    for (int m = k; m < kBands; ++m, ++i) ptx::ldmatrix_x4(fp[i], scores.at(m * 16, 2 * k));
#pragma unroll
  for (int k = 0, i = 0; k < kBands; ++k)
#pragma unroll
    for (int m = k; m < kBands; ++m, ++i)
#pragma unroll
      for (int t = 0; t < 2 * Cfg::kBlockCols; ++t)
        ptx::mma<T>(out[m][t], fp[i], c[k][t / 2][2 * (t % 2)], c[k][t / 2][2 * (t % 2) + 1]);
}

// This warp's columns of out, rounded, to shared memory.
template <class Cfg>
__device__ __forceinline__ void stage_columns(typename Cfg::TileOut& tile, const OutFragment<Cfg>& out,
                                              const Lane& me) {
  using T = typename Cfg::T;
  using Tile = typename Cfg::TileOut;
#pragma unroll
  for (int t = 0; t < 2 * Cfg::kBlockCols; ++t) {
    const uint32_t at = Tile::offset(me.group, t) + me.pair * 4u;
#pragma unroll
    for (int m = 0; m < Cfg::kChunk / 16; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pair<T>(tile, at + (m * 16 + half * 8) * Tile::kUnits * 16,
                      {out[m][t][2 * half], out[m][t][2 * half + 1]});
  }
}

// From there to memory, rows [0, rows), 16 bytes a lane.
template <class Cfg>
__device__ __forceinline__ void store_columns(typename Cfg::T* out, int64_t stride, const typename Cfg::TileOut& tile,
                                              int rows, int cols, const Lane& me) {
  using Tile = typename Cfg::TileOut;
  constexpr int kRowStep = 32 / Tile::kUnits, kVecs = Cfg::kChunk / kRowStep;
  const int row = me.lane / Tile::kUnits, unit = me.lane % Tile::kUnits;
  const char* from = reinterpret_cast<const char*>(tile.data) + Tile::offset(row, unit);
  static_assert(kRowStep % 8 == 0, "the swizzle stays");
  uint4 vec[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) vec[i] = *reinterpret_cast<const uint4*>(from + i * kRowStep * Tile::kUnits * 16);
  const int col = me.warp * Cfg::kWarpCols + unit * 8;
  const int my_rows = col < cols ? rows - row : 0;
  typename Cfg::T* to = out + row * stride + col;
#pragma unroll
  for (int i = 0; i < kVecs; ++i, to += kRowStep * stride)
    if (i * kRowStep < my_rows) *reinterpret_cast<uint4*>(to) = vec[i];
}

// All chunks. is_dry: tiles are anything, and no rows are stored.
template <class Cfg>
__device__ __forceinline__ void make_outputs(SharedStorage<Cfg>& smem, const TrilinearJob& job, typename Cfg::T* to,
                                             int num_chunks, int last_rows, int cols, bool is_dry, const Lane& me) {
  constexpr int kThreads = Cfg::kThreads;
  MakerWeights weights;
  weights.fill<Cfg>(smem, static_cast<float>(job.inter), static_cast<float>(job.intra), me);
  ptx::named_barrier_arrive(kFreed, kThreads);
#pragma unroll 1
  for (int chunk = 0; chunk < num_chunks; ++chunk) {
    const int stage = chunk % Cfg::kStages;
    const auto& any = reinterpret_cast<const typename Cfg::TileA&>(smem.handed);
    OutFragment<Cfg> out = {};
    ScoreBlocks scores = {};
    ptx::named_barrier_sync(kHanded, kThreads);
    inter_and_scores<Cfg>(out, scores, smem.handed, is_dry ? any : smem.a[stage], is_dry ? any : smem.b[stage], me);
    float range = 1.f;
    if constexpr (std::is_same_v<typename Cfg::T, __half>) range = smem.handed.range[me.warp];

    store_scores<Cfg>(smem.scores, scores, weights.mask, me);
    ChunkValues<Cfg> c;
    load_values<Cfg>(c, is_dry ? any : smem.c[stage], me);
#pragma unroll
    for (int m = 0; m < Cfg::kChunk / 16; ++m)
#pragma unroll
      for (int t = 0; t < 2 * Cfg::kBlockCols; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][t][i] *= weights.rows[m][i / 2] * range;
    ptx::named_barrier_sync(kMakers, kThreads / 2);
    ptx::named_barrier_arrive(kStateTaken, kThreads);
    intra_of_values<Cfg>(out, smem.scores, c, me);
    ptx::named_barrier_arrive(kFreed, kThreads);

    __syncwarp();
    stage_columns<Cfg>(smem.out[me.warp], out, me);
    __syncwarp();
    const int rows = chunk + 1 < num_chunks ? Cfg::kChunk : last_rows;
    store_columns<Cfg>(to, job.out.stride_n, smem.out[me.warp], rows, cols, me);
    to += Cfg::kChunk * job.out.stride_n;
  }
}

// ---- steps of the keepers

template <class Cfg>
__device__ __forceinline__ void hand_over(HandedState<Cfg>& handed, const StateFragment<Cfg>& z, const Lane& me) {
  using T = typename Cfg::T;
  const float2 range = operand_range<Cfg>(z);
  if constexpr (std::is_same_v<T, __half>)
    if (me.lane == 0) handed.range[me.warp] = range.y;
#pragma unroll
  for (int d = 0; d < Cfg::kTileA / 16; ++d)
#pragma unroll
    for (int g = 0; g < Cfg::kBlockCols; ++g) {
      const float (&low)[4] = z[g][2 * d], (&high)[4] = z[g][2 * d + 1];
      handed.z[me.warp][d][g][me.lane] = {
          tile::pack<T>(low[0] * range.x, low[1] * range.x), tile::pack<T>(high[0] * range.x, high[1] * range.x),
          tile::pack<T>(low[2] * range.x, low[3] * range.x), tile::pack<T>(high[2] * range.x, high[3] * range.x)};
    }
}

// The keepers' copies of a, b and c, chunk behind chunk.
template <class Cfg>
class ChunkCopies {
  using T = typename Cfg::T;
  using Tile = typename Cfg::TileA;
  static constexpr int kRowStep = 32 * Cfg::kWarps / Tile::kUnits, kParts = Cfg::kChunk / kRowStep;
  static constexpr uint32_t kTile = sizeof(Tile), kOperand = Cfg::kStages * kTile, kPart = kRowStep * Tile::kUnits * 16;
  static_assert(kRowStep % 8 == 0 && sizeof(typename Cfg::TileC) == kTile);

 public:
  __device__ __forceinline__ ChunkCopies(const TrilinearJob& job, const simt::Unit& unit, int head, int first_col,
                                         int cols, SharedStorage<Cfg>& smem)
      : job_(job), row_(threadIdx.x / Tile::kUnits) {
    using Storage = SharedStorage<Cfg>;
    static_assert(offsetof(Storage, b) == kOperand && offsetof(Storage, c) == 2 * kOperand, "behind each other");
    const int col = threadIdx.x % Tile::kUnits * 8;
    in_a_ = col < job.dim_a, in_c_ = col < cols;
    a_ = simt::first_row<const T>(job.a, unit, head) + row_ * job.a.stride_n + (in_a_ ? col : 0);
    b_ = simt::first_row<const T>(job.b, unit, head) + row_ * job.b.stride_n + (in_a_ ? col : 0);
    c_ = simt::first_row<const T>(job.c, unit, head, first_col) + row_ * job.c.stride_n + (in_c_ ? col : 0);
    to_ = tile::shared_address(smem.a[0].data) + Tile::offset(row_, col / 8);
  }

  // The next chunk, which has all its rows.
  __device__ __forceinline__ void whole(int stage) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint32_t to = to_ + stage * kTile + part * kPart;
      ptx::cp_async_16(to, a_, in_a_);
      a_ += kRowStep * job_.a.stride_n;
      ptx::cp_async_16(to + kOperand, b_, in_a_);
      b_ += kRowStep * job_.b.stride_n;
      ptx::cp_async_16(to + 2 * kOperand, c_, in_c_);
      c_ += kRowStep * job_.c.stride_n;
    }
  }
  // The next chunk, which is the last. Where it has no rows, any legal address will do.
  __device__ __forceinline__ void last(int stage, int rows) {
    const auto *any_a = static_cast<const T*>(job_.a.data), *any_b = static_cast<const T*>(job_.b.data),
               *any_c = static_cast<const T*>(job_.c.data);
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      const bool valid = row_ + part * kRowStep < rows;
      const uint32_t to = to_ + stage * kTile + part * kPart;
      ptx::cp_async_16(to, valid ? a_ : any_a, valid && in_a_);
      ptx::cp_async_16(to + kOperand, valid ? b_ : any_b, valid && in_a_);
      ptx::cp_async_16(to + 2 * kOperand, valid ? c_ : any_c, valid && in_c_);
      a_ += kRowStep * job_.a.stride_n, b_ += kRowStep * job_.b.stride_n, c_ += kRowStep * job_.c.stride_n;
    }
  }
  // The first chunk of all.
  __device__ __forceinline__ void first(int num_chunks, int last_rows) {
    if (num_chunks > 1)
      whole(0);
    else if (num_chunks == 1)
      last(0, last_rows);
    ptx::cp_async_commit();
  }

 private:
  const TrilinearJob& job_;
  const T *a_, *b_, *c_;  // this thread's, of the next chunk
  uint32_t to_;           // in the first stage of a
  int row_;
  bool in_a_, in_c_;  // whether there are such columns
};

// kDry: one chunk, whose tiles are anything and whose results are dropped. kGathering: only the state, of b and c that
// the makers copy (one_pass.cuh).
enum class Walk { kDry, kGathering, kAll };
constexpr int kGatherStages = 3;

// All chunks, the first of which is being copied. The last one does not change the state unless that is wanted.
template <class Cfg>
__device__ __forceinline__ void keep_state(StateFragment<Cfg>& z, SharedStorage<Cfg>& smem, ChunkCopies<Cfg>& copies,
                                           double update, int num_chunks, int last_rows, bool wants_state, Walk walk,
                                           const Lane& me) {
  constexpr int kThreads = Cfg::kThreads;
  static_assert(Cfg::kStages == 2 && Cfg::kHelpers == Cfg::kWarps, "the other stage; the half of the threads");
  static_assert(sizeof(HandedState<Cfg>) >= sizeof(typename Cfg::TileA), "any tile, where none is there");
  const float factor = static_cast<float>(update);
  const bool gathers = walk == Walk::kGathering;
#pragma unroll 1
  for (int chunk = 0; chunk < num_chunks; ++chunk) {
    const int stage = gathers ? chunk % kGatherStages : chunk % Cfg::kStages;
    if (gathers) {
      ptx::named_barrier_sync(kGathered, kThreads);
      ptx::named_barrier_arrive(kUsed, kThreads);
    } else {
      hand_over<Cfg>(smem.handed, z, me);
      ptx::cp_async_wait<0>();
      ptx::named_barrier_sync(kFreed, kThreads);  // and all keepers are done with the chunk before
      ptx::named_barrier_arrive(kHanded, kThreads);
      if (chunk + 2 < num_chunks)
        copies.whole(stage ^ 1);
      else if (chunk + 2 == num_chunks)
        copies.last(stage ^ 1, last_rows);
      ptx::cp_async_commit();
    }
    const auto& any = reinterpret_cast<const typename Cfg::TileA&>(smem.handed);
    const auto& b = walk == Walk::kDry ? any
                    : stage == 2       ? smem.a[0]
                                       : smem.b[stage];  // the third: where a is otherwise
    const auto& c = walk == Walk::kDry ? any : stage == 2 ? smem.a[1] : smem.c[stage];
    const int rows = chunk + 1 < num_chunks ? Cfg::kChunk : last_rows;
    if (chunk + 1 < num_chunks || wants_state) {
      scale_state<Cfg>(z, smem.decay.ascending()[rows]);
      add_chunk<Cfg>(z, b, c, smem.decay, factor, false, rows, me);
    }
    if (!gathers) ptx::named_barrier_sync(kStateTaken, kThreads);
  }
  if (!gathers) ptx::named_barrier_sync(kFreed, kThreads);
}

// ---- mainloop

// Which slice, head and unit this block has. Grid: x = slices x heads x units.
struct BlockPlace {
  int slice, head, unit_idx;
};
__device__ __forceinline__ BlockPlace place_of_block(const TrilinearParams& p) {
  const Division& by_slices = p.jobs[0].by_slices;
  const int group = by_slices.small_quotient(blockIdx.x), unit_idx = p.by_heads.small_quotient(group);
  return {static_cast<int>(blockIdx.x) - group * static_cast<int>(by_slices.divisor),
          group - unit_idx * static_cast<int>(p.sizes.heads), unit_idx};
}

// As la2_trilinear_sm80_kernel, of one job that is not reverse. Of chunk i:
//
//   keepers:  | Z to shared memory | copy(i+1), update              |
//   makers:                        | a Z and scores | scores c, out |
template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    la2_two_roles_sm80_kernel(const __grid_constant__ TrilinearParams p) {
  using T = typename Cfg::T;
  constexpr int kThreads = Cfg::kThreads;
  extern __shared__ __align__(128) char raw[];
  SharedStorage<Cfg>& smem = *reinterpret_cast<SharedStorage<Cfg>*>(raw);
  const Lane me;
  const TrilinearJob& job = p.jobs[0];
  const auto [slice, head, unit_idx] = place_of_block(p);
  const int first_col = slice * Cfg::kSlice;
  const int cols = min(job.dim_c - first_col, Cfg::kSlice);
  ptx::launch_dependents();
  const simt::Unit unit = simt::find_unit(p, unit_idx);
  if (cols <= 0 || !unit.valid) {
    ptx::wait_for_previous_kernel();  // as below
    return;
  }
  const int num_chunks = static_cast<int>((unit.length + Cfg::kChunk - 1) / Cfg::kChunk);
  const int last_rows = static_cast<int>(unit.length - static_cast<int64_t>(num_chunks - 1) * Cfg::kChunk);

  if (me.warp >= Cfg::kWarps) {
    ptx::named_barrier_sync(kDecayFilled, kThreads);
    make_outputs<Cfg>(smem, job, simt::first_row<T>(job.out, unit, head, first_col), num_chunks, last_rows, cols, false,
                      Lane(threadIdx.x - kThreads / 2));
    return;
  }

  ChunkCopies<Cfg> copies(job, unit, head, first_col, cols, smem);
  copies.first(num_chunks, last_rows);
  smem.decay.fill(simt::slope_of<float>(p, unit.sequence, head), threadIdx.x, kThreads / 2);
  ptx::named_barrier_arrive(kDecayFilled, kThreads);
  // The combine pass, whose states this one starts from; and whoever waits for this kernel waits for that one too.
  ptx::wait_for_previous_kernel();

  // Z as it enters this segment.
  StateFragment<Cfg> z = {};
  const void* entering = p.is_cut ? job.local.data : job.initial.data;
  const int64_t entering_slot = p.is_cut ? unit_idx : simt::slot_of(job.initial, unit.state);
  if (entering != nullptr && entering_slot >= 0) {
    const int64_t stride_s = p.is_cut ? job.local.stride_s : job.initial.stride_s;
    const int64_t stride_h = p.is_cut ? job.local.stride_h : job.initial.stride_h;
    const int64_t stride_d = p.is_cut ? job.local.stride_d : job.initial.stride_d;
    const int64_t stride_e = p.is_cut ? job.local.stride_e : job.initial.stride_e;
    const int64_t offset = entering_slot * stride_s + head * stride_h + first_col * stride_e;
    simt::with_state_type<float>(!p.is_cut && job.initial.is_bf16, [&](auto element_in_memory) {
      using Stored = decltype(element_in_memory);
      for_each_state_element<Cfg>(z, static_cast<const Stored*>(entering) + offset, stride_d, stride_e, job.dim_a, cols,
                                  me, [](float& element, const Stored* stored) { element = simt::to_acc(*stored); });
    });
  }
  const MutableState& leaving = job.final;
  const bool wants_state = leaving.data != nullptr && simt::ends_sweep(unit, false);
  keep_state<Cfg>(z, smem, copies, job.update, num_chunks, last_rows, wants_state, Walk::kAll, me);
  const int64_t slot = wants_state ? simt::slot_of(leaving, unit.state) : -1;
  if (slot < 0) return;
  const int64_t offset = slot * leaving.stride_s + head * leaving.stride_h + first_col * leaving.stride_e;
  simt::with_state_type<float>(leaving.is_bf16, [&](auto element_in_memory) {
    using Stored = decltype(element_in_memory);
    for_each_state_element<Cfg>(z, static_cast<Stored*>(leaving.data) + offset, leaving.stride_d, leaving.stride_e,
                                job.dim_a, cols, me,
                                [](float& element, Stored* stored) { simt::from_acc(*stored, element); });
  });
}

}  // namespace la2::sm80
