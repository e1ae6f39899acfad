// The state pass for Hopper, bf16 and fp16: what each segment gathers alone. The notebook is ../DESIGN.md.
#pragma once

#include "activate.cuh"
#include "state.cuh"

namespace la2::sm90 {

// ---- config

// kTileA, kSlice, kSplit, kSilu, kAlone: as of the trilinear kernel (config.cuh). Each gatherer, a warpgroup, has 64
// columns of the slice; in one pass with the other kernels, where it has few registers, for 64 columns of b at a time.
template <class T_, int kTileA_, int kSlice_, bool kSplit_, bool kSilu_ = false, bool kAlone_ = false>
struct GatherConfig {
  using T = T_;
  static constexpr int kTileA = kTileA_, kSlice = kSlice_;
  static constexpr bool kSplit = kSplit_, kSilu = kSilu_, kAlone = kAlone_;
  static constexpr bool kWeighsInPairs = kWeighsByPairs<T, kTileA, kSplit>;
  using TileA = tile::SwizzledTile<T, kChunk, kTileA>;
  using TileC = tile::SwizzledTile<T, kChunk, kSlice>;
  static constexpr bool kHasTable = !kSplit;                            // Schedule (work.cuh)
  static constexpr int kColsOfB = kAlone && kTileA > 64 ? 64 : kTileA;  // of a gatherer
  static constexpr int kGatherersOfC = kSlice / 64;
  static constexpr int kGatherers = kGatherersOfC * (kTileA / kColsOfB);
  // SiLU is computed by a warpgroup and by the warps that share the producer's.
  static constexpr int kActivatorGroups = kSilu ? 1 : 0, kActivators = kSilu ? 3 + 4 : 0;  // warps
  static constexpr int kGroups = 1 + kActivatorGroups + kGatherers, kThreads = 128 * kGroups;
  // Two chunks are summed at once, where registers have room for what both weigh.
  static constexpr bool kByTwos = kTileA <= 128;
  static constexpr bool kMovesRegisters = kSilu || (kSplit && kByTwos && kGatherers == 2);
  static constexpr int kLaunchRegisters = kGroups == 3 ? 168 : 128, kProducerRegisters = kSilu ? 64 : 40;
  static constexpr int kGathererRegisters = kSilu && kGatherers == 2 ? 192 : 232;
  static_assert(!kMovesRegisters || ((kGatherers == 1 || kGatherers == 2) &&
                                     (1 + kActivatorGroups) * kProducerRegisters + kGatherers * kGathererRegisters <=
                                         kGroups * kLaunchRegisters));
  static constexpr int kStagesThatFit = 208 * 1024 / (TileA::kBytes + TileC::kBytes);
  static constexpr int kStages = kStagesThatFit < 6 ? kStagesThatFit : 6;
};

template <class Cfg>
struct GatherStage {
  static constexpr bool kHasA = false;
  typename Cfg::TileA b;  // [C, Da]
  typename Cfg::TileC c;  // [C, slice]
};

// Arrivals: the copy engine's bytes and the producer (full, tail; landed as of the trilinear kernel), every gatherer
// warp (empty).
template <class Cfg>
struct GatherStorage {
  GatherStage<Cfg> stages[Cfg::kStages];
  tile::Decay<kChunk> powers[Cfg::kGatherers];  // they may be an item apart
  PairWeights pair_weights[Cfg::kWeighsInPairs * Cfg::kGatherers];
  PairWeights earlier_pair_weights[Cfg::kWeighsInPairs * Cfg::kByTwos * Cfg::kGatherers];  // with a chunk behind it
  uint64_t full[Cfg::kStages], empty[Cfg::kStages], tail[Cfg::kStages], landed[Cfg::kStages * Cfg::kSilu];
};

// ---- roles

// The schedule's items once for each piece of a segment, the pieces that every segment has first.
template <bool kAlone, bool kHasTable>
struct PieceSchedule : Schedule<kAlone, kHasTable> {
  using Items = Schedule<kAlone, kHasTable>;
  using Items::Items;
  __device__ int count(const TrilinearParams& params) const { return Items::count(params) * params.num_pieces; }
  __device__ int after(int index, const TrilinearParams& params) const {
    return kAlone ? count(params) : Items::after(index, params);
  }
  __device__ int piece(const TrilinearParams& params, int index) const {
    return params.num_pieces == 1 ? 0 : index / Items::count(params);
  }
  __device__ Item item(const TrilinearParams& params, const TrilinearJob& job, int index, int slice_cols) const {
    return Items::item(params, job, index - piece(params, index) * Items::count(params), slice_cols);
  }
};

static_assert(kChunk == simt::kWindowChunk);

struct Steps {
  int begin, end;
};
// The steps of a piece. The last segment of a sequence is left out, nobody needs its state; of the others, what decay
// leaves nothing of. Nothing is where the states are the result.
__device__ inline Steps steps_of(const TrilinearParams& p, const Item& item, int piece) {
  if (p.states_alone) return {0, item.num_chunks};
  if (item.is_last) return {0, 0};
  const float slope = simt::slope_of<float>(p, item.sequence, item.head);
  const int begin = item.num_chunks - simt::window_chunks(slope, item.num_chunks);
  const int end = item.num_chunks - piece * p.piece_chunks;
  return {piece + 1 == p.num_pieces ? begin : max(begin, end - p.piece_chunks), end};
}

// Starts to fetch a chunk's b and c into L2.
template <class Cfg>
__device__ __forceinline__ void prefetch_tiles(const JobMaps& maps, ptx::TmaBox box, int first_col) {
  for (box.col = 0; box.col < Cfg::kTileA; box.col += 64) ptx::tma_prefetch(&maps.b, box);
  box.col = first_col;
  ptx::tma_prefetch(&maps.c, box);
}

template <class Cfg>
__device__ __forceinline__ void produce(GatherStorage<Cfg>& smem, const TrilinearParams& p, const TrilinearJob& job,
                                        const JobMaps& maps) {
  const PieceSchedule<Cfg::kAlone, Cfg::kHasTable> schedule(job);
  const int lane = threadIdx.x % 32;
  Ring<Cfg::kStages> ring;
  uint32_t tail_parities = 0;
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item item = schedule.item(p, job, index, Cfg::kSlice);
    if (!item.is_valid) break;
    if constexpr (Cfg::kAlone)  // the main pass wants them in any case; what this one wants, the slope has yet to tell
      if (lane < min(Cfg::kStages, item.num_chunks))
        prefetch_tiles<Cfg>(maps, item.box(item.chunk_at(lane)), item.first_col);
    const Steps steps = steps_of(p, item, schedule.piece(p, index));
    for (int step = steps.begin; step < steps.end; ++step, ring.advance()) {
      const int chunk = item.chunk_at(step), rows = item.rows_of(chunk);
      GatherStage<Cfg>& stage = smem.stages[ring.stage];
      const bool clears = p.cu_seqlens.data != nullptr && rows < kChunk;
      const uint32_t full = shared_address(Cfg::kSilu ? &smem.landed[ring.stage] : &smem.full[ring.stage]);
      const uint32_t barrier = clears ? shared_address(&smem.tail[ring.stage]) : full;
      ptx::mbarrier_wait(shared_address(&smem.empty[ring.stage]), ring.parity ^ 1);
      if (lane == 0) {
        const ptx::TmaBox box = item.box(chunk);
        ptx::mbarrier_arrive_expect(barrier, sizeof(GatherStage<Cfg>));
        load_tile<typename Cfg::TileA>(shared_address(&stage.b), &maps.b, barrier, box, 0);
        load_tile<typename Cfg::TileC>(shared_address(&stage.c), &maps.c, barrier, box, item.first_col);
      }
      if (clears) clear_tail(stage.b, stage.c, rows, barrier, full, ring.stage, tail_parities, lane);
    }
  }
}

// One of the warps that take SiLU, `thread` of all of theirs.
template <class Cfg>
__device__ __forceinline__ void activate(GatherStorage<Cfg>& smem, const TrilinearParams& p, const TrilinearJob& job,
                                         int thread) {
  const PieceSchedule<Cfg::kAlone, Cfg::kHasTable> schedule(job);
  const int silu = job.silu;
  Ring<Cfg::kStages> ring;
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item item = schedule.item(p, job, index, Cfg::kSlice);
    if (!item.is_valid) break;
    const Steps steps = steps_of(p, item, schedule.piece(p, index));
    for (int step = steps.begin; step < steps.end; ++step, ring.advance()) {
      const int stage = ring.stage;
      activate_stage<typename Cfg::T, Cfg::kActivators>(smem.stages[stage], silu, smem.landed[stage], smem.full[stage],
                                                        ring.parity, thread);
    }
  }
}

// A gatherer's part of the state, from zero (the first segment of a sequence: from its initial state), to job.local.
template <class Cfg>
__device__ __forceinline__ void gather(GatherStorage<Cfg>& smem, const TrilinearParams& p, const TrilinearJob& job,
                                       int gatherer) {
  using T = typename Cfg::T;
  const PieceSchedule<Cfg::kAlone, Cfg::kHasTable> schedule(job);
  const WarpgroupLane me;
  const float update = static_cast<float>(job.update);
  constexpr bool kHasAllOfB = Cfg::kColsOfB == Cfg::kTileA;
  const int block = kHasAllOfB ? gatherer : gatherer % Cfg::kGatherersOfC;
  const int first_of_b = kHasAllOfB ? 0 : gatherer / Cfg::kGatherersOfC * Cfg::kColsOfB;
  tile::Decay<kChunk>& powers = smem.powers[gatherer];
  Ring<Cfg::kStages> ring;
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item item = schedule.item(p, job, index, Cfg::kSlice);
    if (!item.is_valid) break;
    const Steps steps = steps_of(p, item, schedule.piece(p, index));
    if (steps.begin >= steps.end && !p.states_alone) continue;
    ptx::named_barrier_sync(1 + gatherer, 128);
    powers.fill(simt::slope_of<float>(p, item.sequence, item.head), ptx::opaque(threadIdx.x % 128), 128);
    ptx::named_barrier_sync(1 + gatherer, 128);
    // Opaque: computed where it is used, else it would have no register.
    auto cols = [&] { return ptx::opaque(job.dim_c) - item.first_col; };
    Accumulators<Cfg::kColsOfB / 2> z;
    clear(z);
    const bool is_copied = Cfg::kHasTable && item.is_first && !p.states_alone && has_copy_of_initial(p, item);
    if (item.is_first && (steps.begin == 0 || is_copied))
      load_state<!Cfg::kSplit>(z, job.initial, item, block * 64, job.dim_a, cols(), me, first_of_b);
    if (is_copied && block * 64 < cols()) {
      store_fragment(z, fragment_of<Cfg::kTileA>(job, item, unit_of_copy(item), block, me) + first_of_b / 8 * 128);
      if (steps.begin > 0) clear(z);
    }
    constexpr bool kSplit = Cfg::kSplit;
    constexpr int kAtOnce = kSplit ? (Cfg::kMovesRegisters ? 64 : 32) : Cfg::kTileA * Cfg::kGatherers <= 128 ? 64 : 32;
    using Operand = uint32_t[kChunk / 16][4];
    // A chunk's c as it is summed, once its copy is there.
    auto weigh = [&](Operand& weighted, Operand& rest, const PairWeights* pair_weights, float factor, int rows) {
      ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
      const GatherStage<Cfg>& stage = smem.stages[ptx::uniform(ring.stage)];
      if constexpr (Cfg::kWeighsInPairs)
        weigh_columns<T, kSplit>(weighted, rest, stage.c, block, pair_weights[gatherer], me);
      else
        weigh_columns<T, kSplit>(weighted, rest, stage.c, block, token_weights(powers, job.reverse, rows, me), factor,
                                 me);
    };
    // Not where float16 would have no numbers for what the earlier chunk weighs; such windows are short.
    const bool has_numbers = !std::is_same<T, __half>::value || powers.ascending()[kChunk] >= 0x1p-8f;
    const bool by_twos = Cfg::kByTwos && has_numbers && (Cfg::kAlone || !p.states_alone);
    const int alone = by_twos ? steps.begin + (steps.end - steps.begin) % 2 : steps.end;  // up to here, one at a time
    int filled = -1, step = steps.begin;
    for (; step < alone; ++step, ring.advance()) {
      const int rows = item.rows_of(item.chunk_at(step));
      if constexpr (Cfg::kWeighsInPairs)
        smem.pair_weights[gatherer].fill(powers, update, job.reverse, rows, filled, 1 + gatherer);
      Operand weighted, rest;
      weigh(weighted, rest, smem.pair_weights, update, rows);
      update_rows<T, kSplit, kAtOnce>(z, weighted, rest, smem.stages[ptx::uniform(ring.stage)].b,
                                      powers.ascending()[rows], first_of_b);
      release_stage(smem.empty[ring.stage], me.lane);
    }
    if constexpr (Cfg::kByTwos) {
      // The weights are those of whole chunks. The only short ones are the last of a forward sweep, in the segment that
      // is not gathered, and the first of a reverse one, whose tokens are counted from its begin.
      if constexpr (Cfg::kWeighsInPairs) {
        int earlier_filled = -1;
        smem.pair_weights[gatherer].fill(powers, update, job.reverse, kChunk, filled, 1 + gatherer);
        smem.earlier_pair_weights[gatherer].fill(powers, update * powers.ascending()[kChunk], job.reverse, kChunk,
                                                 earlier_filled, 1 + gatherer);
      }
      constexpr int kPart = Cfg::kColsOfB / 2 < kAtOnce ? Cfg::kColsOfB / 2 : kAtOnce;
      static_assert(Cfg::kColsOfB / 2 % kPart == 0);
      for (; step < steps.end; step += 2) {
        Operand earlier, earlier_rest, later, later_rest;
        Accumulators<kPart> sum;
        weigh(earlier, earlier_rest, smem.earlier_pair_weights, update * powers.ascending()[kChunk], kChunk);
        const int earlier_stage = ptx::uniform(ring.stage);
        issue_update<T, kSplit>(sum, earlier, earlier_rest, smem.stages[earlier_stage].b, first_of_b);
        if constexpr (Cfg::kAlone) {  // which has no registers for both
          ptx::wgmma_wait<0>();
          ptx::pin_registers(sum);
        }
        ring.advance();
        weigh(later, later_rest, smem.pair_weights, update, kChunk);
        const int later_stage = ptx::uniform(ring.stage);
        const int rows = kSplit ? item.rows_of(item.chunk_at(step)) : kChunk;
        const float lambda_rows = powers.ascending()[rows] * powers.ascending()[kChunk];
#pragma unroll
        for (int part = 0; part < Cfg::kColsOfB / 2 / kPart; ++part) {
          const int col = first_of_b + part * 2 * kPart;
          if (part > 0) issue_update<T, kSplit>(sum, earlier, earlier_rest, smem.stages[earlier_stage].b, col);
          issue_update<T, kSplit>(sum, later, later_rest, smem.stages[later_stage].b, col, true);
          ptx::wgmma_wait<0>();
          ptx::pin_registers(sum);
          add_update(z, lambda_rows, sum, part * kPart);
        }
        release_stage(smem.empty[earlier_stage], me.lane);
        release_stage(smem.empty[later_stage], me.lane);
        ring.advance();
      }
    }
    if (!Cfg::kAlone && p.states_alone) {
      store_state<!Cfg::kSplit>(z, job.final, item, block * 64, job.dim_a, cols(), me);
    } else if (block * 64 < cols()) {
      const int piece = schedule.piece(p, ptx::opaque(index));  // as cols
      // Behind it are whole chunks.
      if (piece > 0)
        scale(z,
              rounded_decay_power(simt::slope_of<float>(p, item.sequence, item.head), piece * p.piece_chunks * kChunk));
      const int place = item.unit + piece * static_cast<int>(p.num_units);
      store_fragment(z, fragment_of<Cfg::kTileA>(job, item, place, block, me) + first_of_b / 8 * 128);
    }
  }
}

// ---- kernel

// One thread.
template <class Cfg>
__device__ __forceinline__ void init_barriers(GatherStorage<Cfg>& smem) {
  for (int i = 0; i < Cfg::kStages; ++i) {
    ptx::mbarrier_init(shared_address(&smem.full[i]), Cfg::kSilu ? 32 * Cfg::kActivators : 1);
    ptx::mbarrier_init(shared_address(&smem.tail[i]), 1);
    if constexpr (Cfg::kSilu) ptx::mbarrier_init(shared_address(&smem.landed[i]), 1);
    ptx::mbarrier_init(shared_address(&smem.empty[i]), 4 * Cfg::kGatherers);
  }
  ptx::mbarrier_init_fence();
}

template <class Cfg>
__device__ __forceinline__ void invalidate_barriers(GatherStorage<Cfg>& smem) {
  for (int i = 0; i < Cfg::kStages; ++i) {
    ptx::mbarrier_invalidate(shared_address(&smem.full[i]));
    ptx::mbarrier_invalidate(shared_address(&smem.tail[i]));
    ptx::mbarrier_invalidate(shared_address(&smem.empty[i]));
  }
}

// Grid: x = blocks of items, y = jobs.
template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    la2_gather_sm90_kernel(const __grid_constant__ TrilinearParams p, const __grid_constant__ TrilinearMaps maps) {
  extern __shared__ __align__(1024) char raw[];
  GatherStorage<Cfg>& smem = *reinterpret_cast<GatherStorage<Cfg>*>(raw);
  const TrilinearJob& job = p.jobs[blockIdx.y];
  ptx::launch_dependents();
  if (Cfg::kHasTable && p.units != nullptr) {
    // Nothing is cut from here on, or there are no more units.
    const UnitEntry& first = PieceSchedule<Cfg::kAlone, Cfg::kHasTable>(job).first_entry(p);
    if (!p.states_alone && first.num_segments == 1) {
      if (blockIdx.x == 0) ptx::wait_for_previous_kernel();  // as below
      return;
    }
  }
  if (threadIdx.x == 0) init_barriers(smem);
  __syncthreads();

  if (threadIdx.x >= 128 * (1 + Cfg::kActivatorGroups)) {
    if constexpr (Cfg::kMovesRegisters) ptx::registers_acquire<Cfg::kGathererRegisters>();
    gather<Cfg>(smem, p, job, threadIdx.x / 128 - 1 - Cfg::kActivatorGroups);
  } else {
    if constexpr (Cfg::kMovesRegisters) ptx::registers_release<Cfg::kProducerRegisters>();
    if (threadIdx.x < 32) {
      produce<Cfg>(smem, p, job, maps.jobs[blockIdx.y]);
    } else if constexpr (Cfg::kSilu) {
      activate<Cfg>(smem, p, job, static_cast<int>(threadIdx.x) - 32);
    }
  }
  // Whoever waits for this kernel has thereby waited for the one that it overlaps.
  ptx::wait_for_previous_kernel();
}

}  // namespace la2::sm90
