// Few heads and long sequences, bf16 and fp16: the state pass, the combine pass and the main pass of a forward in one
// kernel, whose blocks are all resident and wait for each other. The notebook is ../DESIGN.md.
#pragma once

#include <cooperative_groups.h>

#include <utility>

#include "../simt/vec.cuh"
#include "two_roles.cuh"

namespace la2::sm80 {

// Which instances have the kernel.
template <class Cfg>
constexpr bool kHasOnePass = sm80_has_one_pass({Cfg::kTileA, Cfg::kSlice, Cfg::kChunk}) && Cfg::kTwoRoles;

// A local state in the order of the fragments, 16 bytes a lane: kTileA * kSlice floats.
template <class Cfg, class Body>
__device__ __forceinline__ void for_each_state_vector(StateFragment<Cfg>& z, float* state, const Lane& me,
                                                      const Body& body) {
  float* const at = state + (me.warp * (Cfg::kBlockCols * Cfg::kTileA / 8) * 32 + me.lane) * 4;
#pragma unroll
  for (int g = 0; g < Cfg::kBlockCols; ++g)
#pragma unroll
    for (int n = 0; n < Cfg::kTileA / 8; ++n) body(z[g][n], at + (g * (Cfg::kTileA / 8) + n) * 32 * 4);
}

// What la2_combine_simt_kernel does with states of this order: what leaves a segment takes the place of what it
// gathered. The blocks of a head and slice share its elements out. By the makers, as the keepers have no registers for
// it. `first`: of the sequence's first segment.
template <class Cfg>
__device__ __forceinline__ void combine_segments(float* first, int64_t stride, int segment, int num_segments,
                                                 float decay, int maker) {
  if (num_segments < 2) return;  // or no unit
  if (decay < 0x1p-40f) return;  // nothing of a segment is left behind the next one (simt::window_chunks)
  constexpr int kAtOnce = 16, kVecs = 2, kApart = Cfg::kThreads / 2 * 4, kFloats = Cfg::kTileA * Cfg::kSlice;
  static_assert(kFloats % (kVecs * kApart) == 0);
  const int count = num_segments - 1;  // nobody gathered the last one
  for (int at = segment * kVecs * kApart + maker * 4; at < kFloats; at += num_segments * kVecs * kApart) {
    simt::Vec<float> z[kVecs] = {};
    float* place = first + at;
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kAtOnce) {
      simt::Vec<float> gathered[kAtOnce][kVecs] = {};  // else old ones would be kept throughout the kernel
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
          if (begin + i < count) gathered[i][v] = simt::load_vec(place + i * stride + v * kApart);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i, place += stride) {
        if (begin + i >= count) break;
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
#pragma unroll
          for (int e = 0; e < 4; ++e) z[v].x[e] = decay * z[v].x[e] + gathered[i][v].x[e];
          if (begin + i > 0) simt::store_global(place + v * kApart, z[v]);
        }
      }
    }
  }
}

// With what the threads that hold the state have no registers for.
template <class Cfg>
struct OnePassStorage {
  SharedStorage<Cfg> tiles;
  const float* initial;  // Z as it enters the first segment, and as it leaves the last one, at this head and slice:
  float* final;          // nullptr in other segments, and where there is none
  float* local;          // this segment's
  int segment, num_segments;
  float slope;
  bool gathers_all;  // from the segment's first chunk on, so that what enters it counts
};

// Grid: x = slices x heads x units, all resident; one job, not reverse.
//
// Twice through a segment: gathering its last `gathered` chunks, where it is not the sequence's last, and then as in
// la2_two_roles_sm80_kernel. Gathering, the makers copy and the keepers update. Before it, until the first chunk is
// there, a dry chunk fetches the code. A hang is impossible by construction: whatever its segment, a block comes to
// both of the grid's barriers, having waited for its own copies alone.
template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    la2_one_pass_sm80_kernel(const __grid_constant__ TrilinearParams p) {
  using T = typename Cfg::T;
  constexpr int kThreads = Cfg::kThreads;
  extern __shared__ __align__(128) char raw[];
  OnePassStorage<Cfg>& storage = *reinterpret_cast<OnePassStorage<Cfg>*>(raw);
  SharedStorage<Cfg>& smem = storage.tiles;
  const Lane me;
  const TrilinearJob& job = p.jobs[0];
  const auto grid = cooperative_groups::this_grid();

  const auto [slice, head, unit_idx] = place_of_block(p);
  const int first_col = slice * Cfg::kSlice;
  const int cols = min(job.dim_c - first_col, Cfg::kSlice);
  const simt::Unit unit = simt::find_unit<false, false>(p, unit_idx);
  const bool is_last = unit.segment + 1 == unit.num_segments;

  const int num_chunks = static_cast<int>((unit.length + Cfg::kChunk - 1) / Cfg::kChunk);  // 0: no unit
  const int last_rows = static_cast<int>(unit.length - static_cast<int64_t>(num_chunks - 1) * Cfg::kChunk);
  int gathered = unit.valid && !is_last ? num_chunks : 0;
  if (gathered > kFewChunks)
    gathered = simt::window_chunks<Cfg::kChunk>(simt::slope_of<float>(p, unit.sequence, head), num_chunks);

  if (me.warp >= Cfg::kWarps) {
    const int maker = static_cast<int>(threadIdx.x) - kThreads / 2;
    const int64_t first = static_cast<int64_t>(num_chunks - gathered) * Cfg::kChunk;
    const T* b = simt::first_row<const T>(job.b, unit, head) + first * job.b.stride_n;
    const T* c = simt::first_row<const T>(job.c, unit, head, first_col) + first * job.c.stride_n;
    auto start_copy = [&](int step) {
      if (step < gathered) {
        const int stage = step % kGatherStages;  // the third: keep_state
        const auto& to_b = stage == 2 ? smem.a[0] : smem.b[stage];
        const auto& to_c = stage == 2 ? smem.a[1] : smem.c[stage];
        const int copier = ptx::opaque(maker);  // or its addresses would be kept in registers throughout
        tile::copy_rows_async<typename Cfg::TileA, kThreads / 2>(
            tile::shared_address(to_b.data), b, ptx::opaque_wide(job.b.stride_n), Cfg::kChunk, job.dim_a, copier);
        tile::copy_rows_async<typename Cfg::TileC, kThreads / 2>(
            tile::shared_address(to_c.data), c, ptx::opaque_wide(job.c.stride_n), Cfg::kChunk, cols, copier);
        b += Cfg::kChunk * job.b.stride_n, c += Cfg::kChunk * job.c.stride_n;
      }
      ptx::cp_async_commit();
    };
#pragma unroll 1
    for (int step = 0; step < kGatherStages - 1; ++step) start_copy(step);
    ptx::named_barrier_sync(kDecayFilled, kThreads);
#pragma unroll 1
    for (int is_dry = ptx::opaque(1); is_dry >= 0; --is_dry) {
      make_outputs<Cfg>(smem, job, simt::first_row<T>(job.out, unit, head, first_col), is_dry ? 1 : num_chunks,
                        is_dry ? 0 : last_rows, cols, is_dry, Lane(ptx::opaque(maker)));
      if (!is_dry) return;
#pragma unroll 1
      for (int step = 0; step < gathered; ++step) {
        ptx::cp_async_wait<kGatherStages - 2>();
        ptx::named_barrier_arrive(kGathered, kThreads);
        ptx::named_barrier_sync(kUsed, kThreads);
        start_copy(step + kGatherStages - 1);
      }
      auto arrival = grid.barrier_arrive();
      const float decay = rounded_decay_power(storage.slope, static_cast<int>(p.segment_len));
      grid.barrier_wait(std::move(arrival));
      combine_segments<Cfg>(storage.local - storage.segment * job.local.stride_s, job.local.stride_s, storage.segment,
                            storage.num_segments, decay, maker);
      grid.sync();
    }
    return;
  }

  const float slope = simt::slope_of<float>(p, unit.sequence, head);
  if (threadIdx.x == 0) {
    const State& initial = job.initial;
    const MutableState& final = job.final;
    storage.initial = nullptr;
    if (initial.data != nullptr && unit.segment == 0)
      storage.initial = static_cast<const float*>(initial.data) + unit.sequence * initial.stride_s +
                        head * initial.stride_h + first_col * initial.stride_e;
    storage.final = nullptr;
    if (final.data != nullptr && unit.valid && is_last)
      storage.final = static_cast<float*>(final.data) + unit.sequence * final.stride_s + head * final.stride_h +
                      first_col * final.stride_e;
    storage.local = static_cast<float*>(job.local.data) + unit_idx * job.local.stride_s + head * job.local.stride_h +
                    slice * (Cfg::kTileA * Cfg::kSlice);
    // Offsets that descend, which nobody has checked, have more segments than there are units.
    const int most = static_cast<int>(p.num_units) - (unit_idx - static_cast<int>(unit.segment));
    storage.segment = static_cast<int>(unit.segment);
    storage.num_segments = min(static_cast<int>(unit.num_segments), most);
    storage.slope = slope;
    storage.gathers_all = gathered == num_chunks;
  }
  smem.decay.fill(slope, threadIdx.x, kThreads / 2);
  ptx::named_barrier_arrive(kDecayFilled, kThreads);
  ptx::named_barrier_sync(kKeepers, kThreads / 2);

  ChunkCopies<Cfg> copies(job, unit, head, first_col, cols, smem);
  // One piece of code for all.
#pragma unroll 1
  for (int pass = ptx::opaque(static_cast<int>(Walk::kDry)); pass <= static_cast<int>(Walk::kAll); ++pass) {
    const Walk walk = static_cast<Walk>(pass);
    StateFragment<Cfg> z = {};
    if (walk == Walk::kAll && storage.segment > 0) {
      // What leaves the segment before.
      for_each_state_vector<Cfg>(z, storage.local - job.local.stride_s, me, [](float (&x)[4], const float* at) {
        const float4 vec = *reinterpret_cast<const float4*>(at);
        x[0] = vec.x, x[1] = vec.y, x[2] = vec.z, x[3] = vec.w;
      });
    } else if (walk != Walk::kDry && storage.initial != nullptr && (walk == Walk::kAll || storage.gathers_all)) {
      const State& s = job.initial;
      for_each_state_element<Cfg>(z, storage.initial, ptx::opaque_wide(s.stride_d), ptx::opaque_wide(s.stride_e),
                                  ptx::opaque(job.dim_a), ptx::opaque(cols), me,
                                  [](float& element, const float* stored) { element = *stored; });
    }
    const int chunks = walk == Walk::kDry ? 1 : walk == Walk::kGathering ? gathered : num_chunks;
    const int end_rows = walk == Walk::kDry ? 0 : walk == Walk::kGathering ? Cfg::kChunk : last_rows;
    const bool wants_state = walk != Walk::kAll || storage.final != nullptr;
    keep_state<Cfg>(z, smem, copies, job.update, chunks, end_rows, wants_state, walk, me);
    if (walk == Walk::kDry) continue;
    if (walk == Walk::kAll) {
      if (storage.final == nullptr) return;
      const MutableState& s = job.final;
      for_each_state_element<Cfg>(z, storage.final, ptx::opaque_wide(s.stride_d), ptx::opaque_wide(s.stride_e),
                                  ptx::opaque(job.dim_a), ptx::opaque(cols), me,
                                  [](float& element, float* stored) { *stored = element; });
      return;
    }
    ptx::named_barrier_sync(kKeepers, kThreads / 2);  // nobody reads what was gathered
    copies.first(num_chunks, last_rows);
    if (gathered > 0)
      for_each_state_vector<Cfg>(z, storage.local, me, [](float (&x)[4], float* at) {
        __stwb(reinterpret_cast<float4*>(at), make_float4(x[0], x[1], x[2], x[3]));
      });
    auto arrival = grid.barrier_arrive();
    grid.barrier_wait(std::move(arrival));
    grid.sync();
  }
}

}  // namespace la2::sm80
