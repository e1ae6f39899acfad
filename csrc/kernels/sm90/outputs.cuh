// The output warpgroups of the trilinear kernel for Hopper. The notebook is ../DESIGN.md.
#pragma once

#include "config.cuh"

namespace la2::sm90 {

// ---- steps

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
__device__ __forceinline__ void give_back_a(SharedStorage<Cfg>& smem, Ring<Cfg::kStagesOfA>& ring,
                                            const WarpgroupLane& me) {
  release_stage(smem.empty_a[ring.stage], me.lane);
  ring.advance();
}

// What the state's operand was divided by, read by the lane that will say that its warp is done with it.
template <class Cfg>
__device__ __forceinline__ float range_undo_of(const SharedStorage<Cfg>& smem, int state) {
  const uint32_t from = shared_address(&smem.range_undo[state]);
  return ptx::broadcast_shared(from);
}

// Masks the scores while a Z arrives in `out`, then gives the state back and weighs the rows of out.
template <class Cfg>
__device__ __forceinline__ void receive_inter(Accumulators<Cfg::kSlice / 2>& out, uint32_t (&masked)[kChunk / 16][4],
                                              const Accumulators<kChunk / 2>& scores, SharedStorage<Cfg>& smem,
                                              const Weights& weights, int state, bool reverse, int rows,
                                              const WarpgroupLane& me) {
  mask_scores<typename Cfg::T, false>(masked, masked, scores, weights, me);
  const int row = me.warp * 16 + me.group;
  float upper = row_weight(weights, reverse, rows, row), lower = row_weight(weights, reverse, rows, row + 8);
  if constexpr (Cfg::kNeedsRange) {
    const float undo = range_undo_of(smem, state);
    upper *= undo;
    lower *= undo;
  }
  ptx::wgmma_wait<0>();
  ptx::pin_registers(out);
  __syncwarp();
  if (me.lane == 0) ptx::mbarrier_arrive(shared_address(&smem.state_empty[state]));
  scale_rows(out, upper, lower);
}

// A chunk of out to `staging`, from where store_output takes it: each goes on once the other has arrived.
template <class T, class Tile>
__device__ __forceinline__ void hand_to_store(Tile (&staging)[1], const Accumulators<Tile::kCols / 2>& out,
                                              uint64_t& staged, uint64_t& stored, const Ring<1>& ring,
                                              const WarpgroupLane& me) {
  ptx::mbarrier_wait(shared_address(&stored), ring.parity ^ 1);
  store_rounded<Tile, T>(staging, me.warp * 16, out, 1.f, me.lane);
  __syncwarp();
  if (me.lane == 0) ptx::mbarrier_arrive(shared_address(&staged));
}

// ---- roles

// out = diag(inter lambda^n) a Z + (M . a b^T) c, chunk by chunk. The scores of the next chunk are issued before this
// chunk's result is stored.
template <class Cfg>
__device__ __forceinline__ void write_outputs(SharedStorage<Cfg>& smem, const TrilinearParams& p,
                                              const TrilinearJob& job, const JobMaps& maps) {
  using T = typename Cfg::T;
  const Schedule<Cfg::kAlone, Cfg::kHasTable> schedule(job);
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
    smem.weights[0].fill(simt::slope_of<float>(p, item.sequence, item.head), inter, intra, reverse,
                         ptx::opaque(threadIdx.x % 128), 128);
    ptx::named_barrier_sync(kOutputWarps, 128);

    Accumulators<kChunk / 2> scores;
    HeldRows<typename Cfg::TileA> held;
    if constexpr (Cfg::kStagesOfA > 0) take_a(held, smem, ring_of_a, me);
    ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
    if constexpr (Cfg::kHoldsA && Cfg::kStagesOfA == 0) held.load(smem.stages[ring.stage].a[0], me);
    issue_scores<T>(scores, rows_of_a(held, smem.stages[ring.stage]), smem.stages[ring.stage].b);
    if constexpr (Cfg::kStagesOfA > 0) give_back_a(smem, ring_of_a, me);
    ptx::wgmma_wait<0>();
    ptx::pin_registers(scores);
    for (int step = 0; step < item.num_chunks; ++step) {
      const int chunk = item.chunk_at(step), rows = item.rows_of(chunk);
      const int stage = ptx::uniform(ring.stage), state = ptx::uniform(state_ring.stage);
      Accumulators<Cfg::kSlice / 2> out;
      ptx::mbarrier_wait(shared_address(&smem.state_full[state]), state_ring.parity);
      issue_inter<T, tile::RowsOperand>(out, rows_of_a(held, smem.stages[stage]), smem.state[state]);
      uint32_t masked[kChunk / 16][4];
      receive_inter<Cfg>(out, masked, scores, smem, smem.weights[0], state, reverse, rows, me);
      state_ring.advance();
      issue_intra<T, false>(out, masked, masked, smem.stages[stage].c);

      // Behind the last chunk the scores are computed once more, unused: products in flight across a branch would be
      // serialised.
      ring.advance();
      const bool has_next = step + 1 < item.num_chunks;
      if (has_next) {
        if constexpr (Cfg::kStagesOfA > 0) take_a(held, smem, ring_of_a, me);
        ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
        if constexpr (Cfg::kHoldsA && Cfg::kStagesOfA == 0) held.load(smem.stages[ring.stage].a[0], me);
      }
      const Stage<Cfg>& next = smem.stages[ptx::uniform(has_next ? ring.stage : stage)];
      issue_scores<T>(scores, rows_of_a(held, next), next.b);
      if constexpr (Cfg::kStagesOfA > 0)
        if (has_next) give_back_a(smem, ring_of_a, me);
      ptx::wgmma_wait<1>();
      ptx::pin_registers(out);
      if (has_next) release_stage(smem.empty[stage], me.lane);

      stage_out<T>(smem.out[0], out, me);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(scores);
      ptx::fence_proxy_async();
      store_staged<T>(smem.out[0], maps.out, job, item, chunk, is_packed, me.warp * 16, me.lane);
      if (!has_next) release_stage(smem.empty[stage], me.lane);
    }
  }
  if (ptx::elect_one()) ptx::tma_store_wait();  // the lane that committed them
}

// The same by one of two warpgroups that take the chunks in turns, for the other is at work while this one waits.
template <class Cfg, class States>
__device__ __forceinline__ void write_outputs_in_turns(SharedStorage<Cfg>& smem, const TrilinearParams& p,
                                                       const TrilinearJob& job, const JobMaps& maps, int group,
                                                       const States& states) {
  using T = typename Cfg::T;
  const Schedule<Cfg::kAlone, Cfg::kHasTable> schedule(job);
  const WarpgroupLane me;
  const bool reverse = job.reverse;
  const bool is_packed = p.cu_seqlens.data != nullptr;
  const float inter = static_cast<float>(job.inter), intra = static_cast<float>(job.intra);
  const int my_warps = group == 0 ? kOutputWarps : kSecondOutputWarps;
  Weights& weights = smem.weights[group];
  Ring<Cfg::kStages> ring;
  Ring<Cfg::kStateBuffers> state_ring;
  bool is_my_turn = group == 0;
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item item = schedule.item(p, job, index, Cfg::kSlice);
    if (!item.is_valid) break;
    if (item.num_chunks == 0) continue;
    ptx::named_barrier_sync(my_warps, 128);  // nobody reads the last item's powers any more
    weights.fill(simt::slope_of<float>(p, item.sequence, item.head), inter, intra, reverse,
                 ptx::opaque(threadIdx.x % 128), 128);
    ptx::named_barrier_sync(my_warps, 128);
    states.wait(item);

    for (int step = 0; step < item.num_chunks; ++step, ring.advance(), state_ring.advance()) {
      is_my_turn = !is_my_turn;
      if (is_my_turn) continue;  // it was the other's
      const int chunk = item.chunk_at(step), rows = item.rows_of(chunk);
      const int stage_idx = ptx::uniform(ring.stage), state = ptx::uniform(state_ring.stage);
      const Stage<Cfg>& stage = smem.stages[stage_idx];
      Accumulators<kChunk / 2> scores;
      Accumulators<Cfg::kSlice / 2> out;
      ptx::mbarrier_wait(shared_address(&smem.full[stage_idx]), ring.parity);
      issue_scores<T>(scores, rows_operand(stage.a[0]), stage.b);
      ptx::mbarrier_wait(shared_address(&smem.state_full[state]), state_ring.parity);
      issue_inter<T, tile::RowsOperand>(out, rows_operand(stage.a[0]), smem.state[state]);
      ptx::wgmma_wait<1>();
      ptx::pin_registers(scores);
      uint32_t masked[kChunk / 16][4];
      receive_inter<Cfg>(out, masked, scores, smem, weights, state, reverse, rows, me);
      issue_intra<T, false>(out, masked, masked, stage.c);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(out);
      release_stage(smem.empty[stage_idx], me.lane);
      stage_out<T>(smem.out[group], out, me);
      ptx::fence_proxy_async();
      store_staged<T>(smem.out[group], maps.out, job, item, chunk, is_packed, me.warp * 16, me.lane);
    }
  }
  if (ptx::elect_one()) ptx::tma_store_wait();  // the lane that committed them
}

// The outputs of both jobs, in turns: while one is scaled, masked or stored, the tensor core has the other. The
// products of a chunk with Z and its scores are issued before the outputs of the chunk before are staged. From there
// other warps take them (store_output): a fence and copies here would be waited for with nothing issued.
template <class Cfg>
__device__ __forceinline__ void write_both_outputs(SharedStorage<Cfg>& smem, const TrilinearParams& p) {
  using T = typename Cfg::T;
  const TrilinearJob& first = p.jobs[0];
  const Schedule<Cfg::kAlone, Cfg::kHasTable> schedule(first);
  const WarpgroupLane me;
  constexpr bool reverse = true;  // the pair is dk and dv
  const float inter = static_cast<float>(first.inter), intra = static_cast<float>(first.intra);
  Ring<Cfg::kStages> ring;
  Ring<Cfg::kStateBuffers> state_ring;
  Ring<1> staging_ring;
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item found = schedule.item(p, first, index, Cfg::kSlice);
    if (!found.is_valid) break;
    if (found.num_chunks == 0) continue;
    ptx::named_barrier_sync(kOutputWarps, 128);  // nobody reads the last item's powers any more
    if (threadIdx.x % 128 == 0) smem.item = found;
    smem.weights[0].fill(simt::slope_of<float>(p, found.sequence, found.head), inter, intra, reverse, threadIdx.x % 128,
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
      mask_scores<T, true>(masked, rest, scores, smem.weights[0], me);
      ptx::wgmma_wait<1>();
      ptx::pin_registers(out);
      ptx::pin_registers(second_scores);
      mask_scores<T, true>(second_masked, second_rest, second_scores, smem.weights[0], me);
      // Opaque: read any earlier, these would have no registers.
      const int rows = item.rows_of(ptx::opaque(chunk)), row = ptx::opaque(me.warp * 16 + me.group);
      float upper = row_weight(smem.weights[0], reverse, rows, row),
            lower = row_weight(smem.weights[0], reverse, rows, row + 8);
      if constexpr (Cfg::kNeedsRange) {  // behind the last chunk the state's warps may be at it: anything else then
        const float undo =
            ptx::broadcast_shared(shared_address(is_real ? &smem.range_undo[state] : smem.weights[0].row));
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
      hand_to_store<T>(smem.out[0], out, smem.staged[0], smem.stored[0], staging_ring, me);
      if (has_next) ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
      const Stage<Cfg>& next = smem.stages[ptx::uniform(has_next ? ring.stage : stage_idx)];
      Accumulators<kChunk / 2> scores, second_scores;
      issue_scores<T>(scores, rows_operand(next.a[0]), next.b);
      ptx::wgmma_wait<1>();
      ptx::pin_registers(second_out);
      if (has_next) release_stage(smem.empty[stage_idx], me.lane);
      if (has_next) ptx::mbarrier_wait(shared_address(&smem.state_full[state_ring.stage]), state_ring.parity);
      const int next_state = ptx::uniform(has_next ? state_ring.stage : state);
      issue_inter<T, tile::RowsOperand>(out, rows_operand(next.a[0]), smem.state[next_state]);
      hand_to_store<T>(smem.second_out, second_out, smem.staged[1], smem.stored[1], staging_ring, me);
      staging_ring.advance();
      issue_scores<T>(second_scores, rows_operand(next.second_a[0]), next.c);
      issue_inter<T, tile::ColumnsOperand>(second_out, rows_operand(next.second_a[0]), smem.state[next_state]);
      receive(scores, second_scores, item.chunk_at(has_next ? step + 1 : step), next_state, has_next);
      if (!has_next) release_stage(smem.empty[stage_idx], me.lane);
    }
  }
}

// The out of `job` from where it is staged to memory, by one warp; the items are those of `walked`, with which it runs.
template <class Cfg, class Tile>
__device__ __forceinline__ void store_output(SharedStorage<Cfg>& smem, const Tile (&staging)[1],
                                             const TrilinearParams& p, const TrilinearJob& walked,
                                             const TrilinearJob& job, const CUtensorMap& map, int which) {
  const Schedule<Cfg::kAlone, Cfg::kHasTable> schedule(walked);
  const int lane = threadIdx.x % 32;
  const bool is_packed = p.cu_seqlens.data != nullptr;
  Ring<1> ring;
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item item = schedule.item(p, walked, index, Cfg::kSlice);
    if (!item.is_valid) break;
    for (int step = 0; step < item.num_chunks; ++step, ring.advance()) {
      ptx::mbarrier_wait(shared_address(&smem.staged[which]), ring.parity);
      ptx::fence_proxy_async();
      for (int row = 0; row < kChunk; row += 16)
        store_staged<typename Cfg::T>(staging, map, job, item, item.chunk_at(step), is_packed, row, lane);
      __syncwarp();
      if (ptx::elect_one()) {  // the lane that committed them
        ptx::tma_store_wait_read();
        ptx::mbarrier_arrive(shared_address(&smem.stored[which]));
      }
    }
  }
  if (ptx::elect_one()) ptx::tma_store_wait();
}

}  // namespace la2::sm90
