// bf16 and fp16 trilinear kernel for Hopper: copy engine, wgmma, warp roles, fp32 state in registers.
// The notebook is ../DESIGN.md.
#pragma once

#include <type_traits>

#include "scaled.cuh"
#include "state.cuh"
#include "steps.cuh"

namespace la2::sm90 {

// ---- config

// kTileA: Da rounded up, the missing columns read as zero. kSlice: the columns of Dc of a block.
// kSplit: for the gradients, whose error would else be above that of their own rounding (../DESIGN.md); out's is not.
// In fp16 the two operands that are rounded from float32, the state and the weighted c, go in as a sum of two 16-bit
// numbers (dq does without the second half of c, for which a slice of 128 has no registers to spare: kSplitsValues). In
// bf16 all operands become scaled fp16 instead (kScales, scaled.cuh).
// kBoth: a second job runs along, T(a', c, b) beside T(a, b, c), whose state is the transposed of the first one's: dv
// beside dk. One slice is all of Dc then.
template <class T_, int kTileA_, int kSlice_, bool kSplit_, bool kBoth_ = false>
struct Config {
  using T = T_;
  static constexpr int kTileA = kTileA_, kSlice = kSlice_;
  static constexpr bool kSplit = kSplit_, kBoth = kBoth_;
  static constexpr bool kAlone = false;  // one item to a block, no clusters (work.cuh)
  static constexpr bool kScales = kSplit && std::is_same<T, __nv_bfloat16>::value;
  using Operand = typename std::conditional<kScales, __half, T>::type;  // of the products
  static constexpr bool kSplitsState = kSplit && !kScales, kSplitsValues = kSplitsState && (kSlice == 64 || kBoth);
  static constexpr bool kNeedsRange = std::is_same<T, __half>::value;  // 65504 ends it, and a state may not

  using TileA = tile::SwizzledTile<T, kChunk, kTileA>;
  using TileC = tile::SwizzledTile<T, kChunk, kSlice>;
  using TileZ = tile::SwizzledTile<T, kSlice, kTileA>;  // the state transposed

  static constexpr int kParts = kSplitsState ? 2 : 1;  // of the state: what 16 bits hold, and the rest
  static constexpr int kThreads = 384;                 // producer, output and state warpgroup
  // Of each role; together no more than the block is launched with, or the last one waits for ever.
  static constexpr int kProducerRegisters = kScales ? 72 : 48, kOutputRegisters = kScales ? 216 : 224;
  static constexpr int kStateRegisters = kScales ? 216 : 224;
  static_assert(kProducerRegisters + kOutputRegisters + kStateRegisters <= 3 * 168);
  static constexpr int kTiles = kBoth ? 4 : 3;  // of a stage

  // What fits into 227 KB: a second buffer of the state where its operand is not split, then stages, at most 4.
  static constexpr int kStateBuffers = kSplit ? 1 : 2;
  static constexpr int kStageBytes = 2 * TileA::kBytes + (kBoth ? 2 : 1) * TileC::kBytes;
  static constexpr int kOutBytes = TileC::kBytes + (kBoth ? TileA::kBytes : 0);
  static constexpr int kFixedBytes = kStateBuffers * kParts * TileZ::kBytes + kOutBytes;
  static constexpr int kStagesThatFit = (224 * 1024 - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kStagesThatFit < 4 ? kStagesThatFit : 4;
  static_assert(kStages >= 2);
};

template <class Cfg>
struct Stage {
  typename Cfg::TileA a, b;                  // [C, Da]
  typename Cfg::TileC c;                     // [C, slice]
  typename Cfg::TileC second_a[Cfg::kBoth];  // [C, Dc]: a of the second job, whose b is c and whose c is b
};

// Arrivals: the copy engine's bytes and the producer (full, tail; copied), or every converter warp (full, with
// kScales); every consumer warp of the cluster (empty); every warp of the state warpgroup (state_full), of the output
// warpgroup (state_empty).
template <class Cfg>
struct SharedStorage {
  Stage<Cfg> stages[Cfg::kStages];
  typename Cfg::TileZ state[Cfg::kStateBuffers][Cfg::kParts];  // Z^T [slice, Da] as it enters a chunk
  typename Cfg::TileC out[1];                                  // [C, slice] on its way to memory
  typename Cfg::TileA second_out[Cfg::kBoth];                  // [C, Da]
  typename std::conditional<Cfg::kScales, ScaledWeights, Weights>::type weights;  // of the output warpgroup
  Scales scales[Cfg::kScales ? Cfg::kStages : 0];
  Item item;                        // its own, where it has no registers to keep it
  tile::Decay<kChunk> powers;       // of the state warpgroup, which may be an item ahead
  float update;                     // its job's, where it has no register to keep it
  int range[Cfg::kStateBuffers];    // fp16: the state's operand was divided by 2^range
  alignas(16) float largest[2][4];  // of each state warp, by turns; read as one vector
  uint64_t full[Cfg::kStages], empty[Cfg::kStages], tail;
  uint64_t empty_a[Cfg::kScales ? Cfg::kStages : 0];              // empty is b and c alone then
  uint64_t copied[Cfg::kScales ? Cfg::kStages : 0][Cfg::kTiles];  // b, c, a, a of the second job
  uint64_t state_full[Cfg::kStateBuffers], state_empty[Cfg::kStateBuffers];
};

enum NamedBarrier { kOutputWarps = 1, kStateWarps = 2, kConverters = 3 };

// ---- steps of the output warpgroup

// out [C, N] = a Z, issued; N are the rows of the stored Z^T (RowsOperand) or its columns (ColumnsOperand).
template <class T, template <class> class Operand, class TileZ, int kParts, class Tile, int kRegs>
__device__ __forceinline__ void issue_inter(Accumulators<kRegs>& out, const Tile& a_tile,
                                            const TileZ (&state)[kParts]) {
  const tile::RowsOperand<Tile> a(shared_address(&a_tile));
  ptx::pin_registers(out);
  ptx::wgmma_fence();
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const Operand<TileZ> z(shared_address(&state[part]));
#pragma unroll
    for (int k = 0; k < Tile::kCols / 16; ++k)
      ptx::wgmma<T, ptx::Major::kK, Operand<TileZ>::kMajor>(out, a.step(k), z.step(k), k + part != 0);
  }
  ptx::wgmma_commit();
}

// What the state's operand was divided by, read by the lane that will say that its warp is done with it.
template <class Cfg>
__device__ __forceinline__ int range_of(const SharedStorage<Cfg>& smem, int state) {
  const uint32_t from = shared_address(&smem.range[state]);
  return __float_as_int(ptx::broadcast_shared(from));
}

// ---- steps of the state warpgroup

template <class Cfg>
using StateAccumulators = float[Cfg::kSlice / 64][Cfg::kTileA / 2];

// Z = lambda^rows Z + b^T diag(update lambda^n) c, as Z^T += (weighted c)^T b, in blocks of 64 columns of c. pause()
// comes before the last of several. is_result: without the error of rounding the weighted c.
template <class Cfg, class Pause>
__device__ __forceinline__ void update_state(StateAccumulators<Cfg>& z, const Stage<Cfg>& stage,
                                             const tile::Decay<kChunk>& powers, float factor, bool reverse, int rows,
                                             bool is_result, const WarpgroupLane& me, const Pause& pause) {
  static_assert(!Cfg::kScales);
  using T = typename Cfg::T;
  constexpr int kBlocks = Cfg::kSlice / 64, kAtOnce = kBlocks * Cfg::kTileA <= 128 ? 64 : 32;
  const float* weights = token_weights(powers, reverse, rows, me);
  const float lambda_rows = powers.ascending()[rows];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    uint32_t weighted[kChunk / 16][4], rest[kChunk / 16][4];
    auto update = [&](auto splits) {
      constexpr bool kSplits = decltype(splits)::value;
      weigh_columns<T, kSplits>(weighted, rest, stage.c, block, [&](int j) { return factor * weights[j]; }, me);
      if (kBlocks > 1 && block == kBlocks - 1) pause();
      update_rows<T, kSplits, kAtOnce>(z[block], weighted, rest, stage.b, lambda_rows, Decayed());
    };
    if (Cfg::kSplit || !is_result)
      update(std::integral_constant<bool, Cfg::kSplitsValues>());
    else
      update(std::true_type());
  }
}

// The same with scaled operands, Z += 2^m update sum(...). Returns what bounds the |sum|.
template <class Cfg, class Pause>
__device__ __forceinline__ float update_scaled_state(StateAccumulators<Cfg>& z, const Stage<Cfg>& stage,
                                                     const Scales& scales, const tile::Decay<kChunk>& powers,
                                                     float factor, bool reverse, int rows, const WarpgroupLane& me,
                                                     const Pause& pause) {
  constexpr int kBlocks = Cfg::kSlice / 64, kAtOnce = 32;
  const float* weights = token_weights(powers, reverse, rows, me);
  const float* tokens = scales.token + me.pair * 2;
  const int exponent = scales.upto[reverse ? 0 : rows - 1];
  const float lambda_rows = powers.ascending()[rows];
  const float to_one = two_to(scales.most - exponent - kTokenBits), by = times_two_to(factor, exponent);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    uint32_t weighted[kChunk / 16][4];
    weigh_columns<__half, false>(
        weighted, weighted, stage.c, block, [&](int j) { return weights[j] * (tokens[j] * to_one); }, me);
    if (kBlocks > 1 && block == kBlocks - 1) pause();
    update_rows<__half, false, kAtOnce>(
        z[block], weighted, weighted, stage.b, lambda_rows,
        [&](float element, float lambda, float sum) { return fmaf(sum, by, element * lambda); });
  }
  constexpr float kMost = kChunk * 0x1p32f;
  return fabsf(by) * kMost;
}

// The largest |Z| of the block.
template <class Cfg>
__device__ __forceinline__ float largest_of_block(const StateAccumulators<Cfg>& z, SharedStorage<Cfg>& smem,
                                                  const WarpgroupLane& me) {
  float largest = 0.f;
#pragma unroll
  for (int block = 0; block < Cfg::kSlice / 64; ++block) largest = largest_of_warp(z[block], largest);
  ptx::named_barrier_sync(kStateWarps, 128);  // everyone is done with the last ones
  if (me.lane == 0) smem.largest[0][ptx::opaque(me.warp)] = largest;
  ptx::named_barrier_sync(kStateWarps, 128);
  return largest_of_warps(smem.largest[0]);
}

// ---- roles

// Warp 0 of the producer warpgroup; lane 0 starts the copies. With kScales every tile announces itself to the
// converters, who also clear what stands behind a sequence.
template <class Cfg>
__device__ __forceinline__ void produce(SharedStorage<Cfg>& smem, const TrilinearParams& p, const TrilinearJob& job,
                                        const JobMaps* maps) {
  const Schedule<Cfg::kAlone, !Cfg::kBoth> schedule(job);
  const int lane = threadIdx.x % 32;
  Ring<Cfg::kStages> ring;
  uint32_t tail_parity = 0;
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item item = schedule.item(p, job, index, Cfg::kSlice);
    if (!item.is_valid) break;
    for (int step = 0; step < item.num_chunks; ++step, ring.advance()) {
      const int chunk = item.chunk_at(step), rows = item.rows_of(chunk);
      Stage<Cfg>& stage = smem.stages[ring.stage];
      // Behind the end of a dense sequence the map ends and zeroes come; behind a packed one, its neighbour.
      const ptx::TmaBox box = item.box(chunk);
      if constexpr (Cfg::kScales) {
        const uint32_t copied = shared_address(&smem.copied[ring.stage]);
        ptx::mbarrier_wait(shared_address(&smem.empty_a[ring.stage]), ring.parity ^ 1);
        if (lane == 0) {
          ptx::mbarrier_arrive_expect(copied + 2 * 8, Cfg::TileA::kBytes);
          load_tile_shared<typename Cfg::TileA>(shared_address(&stage.a), &maps->a, copied + 2 * 8, box,
                                                schedule.rank(), schedule.cluster);
          if constexpr (Cfg::kBoth) {
            ptx::mbarrier_arrive_expect(copied + 3 * 8, Cfg::TileC::kBytes);
            load_tile<typename Cfg::TileC>(shared_address(&stage.second_a[0]), &maps[1].a, copied + 3 * 8, box, 0);
          }
        }
        ptx::mbarrier_wait(shared_address(&smem.empty[ring.stage]), ring.parity ^ 1);
        if (lane == 0) {
          ptx::mbarrier_arrive_expect(copied, Cfg::TileA::kBytes);
          load_tile_shared<typename Cfg::TileA>(shared_address(&stage.b), &maps->b, copied, box, schedule.rank(),
                                                schedule.cluster);
          ptx::mbarrier_arrive_expect(copied + 8, Cfg::TileC::kBytes);
          load_tile<typename Cfg::TileC>(shared_address(&stage.c), &maps->c, copied + 8, box, item.first_col);
        }
        continue;
      }
      const bool clears = p.cu_seqlens.data != nullptr && rows < kChunk;
      const uint32_t full = shared_address(&smem.full[ring.stage]);
      const uint32_t barrier = clears ? shared_address(&smem.tail) : full;
      ptx::mbarrier_wait(shared_address(&smem.empty[ring.stage]), ring.parity ^ 1);
      if (lane == 0) {
        ptx::mbarrier_arrive_expect(barrier, sizeof(Stage<Cfg>));
        load_tile_shared<typename Cfg::TileA>(shared_address(&stage.b), &maps->b, barrier, box, schedule.rank(),
                                              schedule.cluster);
        load_tile_shared<typename Cfg::TileA>(shared_address(&stage.a), &maps->a, barrier, box, schedule.rank(),
                                              schedule.cluster);
        load_tile<typename Cfg::TileC>(shared_address(&stage.c), &maps->c, barrier, box, item.first_col);
        if constexpr (Cfg::kBoth)
          load_tile<typename Cfg::TileC>(shared_address(&stage.second_a[0]), &maps[1].a, barrier, box, 0);
      }
      if (clears) clear_tail(stage.b, stage.c, rows, barrier, full, tail_parity, lane);
    }
  }
}

// The other three warps of that warpgroup, each some rows of every tile as it comes. The
// tiles of a come first, whose place is free first.
template <class Cfg>
__device__ __forceinline__ void convert(SharedStorage<Cfg>& smem, const TrilinearParams& p, const TrilinearJob& job) {
  const Schedule<Cfg::kAlone, !Cfg::kBoth> schedule(job);
  Ring<Cfg::kStages> ring;
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item item = schedule.item(p, job, index, Cfg::kSlice);
    if (!item.is_valid) break;
    const float slope_log2 = bits_of_slope(simt::slope_of<float>(p, item.sequence, item.head));
    for (int step = 0; step < item.num_chunks; ++step, ring.advance()) {
      const int thread = ptx::opaque(threadIdx.x), warp = thread / 32 - 1, lane = thread % 32;
      const int rows = item.rows_of(item.chunk_at(step));
      Stage<Cfg>& stage = smem.stages[ring.stage];
      Scales& scales = smem.scales[ring.stage];
      const uint32_t copied = shared_address(&smem.copied[ring.stage]);
      const uint32_t a = shared_address(&stage.a), b = shared_address(&stage.b), c = shared_address(&stage.c);
      ptx::mbarrier_wait(copied + 2 * 8, ring.parity);
      if constexpr (Cfg::kBoth) {
        ptx::mbarrier_wait(copied + 3 * 8, ring.parity);
        convert_rows<typename Cfg::TileA, typename Cfg::TileC>(a, scales.of_a, shared_address(&stage.second_a[0]),
                                                               scales.of_second_a, rows, warp, lane);
      } else {
        convert_rows<typename Cfg::TileA>(a, scales.of_a, rows, warp, lane);
      }
      ptx::mbarrier_wait(copied, ring.parity);
      ptx::mbarrier_wait(copied + 8, ring.parity);
      convert_rows<typename Cfg::TileA, typename Cfg::TileC>(b, scales.of_b, c, scales.of_c, rows,
                                                             (warp + 2) % kConverterWarps, lane);
      ptx::named_barrier_sync(kConverters, kConverterWarps * 32);
      if (warp == 2) scales.fill(slope_log2, job.reverse, lane);
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(shared_address(&smem.full[ring.stage]));
    }
  }
}

// out = diag(inter lambda^n) a Z + (M . a b^T) c, chunk by chunk. The scores of the next chunk are issued before this
// chunk's result is stored.
template <class Cfg>
__device__ __forceinline__ void write_outputs(SharedStorage<Cfg>& smem, const TrilinearParams& p,
                                              const TrilinearJob& job, const JobMaps& maps) {
  using T = typename Cfg::Operand;
  const Schedule<Cfg::kAlone, !Cfg::kBoth> schedule(job);
  const WarpgroupLane me;
  const bool reverse = job.reverse;
  const bool is_packed = p.cu_seqlens.data != nullptr;
  const float inter = static_cast<float>(job.inter), intra = static_cast<float>(job.intra);
  Ring<Cfg::kStages> ring;
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
    ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
    issue_scores<T>(scores, smem.stages[ring.stage].a, smem.stages[ring.stage].b);
    ptx::wgmma_wait<0>();
    ptx::pin_registers(scores);
    for (int step = 0; step < item.num_chunks; ++step) {
      const int chunk = item.chunk_at(step), rows = item.rows_of(chunk);
      const int stage = ptx::uniform(ring.stage), state = ptx::uniform(state_ring.stage);
      Accumulators<Cfg::kSlice / 2> out;
      ptx::mbarrier_wait(shared_address(&smem.state_full[state]), state_ring.parity);
      issue_inter<T, tile::RowsOperand>(out, smem.stages[stage].a, smem.state[state]);
      uint32_t masked[kChunk / 16][4];
      const int row = me.warp * 16 + me.group;
      float upper, lower, last_upper = 1.f, last_lower = 1.f;
      if constexpr (Cfg::kScales) {
        const Scales& scales = smem.scales[stage];
        mask_scaled_scores(masked, scores, smem.weights, scales, me);
        const int range = range_of(smem, state);
        const RowScale first_row(smem.weights, scales, range, reverse, rows, row),
            second_row(smem.weights, scales, range, reverse, rows, row + 8);
        upper = first_row.inter;
        lower = second_row.inter;
        last_upper = first_row.last(scales.of_a[row]);
        last_lower = second_row.last(scales.of_a[row + 8]);
      } else {
        mask_scores<T, false>(masked, nullptr, scores, smem.weights, me);
        upper = row_weight(smem.weights, reverse, rows, row);
        lower = row_weight(smem.weights, reverse, rows, row + 8);
        if constexpr (Cfg::kNeedsRange) {
          const float undo = power_of_two(range_of(smem, state));
          upper *= undo;
          lower *= undo;
        }
      }
      ptx::wgmma_wait<0>();
      ptx::pin_registers(out);
      __syncwarp();
      if (me.lane == 0) ptx::mbarrier_arrive(shared_address(&smem.state_empty[state]));
      state_ring.advance();
      const bool has_next = step + 1 < item.num_chunks;
      if constexpr (Cfg::kScales)
        if (has_next) release_stage(smem.empty_a[stage], schedule.cluster, me.lane);
      scale_rows(out, upper, lower);
      issue_intra<T>(out, masked, smem.stages[stage].c);

      // Behind the last chunk the scores are computed once more, unused: products in flight across a branch would be
      // serialised.
      ring.advance();
      if constexpr (Cfg::kScales) {  // what is copied next has to be converted as well: the stage goes back before
        ptx::wgmma_wait<0>();
        ptx::pin_registers(out);
        if (has_next) release_stage(smem.empty[stage], schedule.cluster, me.lane);
      }
      if (has_next) ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
      const Stage<Cfg>& next = smem.stages[ptx::uniform(has_next ? ring.stage : stage)];
      issue_scores<T>(scores, next.a, next.b);
      ptx::wgmma_wait<1>();
      ptx::pin_registers(out);
      if (!Cfg::kScales && has_next) release_stage(smem.empty[stage], schedule.cluster, me.lane);

      store_out<typename Cfg::T>(smem.out, out, last_upper, last_lower, maps.out, job, item, chunk, is_packed, me);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(scores);
      if (!has_next) {
        if constexpr (Cfg::kScales) release_stage(smem.empty_a[stage], schedule.cluster, me.lane);
        release_stage(smem.empty[stage], schedule.cluster, me.lane);
      }
    }
  }
  if (ptx::elect_one()) ptx::tma_store_wait();  // the lane that committed them
}

// The outputs of both jobs, in turns: while one is scaled, masked or stored, the tensor core has the other.
template <class Cfg>
__device__ __forceinline__ void write_both_outputs(SharedStorage<Cfg>& smem, const TrilinearParams& p,
                                                   const JobMaps* maps) {
  using T = typename Cfg::Operand;
  const TrilinearJob &first = p.jobs[0], &second = p.jobs[1];
  const Schedule<Cfg::kAlone, !Cfg::kBoth> schedule(first);
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

    uint32_t masked[kChunk / 16][4], second_masked[kChunk / 16][4], diagonal[4], second_diagonal[4];
    auto mask = [&](auto& to, auto& rest, const auto& scores, int stage) {
      if constexpr (Cfg::kScales) {
        mask_scaled_scores(to, scores, smem.weights, smem.scales[stage], me);
      } else {
        mask_scores<T, true>(to, rest, scores, smem.weights, me);
      }
    };
    {
      Accumulators<kChunk / 2> scores, second_scores;
      ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
      const Stage<Cfg>& stage = smem.stages[ring.stage];
      issue_scores<T>(scores, stage.a, stage.b);
      issue_scores<T>(second_scores, stage.second_a[0], stage.c);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(scores);
      ptx::pin_registers(second_scores);
      mask(masked, diagonal, scores, ring.stage);
      mask(second_masked, second_diagonal, second_scores, ring.stage);
    }
    for (int step = 0; step < item.num_chunks; ++step) {
      const int chunk = item.chunk_at(step), rows = item.rows_of(chunk);
      const int stage_idx = ptx::uniform(ring.stage), state = ptx::uniform(state_ring.stage);
      const Stage<Cfg>& stage = smem.stages[stage_idx];
      Accumulators<Cfg::kSlice / 2> out;
      Accumulators<Cfg::kTileA / 2> second_out;
      ptx::mbarrier_wait(shared_address(&smem.state_full[state]), state_ring.parity);
      const int row = me.warp * 16 + me.group;
      issue_inter<T, tile::RowsOperand>(out, stage.a, smem.state[state]);
      issue_inter<T, tile::ColumnsOperand>(second_out, stage.second_a[0], smem.state[state]);
      float upper, lower, last[2][2] = {{1.f, 1.f}, {1.f, 1.f}};  // of each job, of each row
      if constexpr (Cfg::kScales) {
        const Scales& scales = smem.scales[stage_idx];
        const int range = range_of(smem, state);
        const RowScale first_row(smem.weights, scales, range, reverse, rows, row),
            second_row(smem.weights, scales, range, reverse, rows, row + 8);
        upper = first_row.inter;
        lower = second_row.inter;
        last[0][0] = first_row.last(scales.of_a[row]);
        last[0][1] = second_row.last(scales.of_a[row + 8]);
        last[1][0] = first_row.last(scales.of_second_a[row]);
        last[1][1] = second_row.last(scales.of_second_a[row + 8]);
      } else {
        upper = row_weight(smem.weights, reverse, rows, row);
        lower = row_weight(smem.weights, reverse, rows, row + 8);
        if constexpr (Cfg::kNeedsRange) {
          const float undo = power_of_two(range_of(smem, state));
          upper *= undo;
          lower *= undo;
        }
      }
      ptx::wgmma_wait<1>();
      ptx::pin_registers(out);
      scale_rows(out, upper, lower);
      if constexpr (!Cfg::kScales) add_diagonal<T>(out, diagonal, stage.c);
      issue_intra<T>(out, masked, stage.c);
      ptx::wgmma_wait<1>();
      ptx::pin_registers(second_out);
      __syncwarp();
      if (me.lane == 0) ptx::mbarrier_arrive(shared_address(&smem.state_empty[state]));
      state_ring.advance();
      const bool has_next = step + 1 < item.num_chunks;
      if constexpr (Cfg::kScales)
        if (has_next) release_stage(smem.empty_a[stage_idx], schedule.cluster, me.lane);
      scale_rows(second_out, upper, lower);
      issue_intra<T>(second_out, second_masked, stage.b);

      // Behind the last chunk the scores are computed once more, unused: products in flight across a branch would be
      // serialised.
      ring.advance();
      const int next_idx = ptx::uniform(has_next ? ring.stage : stage_idx);
      const Stage<Cfg>& next = smem.stages[next_idx];
      Accumulators<kChunk / 2> scores, second_scores;
      if constexpr (Cfg::kScales) {  // what is copied next has to be converted as well: the stage goes back before
        ptx::wgmma_wait<0>();
        ptx::pin_registers(out);
        ptx::pin_registers(second_out);
        if (has_next) release_stage(smem.empty[stage_idx], schedule.cluster, me.lane);
        store_out<typename Cfg::T>(smem.out, out, last[0][0], last[0][1], maps[0].out, first, item, chunk, is_packed,
                                   me);
        if (has_next) ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
        issue_scores<T>(scores, next.a, next.b);
      } else {
        if (has_next) ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
        issue_scores<T>(scores, next.a, next.b);
        ptx::wgmma_wait<2>();
        ptx::pin_registers(out);
        store_out<typename Cfg::T>(smem.out, out, 1.f, 1.f, maps[0].out, first, item, chunk, is_packed, me);
        ptx::wgmma_wait<1>();
        ptx::pin_registers(second_out);
        add_diagonal<T>(second_out, second_diagonal, stage.b);
        if (has_next) release_stage(smem.empty[stage_idx], schedule.cluster, me.lane);
      }
      issue_scores<T>(second_scores, next.second_a[0], next.c);
      store_out<typename Cfg::T>(smem.second_out, second_out, last[1][0], last[1][1], maps[1].out, second, item, chunk,
                                 is_packed, me);
      ptx::wgmma_wait<1>();
      ptx::pin_registers(scores);
      mask(masked, diagonal, scores, next_idx);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(second_scores);
      mask(second_masked, second_diagonal, second_scores, next_idx);
      if (!has_next) {
        if constexpr (Cfg::kScales) release_stage(smem.empty_a[stage_idx], schedule.cluster, me.lane);
        release_stage(smem.empty[stage_idx], schedule.cluster, me.lane);
      }
    }
  }
  if (ptx::elect_one()) ptx::tma_store_wait();  // the lane that committed them
}

// Z = lambda^C Z + b^T diag(w) c, chunk by chunk, and before each chunk its rounded copy for the outputs.
template <class Cfg>
__device__ __forceinline__ void carry_state(SharedStorage<Cfg>& smem, const TrilinearParams& p, const TrilinearJob& job,
                                            bool reads_previous) {
  using T = typename Cfg::Operand;
  const Schedule<Cfg::kAlone, !Cfg::kBoth> schedule(job);
  const WarpgroupLane me;
  const bool reverse = job.reverse;
  Ring<Cfg::kStages> ring;
  Ring<Cfg::kStateBuffers> state_ring;
  if (reads_previous) ptx::wait_for_previous_kernel();
  for (int index = schedule.first(); index < schedule.count(p); index = schedule.after(index, p)) {
    const Item item = schedule.item(p, job, index, Cfg::kSlice);
    if (!item.is_valid) break;
    ptx::named_barrier_sync(kStateWarps, 128);
    if (threadIdx.x % 128 == 0) smem.update = static_cast<float>(job.update);
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
    float largest = Cfg::kScales ? largest_of_block<Cfg>(z, smem, me) : 0.f;  // bounds |Z|
    float added = 0.f;                                                        // and what the last chunk added to it
    for (int step = 0; step < item.num_chunks; ++step, ring.advance()) {
      const int state = ptx::uniform(state_ring.stage), stage = ptx::uniform(ring.stage);
      ptx::mbarrier_wait(shared_address(&smem.state_empty[state]), state_ring.parity ^ 1);
      int exponent = 0;
      float divide = 1.f;
      uint32_t seen = 0;
      if constexpr (Cfg::kNeedsRange || Cfg::kScales) {
        if constexpr (Cfg::kNeedsRange) largest = largest_of_block<Cfg>(z, smem, me);
        // All state warps have rounded the last state: the outputs say that they have read it.
        if (Cfg::kScales && step > 0)
          largest = fmaf(largest_of_warps(smem.largest[step % 2]),
                         smem.powers.ascending()[item.rows_of(item.chunk_at(step - 1))], added);
        exponent = Cfg::kScales ? state_exponent(largest) : range_exponent(largest);
        if (me.warp == 0 && me.lane == 0) smem.range[state] = exponent;
        divide = power_of_two(-exponent);
      }
#pragma unroll
      for (int block = 0; block < Cfg::kSlice / 64; ++block)
        store_rounded<typename Cfg::TileZ, T>(smem.state[state], block * 64 + me.warp * 16, z[block], divide, divide,
                                              me.lane, [&](uint32_t pair) {
                                                if constexpr (Cfg::kScales) seen = tile::largest_fp16(seen, pair);
                                              });
      if constexpr (Cfg::kScales) {
        const float of_warp = largest_of_pairs(seen) * power_of_two(exponent);
        if (me.lane == 0) smem.largest[(step + 1) % 2][ptx::opaque(me.warp)] = of_warp;
      }
      ptx::fence_proxy_async();
      __syncwarp();
      if (me.lane == 0) ptx::mbarrier_arrive(shared_address(&smem.state_full[state]));
      state_ring.advance();

      ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
      auto pause = [&] {
        ptx::mbarrier_wait(shared_address(&smem.state_empty[state_ring.stage]), state_ring.parity ^ 1);
      };
      if (step + 1 < item.num_chunks || wants_state) {
        const int rows = item.rows_of(item.chunk_at(step));
        // The outputs' products with Z go first where the tensor core is short: theirs is the longer way. In the last
        // chunk of a sequence, whose state no output reads, rounding the weighted c would be most of the state's error
        // where slopes are steep. Not in extend, where a request that is cut must have the bits of a whole one.
        if constexpr (Cfg::kScales) {
          added = update_scaled_state<Cfg>(z, smem.stages[stage], smem.scales[stage], smem.powers, smem.update, reverse,
                                           rows, me, pause);
        } else {
          update_state<Cfg>(z, smem.stages[stage], smem.powers, smem.update, reverse, rows,
                            wants_state && step + 1 == item.num_chunks && p.units == nullptr, me, pause);
        }
      }
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
__device__ __forceinline__ void init_barriers(SharedStorage<Cfg>& smem, int cluster) {
  constexpr int kWarpsOfRole = 4;
  constexpr int kConsumerWarps = 2 * kWarpsOfRole;
  for (int i = 0; i < Cfg::kStages; ++i) {
    ptx::mbarrier_init(shared_address(&smem.full[i]), Cfg::kScales ? kConverterWarps : 1);
    ptx::mbarrier_init(shared_address(&smem.empty[i]), kConsumerWarps * cluster);
    if constexpr (Cfg::kScales) ptx::mbarrier_init(shared_address(&smem.empty_a[i]), kWarpsOfRole * cluster);
    if constexpr (Cfg::kScales)
      for (int tile = 0; tile < Cfg::kTiles; ++tile) ptx::mbarrier_init(shared_address(&smem.copied[i][tile]), 1);
  }
  ptx::mbarrier_init(shared_address(&smem.tail), 1);
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
    if (threadIdx.x < 32) {
      produce<Cfg>(smem, p, job, job_maps);
    } else if constexpr (Cfg::kScales) {
      convert<Cfg>(smem, p, job);
    }
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
//   converters | copy(i+1) made fp16 ............................        (kScales)
//   output     | scores(i+1) | wait Z(i) | a Z(i) | mask(i) | scores c | store(i) ...
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
    const Schedule<Cfg::kAlone, !Cfg::kBoth> schedule(job);
    if (p.units[p.by_heads.small_quotient(schedule.unit_and_head(schedule.first()))].segment < 0) {
      if (blockIdx.x == 0) ptx::wait_for_previous_kernel();  // as below
      return;
    }
  }

  if (threadIdx.x == 0) {
    init_barriers(smem, cluster);
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
