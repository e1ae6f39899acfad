// bf16 and fp16 trilinear kernel for Hopper: copy engine, wgmma, warp roles, fp32 state in registers.
// The notebook is ../DESIGN.md.
#pragma once

#include "activate.cuh"
#include "carry.cuh"
#include "outputs.cuh"

namespace la2::sm90 {

// ---- producer

// Warp 0 of the producer warpgroup; lane 0 starts the copies.
template <class Cfg, class States>
__device__ __forceinline__ void produce(SharedStorage<Cfg>& smem, const TrilinearParams& p, const TrilinearJob& job,
                                        const JobMaps* maps, const States& states) {
  const Schedule<Cfg::kAlone, Cfg::kHasTable> schedule(job);
  const int lane = threadIdx.x % 32;
  Ring<Cfg::kStages> ring;
  uint32_t tail_parities = 0;
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item item = schedule.item(p, job, index, Cfg::kSlice);
    if (!item.is_valid) break;
    for (int step = 0; step < item.num_chunks; ++step, ring.advance()) {
      const int chunk = item.chunk_at(step), rows = item.rows_of(chunk);
      Stage<Cfg>& stage = smem.stages[ring.stage];
      // Behind the end of a dense sequence the map ends and zeroes come; behind a packed one, its neighbour.
      const bool clears = p.cu_seqlens.data != nullptr && rows < kChunk;
      const uint32_t full = shared_address(Cfg::kSilu ? &smem.landed[ring.stage] : &smem.full[ring.stage]);
      const uint32_t barrier = clears ? shared_address(&smem.tail[ring.stage]) : full;
      ptx::mbarrier_wait(shared_address(&smem.empty[ring.stage]), ring.parity ^ 1);
      if (lane == 0) {
        const ptx::TmaBox box = item.box(chunk);
        ptx::mbarrier_arrive_expect(barrier, sizeof(Stage<Cfg>));
        load_tile<typename Cfg::TileA>(shared_address(&stage.b), &maps->b, barrier, box, 0);
        if constexpr (Cfg::kStagesOfA == 0)
          load_tile<typename Cfg::TileA>(shared_address(&stage.a[0]), &maps->a, barrier, box, 0);
        load_tile<typename Cfg::TileC>(shared_address(&stage.c), &maps->c, barrier, box, item.first_col);
        if constexpr (Cfg::kBoth)
          load_tile<typename Cfg::TileC>(shared_address(&stage.second_a[0]), &maps[1].a, barrier, box, 0);
      }
      if (clears) clear_tail(stage.b, stage.c, rows, barrier, full, ring.stage, tail_parities, lane);
      // Of the stages left none comes free before those wait as well who read them.
      if (step + 1 == min(Cfg::kStages, item.num_chunks)) states.wait(item);
    }
  }
}

// One of the warps that take SiLU, `thread` of all of theirs.
template <class Cfg>
__device__ __forceinline__ void activate(SharedStorage<Cfg>& smem, const TrilinearParams& p, const TrilinearJob& job,
                                         int thread) {
  const Schedule<Cfg::kAlone, Cfg::kHasTable> schedule(job);
  const int silu = job.silu;
  Ring<Cfg::kStages> ring;
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item item = schedule.item(p, job, index, Cfg::kSlice);
    if (!item.is_valid) break;
    for (int step = 0; step < item.num_chunks; ++step, ring.advance()) {
      const int stage = ring.stage;
      activate_stage<typename Cfg::T, Cfg::kActivators>(smem.stages[stage], silu, smem.landed[stage], smem.full[stage],
                                                        ring.parity, thread);
    }
  }
}

// A warp without a role, where all threads of a block wait for the states of its one item.
template <class Cfg, class States>
__device__ __forceinline__ void wait_idly(const TrilinearParams& p, const TrilinearJob& job, const States& states) {
  const Schedule<Cfg::kAlone, Cfg::kHasTable> schedule(job);
  const Item item = schedule.item(p, job, schedule.first(), Cfg::kSlice);
  if (item.is_valid) states.wait(item);
}

// Warp 1 of the producer warpgroup, where a has stages of its own.
template <class Cfg>
__device__ __forceinline__ void produce_a(SharedStorage<Cfg>& smem, const TrilinearParams& p, const TrilinearJob& job,
                                          const CUtensorMap& map) {
  const Schedule<Cfg::kAlone, Cfg::kHasTable> schedule(job);
  Ring<Cfg::kStagesOfA> ring;
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item item = schedule.item(p, job, index, Cfg::kSlice);
    if (!item.is_valid) break;
    for (int step = 0; step < item.num_chunks; ++step, ring.advance()) {
      const uint32_t full = shared_address(&smem.full_a[ring.stage]);
      ptx::mbarrier_wait(shared_address(&smem.empty_a[ring.stage]), ring.parity ^ 1);
      if (threadIdx.x % 32 != 0) continue;
      ptx::mbarrier_arrive_expect(full, Cfg::TileA::kBytes);
      load_tile<typename Cfg::TileA>(shared_address(&smem.a[ring.stage]), &map, full, item.box(item.chunk_at(step)), 0);
    }
  }
}

// ---- kernel

// One thread.
template <class Cfg>
__device__ __forceinline__ void init_barriers(SharedStorage<Cfg>& smem, const TrilinearParams& p) {
  constexpr int kWarpsOfRole = 4;
  constexpr int kConsumerWarps = 2 * kWarpsOfRole;  // of a chunk
  const int more = is_followed<Cfg>(p) ? 31 * kWarpsOfRole : 0;
  for (int i = 0; i < Cfg::kStages; ++i) {
    ptx::mbarrier_init(shared_address(&smem.full[i]), Cfg::kSilu ? 32 * Cfg::kActivators : 1);
    ptx::mbarrier_init(shared_address(&smem.tail[i]), 1);
    if constexpr (Cfg::kSilu) ptx::mbarrier_init(shared_address(&smem.landed[i]), 1);
    ptx::mbarrier_init(shared_address(&smem.empty[i]), kConsumerWarps + more);
  }
  for (int i = 0; i < Cfg::kStagesOfA; ++i) {
    ptx::mbarrier_init(shared_address(&smem.full_a[i]), 1);
    ptx::mbarrier_init(shared_address(&smem.empty_a[i]), kWarpsOfRole);
  }
  for (int i = 0; i < Cfg::kStateBuffers; ++i) {
    ptx::mbarrier_init(shared_address(&smem.state_full[i]), kWarpsOfRole);
    ptx::mbarrier_init(shared_address(&smem.state_empty[i]), kWarpsOfRole);
  }
  for (int i = 0; i < Cfg::kStorers; ++i) {
    ptx::mbarrier_init(shared_address(&smem.staged[i]), kWarpsOfRole);
    ptx::mbarrier_init(shared_address(&smem.stored[i]), 1);
  }
  ptx::mbarrier_init_fence();
}

// All threads, once: each warpgroup takes its registers and its role.
template <class Cfg, class States>
__device__ __forceinline__ void run_roles(SharedStorage<Cfg>& smem, const TrilinearParams& p, const TrilinearJob& job,
                                          const JobMaps* job_maps, bool reads_previous, const States& states) {
  const int role = threadIdx.x / 128;
  if (role <= Cfg::kActivatorGroups) {
    ptx::registers_release<Cfg::kProducerRegisters>();
    if (threadIdx.x < 32) produce<Cfg>(smem, p, job, job_maps, states);
    if constexpr (Cfg::kSilu)
      if (threadIdx.x >= 32) activate<Cfg>(smem, p, job, static_cast<int>(threadIdx.x) - 32);
    if constexpr (Cfg::kAlone)
      if (threadIdx.x >= 32) wait_idly<Cfg>(p, job, states);
    if constexpr (Cfg::kStagesOfA > 0)
      if (threadIdx.x / 32 == 1) produce_a<Cfg>(smem, p, job, job_maps->a);
    if constexpr (Cfg::kStorers > 0) {
      if (threadIdx.x / 32 == 1) store_output<Cfg>(smem, smem.out[0], p, job, job, job_maps[0].out, 0);
      if (threadIdx.x / 32 == 2) store_output<Cfg>(smem, smem.second_out, p, job, p.jobs[1], job_maps[1].out, 1);
    }
  } else if (role <= Cfg::kActivatorGroups + Cfg::kOutputGroups) {
    ptx::registers_acquire<Cfg::kOutputRegisters>();
    if constexpr (Cfg::kTakesTurns) {
      write_outputs_in_turns<Cfg>(smem, p, job, *job_maps, role - 1, states);
    } else if constexpr (Cfg::kBoth) {
      write_both_outputs<Cfg>(smem, p);
    } else {
      write_outputs<Cfg>(smem, p, job, *job_maps);
    }
  } else {
    ptx::registers_acquire<Cfg::kStateRegisters>();
    if constexpr (Cfg::kTakesTurns) {
      carry_state_ahead<Cfg>(smem, p, job, reads_previous, states);
    } else {
      carry_state<Cfg>(smem, p, job, reads_previous);
    }
  }
}

// A block walks its items, each a segment of a sequence for one head and slice of Dc.
// reads_previous: the kernel before this one wrote job.local.
//
// Grid: x = blocks of items, y = jobs. Three warpgroups, or four where outputs take turns or SiLU is taken; chunk i:
//
//   producer   copy(i+2) ........................................
//   (SiLU)     | wait copy(i+1) | SiLU of a, b, c(i+1) ...
//   output     | scores(i+1) | wait Z(i) | a Z(i) | mask(i) | scores c | store(i) ...
//   (both)     | scores c | scores(i+1) | wait Z(i+1) | a Z(i+1) begins | stage(i) | mask(i+1) | a Z(i+1) is there ...
//   store      (both) | wait stage(i) | store(i) ...
//   (in turns) | scores(i) | wait Z(i) | a Z(i) | mask(i) | scores c | store(i) | scores(i+2) ...
//   state      | Z(i) rounded | wait copy(i) | Z(i+1) = lambda^C Z(i) + b^T w c | Z(i+1) rounded ...
//   (ahead)    | b^T w c begins | Z(i) rounded | wait copy(i+1) | Z(i+1) = lambda^C Z(i) + b^T w c is there ...
//
// A hang is impossible by construction: every wait is for arrivals counted from the roles in init_barriers, and each
// role walks the same chunks.
template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    la2_trilinear_sm90_kernel(const __grid_constant__ TrilinearParams p, const __grid_constant__ TrilinearMaps maps,
                              bool reads_previous) {
  extern __shared__ __align__(1024) char raw[];
  SharedStorage<Cfg>& smem = *reinterpret_cast<SharedStorage<Cfg>*>(raw);
  const TrilinearJob& job = p.jobs[blockIdx.y];
  const JobMaps* job_maps = &maps.jobs[blockIdx.y];
  if (Cfg::kHasTable && p.units != nullptr) {
    const UnitEntry& first = Schedule<Cfg::kAlone, Cfg::kHasTable>(job).first_entry(p);
    if (first.segment < 0) {  // more blocks than the device found units for: nothing to do
      if (blockIdx.x == 0) ptx::wait_for_previous_kernel();  // as below
      return;
    }
  }

  if (threadIdx.x == 0) {
    init_barriers(smem, p);
    ptx::tma_prefetch_map(&job_maps->b);
    ptx::tma_prefetch_map(&job_maps->c);
  }
  __syncthreads();
  // What is launched behind a gradient reads states as well, and does not wait for them itself.
  if (Cfg::kSplit && reads_previous) ptx::wait_for_previous_kernel();
  ptx::launch_dependents();

  using States = std::conditional_t<Cfg::kTakesTurns, StatesOfSegments, CombinedStates>;
  run_roles(smem, p, job, job_maps, reads_previous, States());
  // Whoever waits for this kernel has thereby waited for the one that it overlaps.
  ptx::wait_for_previous_kernel();
}

}  // namespace la2::sm90