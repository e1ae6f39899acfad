// The state warpgroup of the trilinear kernel for Hopper. The notebook is ../DESIGN.md.
#pragma once

#include <type_traits>

#include "config.cuh"
#include "state.cuh"

namespace la2::sm90 {

// ---- steps

template <class Cfg>
__device__ __forceinline__ bool is_followed(const TrilinearParams& p) {
  return Cfg::kIsFollowed && p.cu_seqlens.data != nullptr;
}

template <class Cfg>
using StateAccumulators = float[Cfg::kSlice / 64][Cfg::kTileA / 2];

// Z = lambda^rows Z + b^T diag(update lambda^n) c, as Z^T += (weighted c)^T b, in blocks of 64 columns of c.
// is_result: without the error of rounding the weighted c.
template <class Cfg>
__device__ __forceinline__ void update_state(StateAccumulators<Cfg>& z, const Stage<Cfg>& stage,
                                             const SharedStorage<Cfg>& smem, float factor, bool reverse, int rows,
                                             bool is_result, const WarpgroupLane& me) {
  using T = typename Cfg::T;
  const tile::Decay<kChunk>& powers = smem.powers;
  constexpr int kBlocks = Cfg::kSlice / 64, kAtOnce = !Cfg::kTakesTurns && kBlocks * Cfg::kTileA <= 128 ? 64 : 32;
  const float* weights = token_weights(powers, reverse, rows, me);
  const float lambda_rows = powers.ascending()[rows];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    uint32_t weighted[kChunk / 16][4], rest[kChunk / 16][4];
    auto update = [&](auto splits) {
      constexpr bool kSplits = decltype(splits)::value;
      if constexpr (Cfg::kWeighsInPairs)
        weigh_columns<T, kSplits>(weighted, rest, stage.c, block, smem.pair_weights[0], me);
      else
        weigh_columns<T, kSplits>(weighted, rest, stage.c, block, weights, factor, me);
      update_rows<T, kSplits, kAtOnce>(z[block], weighted, rest, stage.b, lambda_rows);
    };
    if (Cfg::kSplit || !is_result)
      update(std::integral_constant<bool, Cfg::kSplitsValues>());
    else
      update(std::true_type());
  }
}

// fp16: the factor that brings every |Z| of the block into range, and its inverse in `undo`; else 1.
template <class Cfg>
__device__ __forceinline__ float operand_range(const StateAccumulators<Cfg>& z, SharedStorage<Cfg>& smem, float* undo,
                                               const WarpgroupLane& me) {
  if constexpr (!Cfg::kNeedsRange) return 1.f;
  float largest = 0.f;
#pragma unroll
  for (int block = 0; block < Cfg::kSlice / 64; ++block) largest = largest_of_warp(z[block], largest);
  ptx::named_barrier_sync(kStateWarps, 128);  // everyone is done with the last ones
  if (me.lane == 0) smem.largest[me.warp] = largest;
  ptx::named_barrier_sync(kStateWarps, 128);
  largest = fmaxf(fmaxf(smem.largest[0], smem.largest[1]), fmaxf(smem.largest[2], smem.largest[3]));
  const int exponent = range_exponent(largest);
  if (me.warp == 0 && me.lane == 0) *undo = power_of_two(exponent);
  return power_of_two(-exponent);
}

// What enters an item as it lies in memory, the sum of how many states, and when it is there: here, as the kernels
// before this one have combined it. (one_pass.cuh has the other case.)
struct CombinedStates {
  __device__ __forceinline__ int count(const TrilinearParams&, const Item&) const { return 1; }
  __device__ __forceinline__ void wait(const Item&) const {}
};

// The same, or the sum of what the segments before it left alone (TrilinearParams::sums_states). Forward sweeps.
struct StatesOfSegments : CombinedStates {
  __device__ __forceinline__ int count(const TrilinearParams& p, const Item& item) const {
    return p.sums_states && !item.is_first ? item.segment : 1;
  }
};

// Takes up an item: the powers of its decay, and Z as the segments before it or the caller left it; zero where neither
// did. reads_previous: the kernel before this one wrote the former. Outputs alone wait for it so late, those of what is
// not cut never; gradients have waited already.
template <class Cfg, class States>
__device__ __forceinline__ void take_up(StateAccumulators<Cfg>& z, SharedStorage<Cfg>& smem, const TrilinearParams& p,
                                        const TrilinearJob& job, const Item& item, const States& states, bool reverse,
                                        bool reads_previous, const WarpgroupLane& me) {
  ptx::named_barrier_sync(kStateWarps, 128);
  smem.powers.fill(simt::slope_of<float>(p, item.sequence, item.head), ptx::opaque(threadIdx.x % 128), 128);
  ptx::named_barrier_sync(kStateWarps, 128);
  const int count = states.count(p, item);
  float decay = 1;
  if (count > 1)
    decay = rounded_decay_power(simt::slope_of<float>(p, item.sequence, item.head), static_cast<int>(p.segment_len));
  states.wait(item);
  if (Cfg::kHasTable && reads_previous && item.num_segments > 1) ptx::wait_for_previous_kernel();
#pragma unroll
  for (int block = 0; block < Cfg::kSlice / 64; ++block) {
    clear(z[block]);
    if (item.is_first && !(Cfg::kHasTable && has_copy_of_initial(p, item))) {
      load_state<!Cfg::kSplit>(z[block], job.initial, item, block * 64, job.dim_a, job.dim_c - item.first_col, me);
    } else if (block * 64 < job.dim_c - item.first_col) {
      const int unit = Cfg::kHasTable && item.is_first ? unit_of_copy(item) : item.unit + (reverse ? count : -count);
      const auto* const from = fragment_of<Cfg::kTileA>(job, item, unit, block, me);
      const int64_t step = (reverse ? -job.local.stride_s : job.local.stride_s) / 4;
      if constexpr (Cfg::kAlone || !Cfg::kTakesTurns)
        load_sum(z[block], from, step, count, decay);
      else if (count == 1)
        load_fragment(z[block], from);
      else
        load_sum_in_halves(z[block], from, step, count, decay);
    }
  }
}
// Z as it leaves the sequence.
template <class Cfg>
__device__ __forceinline__ void store_leaving(StateAccumulators<Cfg>& z, const TrilinearJob& job, const Item& item,
                                              const WarpgroupLane& me) {
#pragma unroll
  for (int block = 0; block < Cfg::kSlice / 64; ++block)
    store_state<!Cfg::kSplit>(z[block], job.final, item, block * 64, job.dim_a, job.dim_c - item.first_col, me);
}

// Z rounded to shared memory, where the outputs find it.
template <class Cfg>
__device__ __forceinline__ void hand_over(const StateAccumulators<Cfg>& z, SharedStorage<Cfg>& smem,
                                          Ring<Cfg::kStateBuffers>& ring, const WarpgroupLane& me) {
  const int state = ptx::uniform(ring.stage);
  ptx::mbarrier_wait(shared_address(&smem.state_empty[state]), ring.parity ^ 1);
  const float range = operand_range<Cfg>(z, smem, &smem.range_undo[state], me);
#pragma unroll
  for (int block = 0; block < Cfg::kSlice / 64; ++block)
    store_rounded<typename Cfg::TileZ, typename Cfg::T>(smem.state[state], block * 64 + me.warp * 16, z[block], range,
                                                        me.lane);
  ptx::fence_proxy_async();
  __syncwarp();
  if (me.lane == 0) ptx::mbarrier_arrive(shared_address(&smem.state_full[state]));
  ring.advance();
}

// In the last chunk of a sequence, whose state no output reads, rounding the weighted c would be most of the state's
// error where slopes are steep. Not in extend, where a request that is cut must have the bits of a whole one.
__device__ __forceinline__ bool is_exact_at_last(const TrilinearParams& p) { return p.units == nullptr; }

// ---- roles

// Z = lambda^C Z + b^T diag(w) c, chunk by chunk, and before each chunk its rounded copy for the outputs.
template <class Cfg>
__device__ __forceinline__ void carry_state(SharedStorage<Cfg>& smem, const TrilinearParams& p, const TrilinearJob& job,
                                            bool reads_previous) {
  const Schedule<Cfg::kAlone, Cfg::kHasTable> schedule(job);
  const WarpgroupLane me;
  const bool reverse = job.reverse;
  const float update = static_cast<float>(job.update);
  Ring<Cfg::kStages> ring;
  Ring<Cfg::kStateBuffers> state_ring;
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item item = schedule.item(p, job, index, Cfg::kSlice);
    if (!item.is_valid) break;
    StateAccumulators<Cfg> z;
    take_up<Cfg>(z, smem, p, job, item, CombinedStates(), reverse, reads_previous, me);

    const bool wants_state = job.final.data != nullptr && item.is_last;
    int filled = -1;
    for (int step = 0; step < item.num_chunks; ++step, ring.advance()) {
      if constexpr (Cfg::kWeighsInPairs)
        smem.pair_weights[0].fill(smem.powers, update, reverse, item.rows_of(item.chunk_at(step)), filled, kStateWarps);
      hand_over<Cfg>(z, smem, state_ring, me);
      const int stage = ptx::uniform(ring.stage);
      ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
      if (step + 1 < item.num_chunks || wants_state)
        update_state<Cfg>(z, smem.stages[stage], smem, update, reverse, item.rows_of(item.chunk_at(step)),
                          step + 1 == item.num_chunks && is_exact_at_last(p), me);
      if (is_followed<Cfg>(p))
        ptx::mbarrier_arrive(shared_address(&smem.empty[ring.stage]));
      else
        release_stage(smem.empty[ring.stage], me.lane);
    }
    if (wants_state) store_leaving<Cfg>(z, job, item, me);
  }
}

// The same with a chunk's update of the state in flight while Z as it enters the chunk is handed over. A product is
// issued and waited for in one pass of the loop: across its end ptxas gives the registers of weighted to others while
// the tensor core still reads them (../DESIGN.md).
template <class Cfg, class States>
__device__ __forceinline__ void carry_state_ahead(SharedStorage<Cfg>& smem, const TrilinearParams& p,
                                                  const TrilinearJob& job, bool reads_previous, const States& states) {
  using T = typename Cfg::T;
  static_assert(Cfg::kSlice == 64 && !Cfg::kSplit);
  const Schedule<Cfg::kAlone, Cfg::kHasTable> schedule(job);
  const WarpgroupLane me;
  const bool reverse = job.reverse;
  const float update = static_cast<float>(job.update);
  Ring<Cfg::kStages> ring;
  Ring<Cfg::kStateBuffers> state_ring;
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item item = schedule.item(p, job, index, Cfg::kSlice);
    if (!item.is_valid) break;
    StateAccumulators<Cfg> z;
    take_up<Cfg>(z, smem, p, job, item, states, reverse, reads_previous, me);
    const bool wants_state = job.final.data != nullptr && item.is_last;
    if (item.num_chunks > 0) {
      HeldWeights<T> weights;
      uint32_t c[kChunk / 16][4];
      Accumulators<Cfg::kTileA / 2> sum;
      int rows = item.rows_of(item.chunk_at(0));
      ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
      load_columns(c, smem.stages[ring.stage].c, me);
      for (int step = 1; step < item.num_chunks; ++step) {
        const int stage = ptx::uniform(ring.stage);
        uint32_t weighted[kChunk / 16][4];
        weights.load(smem.powers, reverse, rows, update, me);
        weigh_columns<T>(weighted, c, weights);
        issue_update<T, false>(sum, weighted, weighted, smem.stages[stage].b);
        hand_over<Cfg>(z, smem, state_ring, me);

        ring.advance();
        const float lambda_rows = smem.powers.ascending()[rows];
        rows = item.rows_of(item.chunk_at(step));
        ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
        load_columns(c, smem.stages[ring.stage].c, me);
        ptx::wgmma_wait<0>();
        ptx::pin_registers(sum);
        release_stage(smem.empty[stage], me.lane);
        add_update(z[0], lambda_rows, sum);
      }
      const int stage = ptx::uniform(ring.stage);
      uint32_t weighted[kChunk / 16][4];
      weights.load(smem.powers, reverse, rows, update, me);
      weigh_columns<T>(weighted, c, weights);
      issue_update<T, false>(sum, weighted, weighted, smem.stages[stage].b);
      hand_over<Cfg>(z, smem, state_ring, me);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(sum);
      if (wants_state) {
        if (is_exact_at_last(p)) {
          update_state<Cfg>(z, smem.stages[stage], smem, update, reverse, rows, true, me);
        } else {
          add_update(z[0], smem.powers.ascending()[rows], sum);
        }
      }
      release_stage(smem.empty[stage], me.lane);
      ring.advance();
    }
    if (wants_state) store_leaving<Cfg>(z, job, item, me);
  }
}

}  // namespace la2::sm90
