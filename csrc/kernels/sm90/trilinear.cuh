// bf16 and fp16 trilinear kernel for Hopper: copy engine, wgmma, warp roles, fp32 state in registers.
// The notebook is ../DESIGN.md.
#pragma once

#include <type_traits>

#include "state.cuh"
#include "steps.cuh"

namespace la2::sm90 {

// ---- config

// kTileA: Da rounded up, the missing columns read as zero. kSlice: the columns of Dc of a block.
// kSplit: the two operands that are rounded from float32, the state and the weighted c, go in as a sum of two 16-bit
// numbers. The gradients need it for an error below that of their own rounding (../DESIGN.md); out does not. dq does
// without the second half of c, for which a slice of 128 has no registers to spare (kSplitsValues). dk and dv together
// split the masked scores as well.
// kBoth: a second job runs along, T(a', c, b) beside T(a, b, c), whose state is the transposed of the first one's: dv
// beside dk. One slice is all of Dc then.
template <class T_, int kTileA_, int kSlice_, bool kSplit_, bool kBoth_ = false>
struct Config {
  using T = T_;
  static constexpr int kTileA = kTileA_, kSlice = kSlice_;
  static constexpr bool kSplit = kSplit_, kBoth = kBoth_;
  static constexpr bool kAlone = false, kInCluster = !kBoth;  // one item to a block; shared copies (work.cuh)
  static constexpr bool kSplitsValues = kSplit && (kSlice == 64 || kBoth);
  static constexpr bool kNeedsRange = std::is_same<T, __half>::value;  // 65504 ends it, and a state may not

  using TileA = tile::SwizzledTile<T, kChunk, kTileA>;
  using TileC = tile::SwizzledTile<T, kChunk, kSlice>;
  using TileZ = tile::SwizzledTile<T, kSlice, kTileA>;  // the state transposed

  static constexpr int kParts = kSplit ? 2 : 1;  // of the state: what 16 bits hold, and the rest
  static constexpr int kThreads = 384;           // producer, output and state warpgroup
  static constexpr int kProducerRegisters = 48, kOutputRegisters = kBoth ? 232 : 224, kStateRegisters = 224;
  static_assert(kProducerRegisters + kOutputRegisters + kStateRegisters <= 3 * 168);  // or the last one waits for ever

  // Where only two stages of everything would fit, a is held in registers for its two products, and the two stages of
  // its own that it comes from are free again before the chunk is begun.
  static constexpr bool kHoldsA = kTileA == 256 && !kSplit;
  static constexpr int kStagesOfA = kHoldsA ? 2 : 0;

  // What fits into 227 KB: a second buffer of the state where there is one operand of each, then stages, at most 4.
  static constexpr int kStateBuffers = kSplit || kHoldsA ? 1 : 2;
  static constexpr int kStageBytes = (kHoldsA ? 1 : 2) * TileA::kBytes + (kBoth ? 2 : 1) * TileC::kBytes;
  static constexpr int kOutBytes = TileC::kBytes + (kBoth ? TileA::kBytes : 0);
  static constexpr int kFixedBytes = kStateBuffers * kParts * TileZ::kBytes + kOutBytes + kStagesOfA * TileA::kBytes;
  static constexpr int kStagesThatFit = (224 * 1024 - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kStagesThatFit < 4 ? kStagesThatFit : 4;
  static_assert(kStages >= 2);

  // racecheck does not follow a warp of which one lane arrives for all, and reports its reads of c against a tail that
  // is cleared later in the same stage: where that comes round soonest, all lanes of the state's warps arrive if
  // sequences are packed (../DESIGN.md).
  static constexpr bool kIsFollowed = kStages == 2 && !kBoth;
};

template <class Cfg>
struct Stage {
  typename Cfg::TileA b, a[!Cfg::kHoldsA];   // [C, Da]
  typename Cfg::TileC c;                     // [C, slice]
  typename Cfg::TileC second_a[Cfg::kBoth];  // [C, Dc]: a of the second job, whose b is c and whose c is b
};

// Arrivals: the copy engine's bytes and the producer (full, tail, full_a); every consumer warp of the cluster (empty),
// every output warp of it (empty_a); every warp of the state warpgroup (state_full), of the output warpgroup
// (state_empty).
template <class Cfg>
struct SharedStorage {
  Stage<Cfg> stages[Cfg::kStages];
  typename Cfg::TileA a[Cfg::kStagesOfA];
  typename Cfg::TileZ state[Cfg::kStateBuffers][Cfg::kParts];  // Z^T [slice, Da] as it enters a chunk
  typename Cfg::TileC out[1];                                  // [C, slice] on its way to memory
  typename Cfg::TileA second_out[Cfg::kBoth];                  // [C, Da]
  Weights weights;                                             // of the output warpgroup
  Item item;                                                   // its own, where it has no registers to keep it
  tile::Decay<kChunk> powers;                                  // of the state warpgroup, which may be an item ahead
  float range_undo[Cfg::kStateBuffers];                        // fp16: the state's operand was divided by this
  alignas(16) float largest[4];                                // read as one vector
  uint64_t full[Cfg::kStages], empty[Cfg::kStages], tail[Cfg::kStages];
  uint64_t full_a[Cfg::kStagesOfA], empty_a[Cfg::kStagesOfA];
  uint64_t state_full[Cfg::kStateBuffers], state_empty[Cfg::kStateBuffers];
};

enum NamedBarrier { kOutputWarps = 1, kStateWarps = 2 };

// ---- steps of the output warpgroup

// out [C, N] = a Z, issued; N are the rows of the stored Z^T (RowsOperand) or its columns (ColumnsOperand).
template <class T, template <class> class Operand, class TileZ, int kParts, class OperandA, int kRegs>
__device__ __forceinline__ void issue_inter(Accumulators<kRegs>& out, const OperandA& a, const TileZ (&state)[kParts]) {
  ptx::pin_registers(out);
  ptx::wgmma_fence();
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const Operand<TileZ> z(shared_address(&state[part]));
#pragma unroll
    for (int k = 0; k < OperandA::kSteps; ++k) multiply<T>(out, a, z, k, k + part != 0);
  }
  ptx::wgmma_commit();
}

// The rows of a: those that are held, or where the stage has them.
template <class Cfg>
__device__ __forceinline__ decltype(auto) rows_of_a(const HeldRows<typename Cfg::TileA>& held,
                                                    const Stage<Cfg>& stage) {
  if constexpr (Cfg::kHoldsA)
    return (held);
  else
    return rows_operand(stage.a[0]);
}

// A chunk's a into registers, and its stage back: once the scores are issued, as a warp waits there for what it loaded.
template <class Cfg>
__device__ __forceinline__ void take_a(HeldRows<typename Cfg::TileA>& held, const SharedStorage<Cfg>& smem,
                                       const Ring<Cfg::kStagesOfA>& ring, const WarpgroupLane& me) {
  ptx::mbarrier_wait(shared_address(&smem.full_a[ring.stage]), ring.parity);
  held.load(smem.a[ring.stage], me);
}
template <class Cfg>
__device__ __forceinline__ void give_back_a(SharedStorage<Cfg>& smem, Ring<Cfg::kStagesOfA>& ring, int cluster,
                                            const WarpgroupLane& me) {
  release_stage(smem.empty_a[ring.stage], cluster, me.lane);
  ring.advance();
}

// What the state's operand was divided by, read by the lane that will say that its warp is done with it.
template <class Cfg>
__device__ __forceinline__ float range_undo_of(const SharedStorage<Cfg>& smem, int state) {
  const uint32_t from = shared_address(&smem.range_undo[state]);
  return ptx::broadcast_shared(from);
}

// ---- steps of the state warpgroup

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
                                             const tile::Decay<kChunk>& powers, float factor, bool reverse, int rows,
                                             bool is_result, const WarpgroupLane& me) {
  using T = typename Cfg::T;
  constexpr int kBlocks = Cfg::kSlice / 64, kAtOnce = kBlocks * Cfg::kTileA <= 128 ? 64 : 32;
  const float* weights = token_weights(powers, reverse, rows, me);
  const float lambda_rows = powers.ascending()[rows];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    uint32_t weighted[kChunk / 16][4], rest[kChunk / 16][4];
    auto update = [&](auto splits) {
      constexpr bool kSplits = decltype(splits)::value;
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

// ---- roles

// Warp 0 of the producer warpgroup; lane 0 starts the copies.
template <class Cfg>
__device__ __forceinline__ void produce(SharedStorage<Cfg>& smem, const TrilinearParams& p, const TrilinearJob& job,
                                        const JobMaps* maps) {
  const Schedule<Cfg::kAlone, Cfg::kInCluster> schedule(job);
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
      const uint32_t full = shared_address(&smem.full[ring.stage]);
      const uint32_t barrier = clears ? shared_address(&smem.tail[ring.stage]) : full;
      ptx::mbarrier_wait(shared_address(&smem.empty[ring.stage]), ring.parity ^ 1);
      if (lane == 0) {
        const ptx::TmaBox box = item.box(chunk);
        ptx::mbarrier_arrive_expect(barrier, sizeof(Stage<Cfg>));
        load_tile_shared<typename Cfg::TileA>(shared_address(&stage.b), &maps->b, barrier, box, schedule.rank(),
                                              schedule.cluster);
        if constexpr (!Cfg::kHoldsA)
          load_tile_shared<typename Cfg::TileA>(shared_address(&stage.a[0]), &maps->a, barrier, box, schedule.rank(),
                                                schedule.cluster);
        load_tile<typename Cfg::TileC>(shared_address(&stage.c), &maps->c, barrier, box, item.first_col);
        if constexpr (Cfg::kBoth)
          load_tile<typename Cfg::TileC>(shared_address(&stage.second_a[0]), &maps[1].a, barrier, box, 0);
      }
      if (clears) clear_tail(stage.b, stage.c, rows, barrier, full, ring.stage, tail_parities, lane);
    }
  }
}

// Warp 1 of the producer warpgroup, where a has stages of its own.
template <class Cfg>
__device__ __forceinline__ void produce_a(SharedStorage<Cfg>& smem, const TrilinearParams& p, const TrilinearJob& job,
                                          const CUtensorMap& map) {
  const Schedule<Cfg::kAlone, Cfg::kInCluster> schedule(job);
  Ring<Cfg::kStagesOfA> ring;
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item item = schedule.item(p, job, index, Cfg::kSlice);
    if (!item.is_valid) break;
    for (int step = 0; step < item.num_chunks; ++step, ring.advance()) {
      const uint32_t full = shared_address(&smem.full_a[ring.stage]);
      ptx::mbarrier_wait(shared_address(&smem.empty_a[ring.stage]), ring.parity ^ 1);
      if (threadIdx.x % 32 != 0) continue;
      ptx::mbarrier_arrive_expect(full, Cfg::TileA::kBytes);
      load_tile_shared<typename Cfg::TileA>(shared_address(&smem.a[ring.stage]), &map, full,
                                            item.box(item.chunk_at(step)), schedule.rank(), schedule.cluster);
    }
  }
}

// out = diag(inter lambda^n) a Z + (M . a b^T) c, chunk by chunk. The scores of the next chunk are issued before this
// chunk's result is stored.
template <class Cfg>
__device__ __forceinline__ void write_outputs(SharedStorage<Cfg>& smem, const TrilinearParams& p,
                                              const TrilinearJob& job, const JobMaps& maps) {
  using T = typename Cfg::T;
  const Schedule<Cfg::kAlone, Cfg::kInCluster> schedule(job);
  const WarpgroupLane me;
  const bool reverse = job.reverse;
  const bool is_packed = p.cu_seqlens.data != nullptr;
  const float inter = static_cast<float>(job.inter), intra = static_cast<float>(job.intra);
  Ring<Cfg::kStages> ring;
  Ring<Cfg::kStagesOfA> ring_of_a;
  Ring<Cfg::kStateBuffers> state_ring;
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item item = schedule.item(p, job, index, Cfg::kSlice);
    if (!item.is_valid) break;
    if (item.num_chunks == 0) continue;
    ptx::named_barrier_sync(kOutputWarps, 128);  // nobody reads the last item's powers any more
    smem.weights.fill(simt::slope_of<float>(p, item.sequence, item.head), inter, intra, reverse,
                      ptx::opaque(threadIdx.x % 128), 128);
    ptx::named_barrier_sync(kOutputWarps, 128);

    Accumulators<kChunk / 2> scores;
    HeldRows<typename Cfg::TileA> held;
    if constexpr (Cfg::kHoldsA) take_a(held, smem, ring_of_a, me);
    ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
    issue_scores<T>(scores, rows_of_a(held, smem.stages[ring.stage]), smem.stages[ring.stage].b);
    if constexpr (Cfg::kHoldsA) give_back_a(smem, ring_of_a, schedule.cluster, me);
    ptx::wgmma_wait<0>();
    ptx::pin_registers(scores);
    for (int step = 0; step < item.num_chunks; ++step) {
      const int chunk = item.chunk_at(step), rows = item.rows_of(chunk);
      const int stage = ptx::uniform(ring.stage), state = ptx::uniform(state_ring.stage);
      Accumulators<Cfg::kSlice / 2> out;
      ptx::mbarrier_wait(shared_address(&smem.state_full[state]), state_ring.parity);
      issue_inter<T, tile::RowsOperand>(out, rows_of_a(held, smem.stages[stage]), smem.state[state]);
      uint32_t masked[kChunk / 16][4];
      mask_scores<T, false>(masked, masked, scores, smem.weights, me);
      const int row = me.warp * 16 + me.group;
      float upper = row_weight(smem.weights, reverse, rows, row),
            lower = row_weight(smem.weights, reverse, rows, row + 8);
      if constexpr (Cfg::kNeedsRange) {
        const float undo = range_undo_of(smem, state);
        upper *= undo;
        lower *= undo;
      }
      ptx::wgmma_wait<0>();
      ptx::pin_registers(out);
      __syncwarp();
      if (me.lane == 0) ptx::mbarrier_arrive(shared_address(&smem.state_empty[state]));
      state_ring.advance();
      scale_rows(out, upper, lower);
      issue_intra<T, false>(out, masked, masked, smem.stages[stage].c);

      // Behind the last chunk the scores are computed once more, unused: products in flight across a branch would be
      // serialised.
      ring.advance();
      const bool has_next = step + 1 < item.num_chunks;
      if (has_next) {
        if constexpr (Cfg::kHoldsA) take_a(held, smem, ring_of_a, me);
        ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
      }
      const Stage<Cfg>& next = smem.stages[ptx::uniform(has_next ? ring.stage : stage)];
      issue_scores<T>(scores, rows_of_a(held, next), next.b);
      if constexpr (Cfg::kHoldsA)
        if (has_next) give_back_a(smem, ring_of_a, schedule.cluster, me);
      ptx::wgmma_wait<1>();
      ptx::pin_registers(out);
      if (has_next) release_stage(smem.empty[stage], schedule.cluster, me.lane);

      stage_out<T>(smem.out, out, me);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(scores);
      ptx::fence_proxy_async();
      store_staged<T>(smem.out, maps.out, job, item, chunk, is_packed, me);
      if (!has_next) release_stage(smem.empty[stage], schedule.cluster, me.lane);
    }
  }
  if (ptx::elect_one()) ptx::tma_store_wait();  // the lane that committed them
}

// The outputs of both jobs, in turns: while one is scaled, masked or stored, the tensor core has the other. The
// products of a chunk with Z and its scores are issued before the outputs of the chunk before have left.
template <class Cfg>
__device__ __forceinline__ void write_both_outputs(SharedStorage<Cfg>& smem, const TrilinearParams& p,
                                                   const JobMaps* maps) {
  using T = typename Cfg::T;
  const TrilinearJob &first = p.jobs[0], &second = p.jobs[1];
  const Schedule<Cfg::kAlone, Cfg::kInCluster> schedule(first);
  const WarpgroupLane me;
  constexpr bool reverse = true;  // the pair is dk and dv
  const bool is_packed = p.cu_seqlens.data != nullptr;
  const float inter = static_cast<float>(first.inter), intra = static_cast<float>(first.intra);
  Ring<Cfg::kStages> ring;
  Ring<Cfg::kStateBuffers> state_ring;
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item found = schedule.item(p, first, index, Cfg::kSlice);
    if (!found.is_valid) break;
    if (found.num_chunks == 0) continue;
    ptx::named_barrier_sync(kOutputWarps, 128);  // nobody reads the last item's powers any more
    if (threadIdx.x % 128 == 0) smem.item = found;
    smem.weights.fill(simt::slope_of<float>(p, found.sequence, found.head), inter, intra, reverse, threadIdx.x % 128,
                      128);
    ptx::named_barrier_sync(kOutputWarps, 128);
    const Item& item = smem.item;

    uint32_t masked[kChunk / 16][4], second_masked[kChunk / 16][4];
    uint32_t rest[kChunk / 16][4], second_rest[kChunk / 16][4];  // of the rounded scores
    Accumulators<Cfg::kSlice / 2> out;
    Accumulators<Cfg::kTileA / 2> second_out;
    // A chunk's scores and its products with Z are in flight while the results of the chunk before are stored, and
    // arrive here. is_real: they are not the unused ones behind the last chunk.
    auto receive = [&](Accumulators<kChunk / 2>& scores, Accumulators<kChunk / 2>& second_scores, int chunk, int state,
                       bool is_real) {
      ptx::wgmma_wait<3>();
      ptx::pin_registers(scores);
      mask_scores<T, true>(masked, rest, scores, smem.weights, me);
      ptx::wgmma_wait<1>();
      ptx::pin_registers(out);
      ptx::pin_registers(second_scores);
      mask_scores<T, true>(second_masked, second_rest, second_scores, smem.weights, me);
      // Opaque: read any earlier, these would have no registers.
      const int rows = item.rows_of(ptx::opaque(chunk)), row = ptx::opaque(me.warp * 16 + me.group);
      float upper = row_weight(smem.weights, reverse, rows, row),
            lower = row_weight(smem.weights, reverse, rows, row + 8);
      if constexpr (Cfg::kNeedsRange) {  // behind the last chunk the state's warps may be at it: anything else then
        const float undo = ptx::broadcast_shared(shared_address(is_real ? &smem.range_undo[state] : smem.weights.row));
        upper *= undo;
        lower *= undo;
      }
      scale_rows(out, upper, lower);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(second_out);
      __syncwarp();
      if (is_real && me.lane == 0) ptx::mbarrier_arrive(shared_address(&smem.state_empty[state]));
      scale_rows(second_out, upper, lower);
    };
    {
      Accumulators<kChunk / 2> scores, second_scores;
      ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
      const Stage<Cfg>& stage = smem.stages[ptx::uniform(ring.stage)];
      const int state = ptx::uniform(state_ring.stage);
      issue_scores<T>(scores, rows_operand(stage.a[0]), stage.b);
      ptx::mbarrier_wait(shared_address(&smem.state_full[state]), state_ring.parity);
      issue_inter<T, tile::RowsOperand>(out, rows_operand(stage.a[0]), smem.state[state]);
      issue_scores<T>(second_scores, rows_operand(stage.second_a[0]), stage.c);
      issue_inter<T, tile::ColumnsOperand>(second_out, rows_operand(stage.second_a[0]), smem.state[state]);
      receive(scores, second_scores, item.chunk_at(0), state, true);
    }
    for (int step = 0; step < item.num_chunks; ++step) {
      const int chunk = item.chunk_at(step);
      const int stage_idx = ptx::uniform(ring.stage), state = ptx::uniform(state_ring.stage);
      const Stage<Cfg>& stage = smem.stages[stage_idx];
      issue_intra<T, true>(out, masked, rest, stage.c);
      issue_intra<T, true>(second_out, second_masked, second_rest, stage.b);

      // Behind the last chunk its own products are made once more, unused: products that are issued on a branch would
      // be serialised.
      ring.advance();
      state_ring.advance();
      const bool has_next = step + 1 < item.num_chunks;
      ptx::wgmma_wait<1>();
      ptx::pin_registers(out);
      stage_out<T>(smem.out, out, me);
      if (has_next) ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
      const Stage<Cfg>& next = smem.stages[ptx::uniform(has_next ? ring.stage : stage_idx)];
      Accumulators<kChunk / 2> scores, second_scores;
      issue_scores<T>(scores, rows_operand(next.a[0]), next.b);
      ptx::wgmma_wait<1>();
      ptx::pin_registers(second_out);
      if (has_next) release_stage(smem.empty[stage_idx], schedule.cluster, me.lane);
      if (has_next) ptx::mbarrier_wait(shared_address(&smem.state_full[state_ring.stage]), state_ring.parity);
      const int next_state = ptx::uniform(has_next ? state_ring.stage : state);
      issue_inter<T, tile::RowsOperand>(out, rows_operand(next.a[0]), smem.state[next_state]);
      stage_out<T>(smem.second_out, second_out, me);
      issue_scores<T>(second_scores, rows_operand(next.second_a[0]), next.c);
      issue_inter<T, tile::ColumnsOperand>(second_out, rows_operand(next.second_a[0]), smem.state[next_state]);
      ptx::fence_proxy_async();
      store_staged<T>(smem.out, maps[0].out, first, item, chunk, is_packed, me);
      store_staged<T>(smem.second_out, maps[1].out, second, item, chunk, is_packed, me);
      receive(scores, second_scores, has_next ? item.chunk_at(step + 1) : chunk, next_state, has_next);
      if (!has_next) release_stage(smem.empty[stage_idx], schedule.cluster, me.lane);
    }
  }
  if (ptx::elect_one()) ptx::tma_store_wait();  // the lane that committed them
}

// Z = lambda^C Z + b^T diag(w) c, chunk by chunk, and before each chunk its rounded copy for the outputs.
template <class Cfg>
__device__ __forceinline__ void carry_state(SharedStorage<Cfg>& smem, const TrilinearParams& p, const TrilinearJob& job,
                                            bool reads_previous) {
  using T = typename Cfg::T;
  const Schedule<Cfg::kAlone, Cfg::kInCluster> schedule(job);
  const WarpgroupLane me;
  const bool reverse = job.reverse;
  const float update = static_cast<float>(job.update);
  Ring<Cfg::kStages> ring;
  Ring<Cfg::kStateBuffers> state_ring;
  if (reads_previous) ptx::wait_for_previous_kernel();
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item item = schedule.item(p, job, index, Cfg::kSlice);
    if (!item.is_valid) break;
    ptx::named_barrier_sync(kStateWarps, 128);
    smem.powers.fill(simt::slope_of<float>(p, item.sequence, item.head), ptx::opaque(threadIdx.x % 128), 128);
    ptx::named_barrier_sync(kStateWarps, 128);

    StateAccumulators<Cfg> z;
#pragma unroll
    for (int block = 0; block < Cfg::kSlice / 64; ++block) {
      clear(z[block]);
      if (item.is_first) {
        load_state<!Cfg::kSplit>(z[block], job.initial, item, block * 64, job.dim_a, job.dim_c - item.first_col, me);
      } else if (block * 64 < job.dim_c - item.first_col) {
        load_fragment(z[block], fragment_of<Cfg::kTileA>(job, item, item.unit + (reverse ? 1 : -1), block, me));
      }
    }

    const bool wants_state = job.final.data != nullptr && item.is_last;
    for (int step = 0; step < item.num_chunks; ++step, ring.advance()) {
      const int state = ptx::uniform(state_ring.stage), stage = ptx::uniform(ring.stage);
      ptx::mbarrier_wait(shared_address(&smem.state_empty[state]), state_ring.parity ^ 1);
      const float range = operand_range<Cfg>(z, smem, &smem.range_undo[state], me);
#pragma unroll
      for (int block = 0; block < Cfg::kSlice / 64; ++block)
        store_rounded<typename Cfg::TileZ, T>(smem.state[state], block * 64 + me.warp * 16, z[block], range, me.lane);
      ptx::fence_proxy_async();
      __syncwarp();
      if (me.lane == 0) ptx::mbarrier_arrive(shared_address(&smem.state_full[state]));
      state_ring.advance();

      ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
      if (step + 1 < item.num_chunks || wants_state)
        // In the last chunk of a sequence, whose state no output reads, rounding the weighted c would be most of the
        // state's error where slopes are steep. Not in extend, where a request that is cut must have the bits of a
        // whole one.
        update_state<Cfg>(z, smem.stages[stage], smem.powers, update, reverse, item.rows_of(item.chunk_at(step)),
                          wants_state && step + 1 == item.num_chunks && p.units == nullptr, me);
      if (is_followed<Cfg>(p))
        release_stage_by_all(smem.empty[ring.stage], schedule.cluster, me.lane);
      else
        release_stage(smem.empty[ring.stage], schedule.cluster, me.lane);
    }
    if (wants_state) {
#pragma unroll
      for (int block = 0; block < Cfg::kSlice / 64; ++block)
        store_state<!Cfg::kSplit>(z[block], job.final, item, block * 64, job.dim_a, job.dim_c - item.first_col, me);
    }
  }
}

// ---- kernel

// One thread.
template <class Cfg>
__device__ __forceinline__ void init_barriers(SharedStorage<Cfg>& smem, const TrilinearParams& p, int cluster) {
  constexpr int kWarpsOfRole = 4;
  constexpr int kConsumerWarps = 2 * kWarpsOfRole;
  const int more = is_followed<Cfg>(p) ? 31 * kWarpsOfRole : 0;
  for (int i = 0; i < Cfg::kStages; ++i) {
    ptx::mbarrier_init(shared_address(&smem.full[i]), 1);
    ptx::mbarrier_init(shared_address(&smem.tail[i]), 1);
    ptx::mbarrier_init(shared_address(&smem.empty[i]), kConsumerWarps * cluster + more);
  }
  for (int i = 0; i < Cfg::kStagesOfA; ++i) {
    ptx::mbarrier_init(shared_address(&smem.full_a[i]), 1);
    ptx::mbarrier_init(shared_address(&smem.empty_a[i]), kWarpsOfRole * cluster);
  }
  for (int i = 0; i < Cfg::kStateBuffers; ++i) {
    ptx::mbarrier_init(shared_address(&smem.state_full[i]), kWarpsOfRole);
    ptx::mbarrier_init(shared_address(&smem.state_empty[i]), kWarpsOfRole);
  }
  ptx::mbarrier_init_fence();
}

// All threads, once: each warpgroup takes its registers and its role.
template <class Cfg>
__device__ __forceinline__ void run_roles(SharedStorage<Cfg>& smem, const TrilinearParams& p, const TrilinearJob& job,
                                          const JobMaps* job_maps, bool reads_previous) {
  const int role = threadIdx.x / 128;
  if (role == 0) {
    ptx::registers_release<Cfg::kProducerRegisters>();
    if (threadIdx.x < 32) produce<Cfg>(smem, p, job, job_maps);
    if constexpr (Cfg::kHoldsA)
      if (threadIdx.x / 32 == 1) produce_a<Cfg>(smem, p, job, job_maps->a);
  } else if (role == 1) {
    ptx::registers_acquire<Cfg::kOutputRegisters>();
    if constexpr (Cfg::kBoth) {
      write_both_outputs<Cfg>(smem, p, job_maps);
    } else {
      write_outputs<Cfg>(smem, p, job, *job_maps);
    }
  } else {
    ptx::registers_acquire<Cfg::kStateRegisters>();
    carry_state<Cfg>(smem, p, job, reads_previous);
  }
}

// A block (or a cluster, whose blocks have neighbouring slices of Dc and share the copies of a and b) walks its items,
// each a segment of a sequence for one head.
// reads_previous: the kernel before this one wrote job.local.
//
// Grid: x = blocks of items, y = jobs. Three warpgroups, chunk i:
//
//   producer   copy(i+2) ........................................
//   output     | scores(i+1) | wait Z(i) | a Z(i) | mask(i) | scores c | store(i) ...
//   (both)     | scores c | scores(i+1) | wait Z(i+1) | a Z(i+1) begins | store(i) | mask(i+1) | a Z(i+1) is there ...
//   state      | Z(i) rounded | wait copy(i) | Z(i+1) = lambda^C Z(i) + b^T w c | Z(i+1) rounded ...
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
  const int cluster = static_cast<int>(ptx::cluster_size());
  if (p.units != nullptr) {  // more blocks than the device found units for: nothing to do
    const Schedule<Cfg::kAlone, Cfg::kInCluster> schedule(job);
    if (p.units[p.by_heads.small_quotient(schedule.unit_and_head(schedule.first()))].segment < 0) {
      if (blockIdx.x == 0) ptx::wait_for_previous_kernel();  // as below
      return;
    }
  }

  if (threadIdx.x == 0) {
    init_barriers(smem, p, cluster);
    ptx::tma_prefetch_map(&job_maps->b);
    ptx::tma_prefetch_map(&job_maps->c);
  }
  __syncthreads();
  // What is launched behind dk and dv reads states as well, and does not wait for them itself.
  if (Cfg::kBoth && reads_previous) ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  if (cluster > 1) ptx::cluster_sync();

  run_roles(smem, p, job, job_maps, reads_previous);
  // A block may not go while others of its cluster still copy to it or arrive at its barriers.
  if (ptx::cluster_size() > 1) ptx::cluster_sync();
  // Whoever waits for this kernel has thereby waited for the one that it overlaps.
  ptx::wait_for_previous_kernel();
}

}  // namespace la2::sm90
