// bf16 and fp16 trilinear kernel for every GPU from sm_80: cp.async, ldmatrix, mma.sync, fp32 state in registers.
// The notebook is ../DESIGN.md.
#pragma once

#include <type_traits>

#include "../ptx/cp_async.cuh"
#include "../ptx/fence.cuh"
#include "../ptx/launch_order.cuh"
#include "../ptx/warpgroup.cuh"
#include "../simt/element.cuh"
#include "../simt/units.cuh"
#include "../tile/half_pair.cuh"
#include "../trilinear.h"
#include "steps.cuh"

namespace la2::sm80 {

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
