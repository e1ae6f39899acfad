// Few heads, bf16 and fp16: the state pass, the combine pass and the main pass of a launch in one kernel, whose blocks
// are all resident and wait for each other. The notebook is ../DESIGN.md.
#pragma once

#include <cooperative_groups.h>

#include "../simt/combine.cuh"
#include "gather.cuh"
#include "trilinear.cuh"

namespace la2::sm90 {

// Which instances have the kernel: of what was measured (../DESIGN.md) gradients lose, and so do slices of 128.
template <class Cfg>
constexpr bool kHasOnePass = !Cfg::kSplit && Cfg::kSlice == 64 && Cfg::kTileA <= 128;

// Of a Config: the same for one item a block, and its state pass.
template <class Cfg>
struct Alone : Cfg {
  static constexpr bool kAlone = true, kInCluster = false;
};
template <class Cfg>
using GatherOf = GatherConfig<typename Cfg::T, Cfg::kTileA, Cfg::kSlice, Cfg::kSplit, true>;

// The passes have the shared memory one after the other.
template <class Cfg>
union OnePassStorage {
  GatherStorage<GatherOf<Cfg>> gather;
  SharedStorage<Cfg> main;
};

// Starts to fetch into L2 what the main pass will want and the state pass does not: a. One warp.
template <class Cfg>
__device__ __forceinline__ void prefetch_rows(const TrilinearParams& p, const TrilinearJob& job, const JobMaps& maps) {
  const Schedule<Cfg::kAlone, Cfg::kInCluster, Cfg::kHasTable> schedule(job);
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

// Grid: x = blocks of items, an item each, all resident. combines: some sequence has more than two segments.
template <class Base>
__global__ void __launch_bounds__(Base::kThreads, 1)
    la2_one_pass_sm90_kernel(const __grid_constant__ TrilinearParams p, const __grid_constant__ TrilinearMaps maps,
                             bool combines) {
  using Cfg = Alone<Base>;
  using Gather = GatherOf<Cfg>;
  extern __shared__ __align__(1024) char raw[];
  OnePassStorage<Cfg>& smem = *reinterpret_cast<OnePassStorage<Cfg>*>(raw);
  const TrilinearJob& job = p.jobs[0];
  const int role = threadIdx.x / 128;
  const auto grid = cooperative_groups::this_grid();

  if (threadIdx.x == 0) init_barriers(smem.gather, 1);
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
  __syncthreads();
  if (threadIdx.x == 0) {
    invalidate_barriers(smem.gather);
    init_barriers(smem.main, p, 1);
  }
  grid.sync();
  if (combines) {
    combine_segments<Cfg::kThreads>(p, job);
    grid.sync();
  }
  run_roles(smem.main, p, job, maps.jobs, false);
}

}  // namespace la2::sm90
