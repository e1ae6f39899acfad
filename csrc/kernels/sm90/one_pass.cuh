// Few heads, bf16 and fp16: the state pass, the combine pass and the main pass of a launch in one kernel, whose blocks
// are all resident and wait for each other. Of few segments none is combined: each block adds up itself what the ones
// before its own gathered, and waits once, as late as it can. The notebook is ../DESIGN.md.
#pragma once

#include <cooperative_groups.h>

#include "../../core/tile.h"
#include "../simt/combine.cuh"
#include "gather.cuh"
#include "trilinear.cuh"

namespace la2::sm90 {

// Which instances have the kernel: of what was measured (../DESIGN.md) gradients lose, and so do slices of 128. SiLU's
// were not tried.
template <class Cfg>
constexpr bool kHasOnePass = !Cfg::kSplit && !Cfg::kSilu && Cfg::kSlice == 64 && Cfg::kTileA <= 128;

// Of a Config: the same for one item a block, none of a table, and its state pass.
template <class Cfg>
struct Alone : Cfg {
  static constexpr bool kAlone = true, kHasTable = false;
};
template <class Cfg>
using GatherOf = GatherConfig<typename Cfg::T, Cfg::kTileA, Cfg::kSlice, Cfg::kSplit, false, true>;

// The passes have the shared memory one after the other.
template <class Cfg>
union OnePassStorage {
  GatherStorage<GatherOf<Cfg>> gather;
  SharedStorage<Cfg> main;
};

// Starts to fetch into L2 what the main pass will want and the state pass does not: a. One warp.
template <class Cfg>
__device__ __forceinline__ void prefetch_rows(const TrilinearParams& p, const TrilinearJob& job, const JobMaps& maps) {
  const Schedule<Cfg::kAlone, Cfg::kHasTable> schedule(job);
  const Item item = schedule.item(p, job, schedule.first(), Cfg::kSlice);
  if (!item.is_valid || threadIdx.x % 32 != 0) return;
  for (int step = 0; step < item.num_chunks; ++step) {
    ptx::TmaBox box = item.box(item.chunk_at(step));
    for (box.col = 0; box.col < Cfg::kTileA; box.col += 64) ptx::tma_prefetch(&maps.a, box);
  }
}

// What la2_combine_simt_kernel does, by all threads of the grid.
template <int kThreads>
__device__ __forceinline__ void combine_segments(const TrilinearParams& p, const TrilinearJob& job) {
  using Elements = simt::Combination<float, true, 8>;  // with more, other roles would spill
  constexpr int kThreadsOfItem = 128, kItemsOfBlock = kThreads / kThreadsOfItem;
  constexpr int kElements = kThreadsOfItem * Elements::kSize;
  const int element_blocks = (static_cast<int>(p.local_floats) + kElements - 1) / kElements;
  const int heads = static_cast<int>(p.sizes.heads);
  const int num_items = element_blocks * heads * static_cast<int>(p.sizes.num_seqs);
  // Neighbours in different blocks.
  for (int item = threadIdx.x / kThreadsOfItem * gridDim.x + blockIdx.x; item < num_items;
       item += gridDim.x * kItemsOfBlock) {
    const int group = item / element_blocks, sequence = p.by_heads.small_quotient(group);
    const int head = group - sequence * heads;
    if (!simt::has_segments(p, sequence)) continue;
    const Elements elements(p, job, sequence, head);
    const int element = item % element_blocks * kElements + threadIdx.x % kThreadsOfItem * Elements::kSize;
    if (element < p.local_floats) elements.combine(element);
  }
}

// Of more segments, a combine pass and another wait cost less than what each block would read: 512 KB.
template <class Cfg>
constexpr int kMostSegmentsAdded = kMostRowsAdded / Cfg::kTileA;

// What enters an item: the sum of what the segments before it gathered alone, there once all blocks have arrived at the
// grid's barrier (gathered); or combined, and there already. Forward sweeps.
class StatesOfGrid {
 public:
  using Arrival = cooperative_groups::grid_group::arrival_token;
  __device__ StatesOfGrid(Arrival gathered, bool is_combined) : gathered_(gathered), is_combined_(is_combined) {}

  __device__ __forceinline__ int count(const TrilinearParams& p, const Item& item) const {
    if (is_combined_) return 1;
    const bool is_packed = p.cu_seqlens.data != nullptr;
    const int begin =
        is_packed ? static_cast<int>(simt::sequence_rows(p.cu_seqlens, item.sequence, p.sizes.length).begin) : 0;
    return p.by_segment_len.small_quotient(item.row_begin - begin);
  }
  // All threads of a block once, or none where its segment is the first (others have chunks, so that no role passes
  // them over): they meet at barrier 0, thread 0 when the grid's is complete.
  __device__ __forceinline__ void wait(const Item& item) const {
    if (!is_combined_ && !item.is_first) cooperative_groups::this_grid().barrier_wait(Arrival(gathered_));
  }

 private:
  Arrival gathered_;
  bool is_combined_;
};

// Grid: x = blocks of items, an item each, all resident.
//
// A hang is impossible by construction: a block arrives at the grid's barrier, whatever its item, before it waits for
// others; each thread then comes to StatesOfGrid::wait, or all pass it, having waited for copies and its own warpgroup
// alone. The rest is as in la2_trilinear_sm90_kernel.
template <class Base>
__global__ void __launch_bounds__(Base::kThreads, 1)
    la2_one_pass_sm90_kernel(const __grid_constant__ TrilinearParams p, const __grid_constant__ TrilinearMaps maps) {
  using Cfg = Alone<Base>;
  using Gather = GatherOf<Cfg>;
  extern __shared__ __align__(1024) char raw[];
  OnePassStorage<Cfg>& smem = *reinterpret_cast<OnePassStorage<Cfg>*>(raw);
  const TrilinearJob& job = p.jobs[0];
  const int role = threadIdx.x / 128;
  const auto grid = cooperative_groups::this_grid();
  const bool combines = p.by_segments.divisor > kMostSegmentsAdded<Cfg>;  // no packed sequence has more either

  if (threadIdx.x == 0) {
    init_barriers(smem.gather);
    ptx::tma_prefetch_map(&maps.jobs[0].b);
    ptx::tma_prefetch_map(&maps.jobs[0].c);
  }
  __syncthreads();
  if (role == 0) {
    if (threadIdx.x < 32) {
      produce<Gather>(smem.gather, p, job, maps.jobs[0]);
      prefetch_rows<Cfg>(p, job, maps.jobs[0]);
    }
  } else if (role <= Gather::kGatherers) {
    gather<Gather>(smem.gather, p, job, role - 1);
  }
  ptx::fence_proxy_async();  // before copies overwrite what threads wrote
  const auto gathered = grid.barrier_arrive();
  if (threadIdx.x == 0) {
    invalidate_barriers(smem.gather);
    init_barriers(smem.main, p);
  }
  __syncthreads();
  if (combines) {
    grid.barrier_wait(StatesOfGrid::Arrival(gathered));
    combine_segments<Cfg::kThreads>(p, job);
    grid.sync();
  }
  run_roles(smem.main, p, job, maps.jobs, false, StatesOfGrid(gathered, combines));
}

}  // namespace la2::sm90
