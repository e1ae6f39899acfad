// dk and dv in one sweep for Hopper, bf16 and fp16, dims up to 128: two trilinear jobs that share four operands and one
// state. The notebook is ../DESIGN.md.
#pragma once

#include <type_traits>

#include "steps.cuh"

namespace la2::sm90 {

// ---- config

// kTile: D and E rounded up, the missing columns read as zero.
template <class T_, int kTile_>
struct KeyValueConfig {
  using T = T_;
  static constexpr int kTile = kTile_;
  static constexpr bool kNeedsRange = std::is_same<T, __half>::value;

  using TileRows = tile::SwizzledTile<T, kChunk, kTile>;
  using TileX = tile::SwizzledTile<T, kTile, kTile>;

  static constexpr int kThreads = 384;  // producer, dv and dk warpgroup
  static constexpr int kWorkers = 2;
  static constexpr int kOwners = kTile / 64;  // of the state, 64 rows of D each: the first workers
  static constexpr int kProducerRegisters = 56, kWorkerRegisters = 224;
  static constexpr int kStages = kTile == 128 ? 2 : 4;
};

template <class Cfg>
struct KeyValueStage {
  typename Cfg::TileRows q, k;     // [C, D]
  typename Cfg::TileRows dout, v;  // [C, E]
};

template <class Cfg>
struct KeyValueStorage {
  KeyValueStage<Cfg> stages[Cfg::kStages];
  typename Cfg::TileX state[2];                  // X [D, E] as it enters a chunk: what 16 bits hold, and the rest
  typename Cfg::TileRows out[Cfg::kWorkers][1];  // dv, dk on their way to memory
  tile::Decay<kChunk> decay;
  float largest[4 * Cfg::kOwners];
  uint64_t full[Cfg::kStages], empty[Cfg::kStages], tail;
};

// kHasRead + w: worker w no longer reads the state's copy, which whoever owns the other rows waits for.
enum KeyValueBarrier { kWorkerWarps = 1, kHasRead = 2 };

// ---- steps of a worker

// Worker 0: dv = k X, the rows of X contracted. Worker 1: dk = v X^T, the columns. Issued.
template <class Cfg, int kWorker>
__device__ __forceinline__ void issue_state_product(Accumulators<Cfg::kTile / 2>& out, const KeyValueStage<Cfg>& stage,
                                                    const typename Cfg::TileX (&state)[2]) {
  using T = typename Cfg::T;
  using X = std::conditional_t<kWorker == 0, tile::ColumnsOperand<typename Cfg::TileX>,
                               tile::RowsOperand<typename Cfg::TileX>>;
  const tile::RowsOperand<typename Cfg::TileRows> a(shared_address(kWorker == 0 ? &stage.k : &stage.v));
  ptx::pin_registers(out);
  ptx::wgmma_fence();
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const X x(shared_address(&state[part]));
#pragma unroll
    for (int k = 0; k < Cfg::kTile / 16; ++k)
      ptx::wgmma<T, ptx::Major::kK, X::kMajor>(out, a.step(k), x.step(k), k + part != 0);
  }
  ptx::wgmma_commit();
}

// Calls body(element of x, pointer to the state's element) for what this lane holds of [64 rows of D, E].
template <int kRegs, class Element, class Body>
__device__ __forceinline__ void for_each_owned_element(Accumulators<kRegs>& x, Element* state, int64_t stride_d,
                                                       int64_t stride_e, int first_row, int dim_k, int dim_v,
                                                       const WarpgroupLane& me, const Body& body) {
  const int row = first_row + me.warp * 16 + me.group;
  Element* at = state + row * stride_d + me.pair * 2 * stride_e;
#pragma unroll
  for (int n = 0; n < kRegs / 4; ++n) {
    if (n * 8 < dim_v) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (row + 8 * (i >> 1) < dim_k) body(x[4 * n + i], at + (i & 1) * stride_e + (i >> 1) * 8 * stride_d);
    }
    at += 8 * stride_e;
    if (n % 8 == 7) ptx::scheduling_fence();  // all loads at once would need too many registers
  }
}

// ---- roles

// The two jobs, dv = T_rev(k, q, dout) and dk = T_rev(v, dout, q), with X of the first.
template <class Cfg>
__device__ __forceinline__ void produce(KeyValueStorage<Cfg>& smem, const TrilinearParams& p,
                                        const TrilinearMaps& maps) {
  const Schedule schedule(p, p.jobs[0], 2 * Cfg::kTile);
  const int lane = threadIdx.x % 32;
  Ring<Cfg::kStages> ring;
  uint32_t tail_parity = 0;
  for (int index = schedule.first; index < schedule.count; index += schedule.step) {
    const Item item = schedule.item(p, p.jobs[0], index, 0);
    if (!item.is_valid) break;
    for (int step = 0; step < item.num_chunks; ++step, ring.advance()) {
      const int chunk = item.chunk_at(step), rows = item.rows_of(chunk);
      KeyValueStage<Cfg>& stage = smem.stages[ring.stage];
      const bool clears = p.cu_seqlens.data != nullptr && rows < kChunk;
      const uint32_t full = shared_address(&smem.full[ring.stage]);
      const uint32_t barrier = clears ? shared_address(&smem.tail) : full;
      ptx::mbarrier_wait(shared_address(&smem.empty[ring.stage]), ring.parity ^ 1);
      if (lane == 0) {
        const ptx::TmaBox box = item.box(chunk);
        ptx::mbarrier_arrive_expect(barrier, sizeof(KeyValueStage<Cfg>));
        load_tile<typename Cfg::TileRows>(shared_address(&stage.q), &maps.jobs[0].b, barrier, box, 0);
        load_tile<typename Cfg::TileRows>(shared_address(&stage.k), &maps.jobs[0].a, barrier, box, 0);
        load_tile<typename Cfg::TileRows>(shared_address(&stage.dout), &maps.jobs[0].c, barrier, box, 0);
        load_tile<typename Cfg::TileRows>(shared_address(&stage.v), &maps.jobs[1].a, barrier, box, 0);
      }
      if (clears) {
        ptx::mbarrier_wait(barrier, tail_parity);
        tail_parity ^= 1;
        clear_rows<typename Cfg::TileRows>(shared_address(&stage.q), rows, lane);
        clear_rows<typename Cfg::TileRows>(shared_address(&stage.dout), rows, lane);
        ptx::fence_proxy_async();
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(full);
      }
    }
  }
}

// A worker computes its gradient chunk by chunk and carries its 64 rows of X [D, E], if it owns any:
//
//   out = diag(inter lambda^n) a X + (M . a b^T) c            X = lambda^C X + (weighted q)^T dout
template <class Cfg, int kWorker>
__device__ __forceinline__ void work(KeyValueStorage<Cfg>& smem, const TrilinearParams& p, const TrilinearMaps& maps) {
  using T = typename Cfg::T;
  constexpr bool kOwns = kWorker < Cfg::kOwners;
  constexpr int kFirstRow = 64 * kWorker;
  constexpr bool kOtherOwns = 1 - kWorker < Cfg::kOwners;
  const TrilinearJob& job = p.jobs[kWorker];
  const TrilinearJob& state_job = p.jobs[0];
  const Schedule schedule(p, p.jobs[0], 2 * Cfg::kTile);
  const WarpgroupLane me;
  const int worker_thread = threadIdx.x - 128;
  const bool is_packed = p.cu_seqlens.data != nullptr;
  const float inter = static_cast<float>(job.inter), intra = static_cast<float>(job.intra);
  const float update = static_cast<float>(state_job.update);
  constexpr bool reverse = true;
  Ring<Cfg::kStages> ring;
  for (int index = schedule.first; index < schedule.count; index += schedule.step) {
    const Item item = schedule.item(p, p.jobs[0], index, 0);
    if (!item.is_valid) break;
    ptx::named_barrier_sync(kWorkerWarps, 256);  // nobody reads the last item's powers any more
    smem.decay.fill(simt::slope_of<float>(p, item.sequence, item.head), worker_thread, 256);
    ptx::named_barrier_sync(kWorkerWarps, 256);
    const float* along = smem.decay.along(reverse);

    Accumulators<Cfg::kTile / 2> x;
#pragma unroll
    for (int i = 0; i < Cfg::kTile / 2; ++i) x[i] = 0.f;
    const void* entering = p.is_cut ? state_job.local.data : state_job.initial.data;
    if (kOwns && entering != nullptr) {
      const int64_t stride_s = p.is_cut ? state_job.local.stride_s : state_job.initial.stride_s;
      const int64_t stride_h = p.is_cut ? state_job.local.stride_h : state_job.initial.stride_h;
      const int64_t stride_d = p.is_cut ? state_job.local.stride_d : state_job.initial.stride_d;
      const int64_t stride_e = p.is_cut ? state_job.local.stride_e : state_job.initial.stride_e;
      const float* from = static_cast<const float*>(entering) + (p.is_cut ? item.unit : item.sequence) * stride_s +
                          item.head * stride_h;
      for_each_owned_element(x, from, stride_d, stride_e, kFirstRow, state_job.dim_a, state_job.dim_c, me,
                             [](float& element, const float* stored) { element = *stored; });
    }

    // X rounded to shared memory; the factor that undoes its range.
    auto round_state = [&]() -> float {
      int exponent = 0;
      if constexpr (Cfg::kNeedsRange) {
        const float largest = largest_of_warp(x, 0.f);
        if (kOwns && me.lane == 0) smem.largest[kWorker * 4 + me.warp] = largest;
        ptx::named_barrier_sync(kWorkerWarps, 256);
        float all = 0.f;
#pragma unroll
        for (int i = 0; i < 4 * Cfg::kOwners; ++i) all = fmaxf(all, smem.largest[i]);
        exponent = range_exponent(all);
      }
      if constexpr (kOwns) {
        const float factor = Cfg::kNeedsRange ? power_of_two(-exponent) : 1.f;
        store_rounded<typename Cfg::TileX, T>(smem.state, kFirstRow + me.warp * 16, x, factor, me.lane);
        ptx::fence_proxy_async();
      }
      return Cfg::kNeedsRange ? power_of_two(exponent) : 1.f;
    };

    const bool wants_state = state_job.final.data != nullptr && item.is_last;
    Accumulators<kChunk / 2> scores;
    float undo = 1.f;
    auto issue_next_scores = [&](const KeyValueStage<Cfg>& stage) {
      if constexpr (kWorker == 0) {
        issue_scores<T>(scores, stage.k, stage.q);
      } else {
        issue_scores<T>(scores, stage.v, stage.dout);
      }
    };
    if (item.num_chunks > 0) {
      ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
      issue_next_scores(smem.stages[ring.stage]);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(scores);
      undo = round_state();
    }
    for (int step = 0; step < item.num_chunks; ++step) {
      const int chunk = item.chunk_at(step), rows = item.rows_of(chunk), stage_idx = ring.stage;
      const KeyValueStage<Cfg>& stage = smem.stages[stage_idx];
      ptx::named_barrier_sync(kWorkerWarps, 256);  // X is there
      Accumulators<Cfg::kTile / 2> out;
      issue_state_product<Cfg, kWorker>(out, stage, smem.state);
      uint32_t masked[kChunk / 16][4], weighted[kChunk / 16][4], rest[kChunk / 16][4];
      mask_scores<T>(masked, scores, along, intra, me);
      if constexpr (kOwns)
        weigh_columns<T, true>(weighted, rest, stage.q, kWorker, token_weights(smem.decay, reverse, rows, me), update,
                               me);
      const float* row_decay = row_weights(along, reverse, rows, me);
      const float upper = inter * undo * row_decay[0], lower = inter * undo * row_decay[8];
      const float lambda_rows = smem.decay.ascending()[rows];
      ptx::wgmma_wait<0>();
      ptx::pin_registers(out);
      if constexpr (kOtherOwns) ptx::named_barrier_arrive(kHasRead + kWorker, 256);
      scale_rows(out, upper, lower);
      if constexpr (kWorker == 0) {
        issue_intra<T>(out, masked, stage.dout);
      } else {
        issue_intra<T>(out, masked, stage.q);
      }
      if constexpr (kOwns) {
        const tile::ColumnsOperand<typename Cfg::TileRows> dout(shared_address(&stage.dout));
#pragma unroll
        for (int i = 0; i < Cfg::kTile / 2; ++i) x[i] *= lambda_rows;
        ptx::pin_registers(x);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k) {
          ptx::wgmma<T, ptx::Major::kMN>(x, weighted[k], dout.step(k), 1);
          ptx::wgmma<T, ptx::Major::kMN>(x, rest[k], dout.step(k), 1);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
      } else {
        ptx::wgmma_wait<0>();
      }
      ptx::pin_registers(out);
      store_out<T>(smem.out[kWorker], out, maps.jobs[kWorker].out, job, item, chunk, is_packed, me);

      // Behind the last chunk the scores are computed once more, unused: products in flight across a branch would be
      // serialised.
      ring.advance();
      const bool has_next = step + 1 < item.num_chunks;
      if (has_next) ptx::mbarrier_wait(shared_address(&smem.full[ring.stage]), ring.parity);
      issue_next_scores(smem.stages[has_next ? ring.stage : stage_idx]);
      ptx::wgmma_wait<1>();
      ptx::pin_registers(x);
      if (has_next) release_stage(smem.empty[stage_idx], 1, me.lane);
      if constexpr (kOwns) ptx::named_barrier_sync(kHasRead + 1 - kWorker, 256);
      undo = round_state();
      ptx::wgmma_wait<0>();
      ptx::pin_registers(scores);
      if (!has_next) release_stage(smem.empty[stage_idx], 1, me.lane);
    }

    if (kOwns && wants_state) {
      const MutableState& leaving = state_job.final;
      float* to = static_cast<float*>(leaving.data) + item.sequence * leaving.stride_s + item.head * leaving.stride_h;
      for_each_owned_element(x, to, leaving.stride_d, leaving.stride_e, kFirstRow, state_job.dim_a, state_job.dim_c, me,
                             [](float& element, float* stored) { *stored = element; });
    }
  }
  if (me.lane == 0) ptx::tma_store_wait();
}

// ---- kernel

// A block walks its items, each a segment of a sequence for one head. Grid: x = blocks of items.
// Two workers in step, each with one gradient and half of the rows of X; chunk i:
//
//   producer   copy(i+1) ...................................................................
//   worker     | barrier | a X(i), mask(i), weigh q(i) | scores c, (weighted q)^T dout | store(i) | scores(i+1) |
//   X(i+1) |
template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    la2_key_value_gradients_sm90_kernel(const __grid_constant__ TrilinearParams p,
                                        const __grid_constant__ TrilinearMaps maps) {
  extern __shared__ __align__(1024) char raw[];
  KeyValueStorage<Cfg>& smem = *reinterpret_cast<KeyValueStorage<Cfg>*>(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Cfg::kStages; ++i) {
      ptx::mbarrier_init(shared_address(&smem.full[i]), 1);
      ptx::mbarrier_init(shared_address(&smem.empty[i]), 4 * Cfg::kWorkers);
    }
    ptx::mbarrier_init(shared_address(&smem.tail), 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  // Whatever is launched behind this kernel and overlaps it finds the states it needs, too.
  if (p.is_cut) ptx::wait_for_previous_kernel();
  ptx::launch_dependents();

  const int role = threadIdx.x / 128;
  if (role == 0) {
    ptx::registers_release<Cfg::kProducerRegisters>();
    if (threadIdx.x < 32) produce<Cfg>(smem, p, maps);
  } else if (role == 1) {
    ptx::registers_acquire<Cfg::kWorkerRegisters>();
    work<Cfg, 0>(smem, p, maps);
  } else {
    ptx::registers_acquire<Cfg::kWorkerRegisters>();
    work<Cfg, 1>(smem, p, maps);
  }
}

}  // namespace la2::sm90
