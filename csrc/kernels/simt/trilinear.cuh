// The trilinear form (trilinear.h) in plain float32 or float64 multiply-adds: every sm_80 and later, nothing rounded
// below the input's own precision.
//
// A block sweeps one segment of one sequence and head for one slice of Dc. Da is walked in tiles of kDims, and one
// pass over a tile does all that needs its part of a and b:
//
//     scores += a_t b_t^T      out += a_t Z_t      Z_t = lambda^C Z_t + b_t^T (weighted c)
//
// so that shared memory does not grow with Da. Z stays in registers from the first chunk to the last; shared
// memory holds a copy of the tile at work, as the operand of a_t Z_t.
//
//     copies    a_t+1 b_t+1 ......   a_t+2 b_t+2 ......              c of the next chunk comes with its first tile
//     compute   | Z_t -> shared | scores, inter, update | ...        then, once a chunk: mask, intra, store
//
// All products share one grid of 8 x 16 threads: 8 along chunk rows or Da, 16 along columns of the slice or of the
// scores. Rows missing from a chunk and dims beyond the operand's are zeros in shared memory and never read.
#pragma once

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include "../../core/decay.h"
#include "element.cuh"
#include "launch.h"
#include "units.cuh"
#include "vec.cuh"

namespace la2::simt {

// ---- config ---------------------------------------------------------------------------------------------------------

template <class T_, int kMaxDimA, bool kStateOnly_>
struct TrilinearConfig {
  using T = T_;
  static constexpr bool kStateOnly = kStateOnly_;  // gather `local` and nothing else
  static constexpr int kVec = 16 / sizeof(T);      // elements of one 16-byte access
  static constexpr int kRowThreads = 8, kColThreads = 16;
  static constexpr int kThreads = kRowThreads * kColThreads;
  static constexpr int kSlice = slice_dim(sizeof(T) == 8);
  static constexpr int kDims = 16 * kVec;  // of Da in one tile
  static constexpr int kTiles = kMaxDimA / kDims;
  static constexpr int kRows = kChunk / kRowThreads;             // chunk rows of a thread
  static constexpr int kScores = kChunk / kColThreads;           // score columns of a thread
  static constexpr int kStateVecs = kDims / kVec / kRowThreads;  // groups of kVec rows of Z_t of a thread
  // Three blocks of 128 threads share the registers and the shared memory of an SM; a state of 256 rows takes 128
  // registers a thread alone and leaves room for two.
  static constexpr int kBlocksPerSm = kMaxDimA > 128 ? 2 : 3;
  static_assert(kSlice == kColThreads * kVec && kMaxDimA % kDims == 0 && kChunk <= kThreads);
};

// A [rows, cols] part of an operand, its rows `stride` apart.
template <class T>
struct Operand {
  T* data;
  int64_t stride;
  bool is_vector;  // every row starts at a multiple of 16 bytes
};

// What the block does.
template <class T>
struct Work {
  Unit unit;
  int64_t unit_idx, head, num_chunks;
  int32_t slice, first_col, cols;  // columns [first_col, first_col + cols) of Dc
  Operand<const T> a, b, c, x;     // from the unit's first row on; c, x, out from first_col on
  Operand<T> out;
  T slope;
};

// Pitches are odd multiples of 16 bytes where a warp reads several rows at once.
template <class Cfg>
struct SharedStorage {
  using T = typename Cfg::T;
  Work<T> work;                                        // here and not in registers: the state needs those
  alignas(16) T a[2][kChunk][Cfg::kDims + Cfg::kVec];  // two stages
  alignas(16) T b[2][kChunk][Cfg::kDims + Cfg::kVec];
  alignas(16) T c[2][kChunk][Cfg::kSlice];           // by the chunk's parity
  alignas(16) T z[Cfg::kDims][Cfg::kSlice + 4];      // the state tile at work, as it entered the chunk
  alignas(16) T scores[kChunk][kChunk + Cfg::kVec];  // intra lambda^|i-j| (a_i . b_j), zero off the triangle
  alignas(16) T update_weight[kChunk];               // factor of b_j c_j^T
  T power[kChunk + 1];                               // lambda^n
  T score_weight[2 * kChunk - 1];                    // [kChunk - 1 + i - j]: factor of (a_i . b_j) c_j in out_i
  T dots[Cfg::kThreads / 32][3];                     // one row a warp
};

// Which rows and columns are this thread's. Lane bits alternate between columns and rows (c r c r c): lane pairs at
// distance 1 then read the same row operand, at distance 2 the same column operand, which 16-byte reads need to
// be served as broadcasts.
struct ThreadCoord {
  int row;  // 0..7:  rows row + 8 m of the chunk; rows (row + 8 n) kVec + w of a state tile
  int col;  // 0..15: columns col kVec + e of the slice; columns col + 16 n of the scores
  __device__ ThreadCoord() {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    row = (lane >> 1 & 1) | (lane >> 3 & 1) << 1 | (warp & 1) << 2;
    col = (lane & 1) | (lane >> 2 & 1) << 1 | (lane >> 4) << 2 | (warp >> 1) << 3;
  }
};

template <class Cfg>
struct Registers {
  using T = typename Cfg::T;
  using StateTile = T[Cfg::kStateVecs][Cfg::kVec][Cfg::kVec];
  using Rows = T[Cfg::kRows][Cfg::kVec];
  using Scores = T[Cfg::kRows][Cfg::kScores];
};

// ---- global memory <-> tiles ----------------------------------------------------------------------------------------

// Rows from the unit's first on, columns from first_col on (a multiple of 16 bytes).
template <class T, class AnyRows>
__device__ Operand<T> operand_of(const AnyRows& rows, const Unit& unit, int64_t head, int first_col) {
  constexpr int kVec = 16 / sizeof(T);
  T* data = first_row<T>(rows, unit, head, first_col);
  const bool is_vector = ((rows.stride_b | rows.stride_h | rows.stride_n) & (kVec - 1)) == 0 &&
                         (reinterpret_cast<uintptr_t>(rows.data) & 15) == 0;
  return {data, rows.stride_n, is_vector};
}

// Called by whole warps: find_unit. False: nothing to do.
template <class Cfg>
__device__ bool find_work(Work<typename Cfg::T>& shared_work, const TrilinearParams& params, const TrilinearJob& job,
                          int max_slices) {
  using T = typename Cfg::T;
  Work<T> work;
  const unsigned heads = static_cast<unsigned>(params.sizes.heads);  // 32-bit, since the grid is
  work.slice = blockIdx.x % static_cast<unsigned>(max_slices);
  work.head = blockIdx.x / static_cast<unsigned>(max_slices) % heads;
  work.unit_idx = blockIdx.x / static_cast<unsigned>(max_slices) / heads;
  work.first_col = work.slice * Cfg::kSlice;
  work.cols = min(job.dim_c - work.first_col, Cfg::kSlice);
  const Unit unit = find_unit(params, work.unit_idx);
  if (!unit.valid || work.cols <= 0 || (Cfg::kStateOnly && !params.states_alone && ends_sweep(unit, job.reverse)))
    return false;

  work.unit = unit;
  work.num_chunks = (unit.length + kChunk - 1) / kChunk;
  work.a = operand_of<const T>(job.a, unit, work.head, 0);
  work.b = operand_of<const T>(job.b, unit, work.head, 0);
  work.c = operand_of<const T>(job.c, unit, work.head, work.first_col);
  work.x = operand_of<const T>(job.x, unit, work.head, work.first_col);
  work.out = operand_of<T>(job.out, unit, work.head, work.first_col);
  work.slope = slope_of<T>(params, unit.sequence, work.head);
  if (threadIdx.x % 32 == 0) shared_work = work;
  return true;
}

template <int kThreads, int kTileCols, int kWidth, class T, int kPitch>
__device__ __forceinline__ void copy_rows_by(T (&tile)[kChunk][kPitch], const T* from, int64_t stride, int rows,
                                             int cols) {
  constexpr int kUnits = kTileCols / kWidth;
  static_assert(kThreads % kUnits == 0);
  const int col = threadIdx.x % kUnits * kWidth;
  const bool in_cols = col < cols;
  // Not unrolled: the copies are asynchronous, and a loop holds no more than one address in registers.
#pragma unroll 1
  for (int row = threadIdx.x / kUnits; row < kChunk; row += kThreads / kUnits) {
    const bool inside = in_cols && row < rows;
    __pipeline_memcpy_async(&tile[row][col], inside ? from + row * stride + col : from, kWidth * sizeof(T),
                            inside ? 0 : kWidth * sizeof(T));
  }
}

// Starts the copy of `rows` rows, of which the operand has `cols` columns left; the rest of the tile becomes zero.
template <class Cfg, int kTileCols, class T, int kPitch>
__device__ __forceinline__ void copy_rows_async(T (&tile)[kChunk][kPitch], const Operand<const T>& operand,
                                                int64_t first_row, int first_col, int rows, int cols) {
  const T* from = operand.data + first_row * operand.stride + first_col;
  if (operand.is_vector) {
    copy_rows_by<Cfg::kThreads, kTileCols, Cfg::kVec>(tile, from, operand.stride, rows, cols);
  } else {
    copy_rows_by<Cfg::kThreads, kTileCols, 1>(tile, from, operand.stride, rows, cols);
  }
}

// f(element of Z, its place in a state) for every element of this thread that exists: dims rows, cols columns of the
// slice, whose first element is at `state`. One pointer walks down the rows: 64-bit offsets of every row, which the
// compiler would rather keep, do not fit beside Z.
template <class Cfg, class Stored, class F>
__device__ __forceinline__ void for_each_state_element(typename Registers<Cfg>::StateTile (&z)[Cfg::kTiles],
                                                       const ThreadCoord& me, int dims, int cols, Stored* state,
                                                       int64_t stride_d, int64_t stride_e, F&& f) {
  if (me.col * Cfg::kVec >= cols) return;
  Stored* place = state + me.row * Cfg::kVec * stride_d + me.col * Cfg::kVec * stride_e;
#pragma unroll
  for (int t = 0; t < Cfg::kTiles; ++t) {
#pragma unroll
    for (int n = 0; n < Cfg::kStateVecs; ++n) {
      const int dim = t * Cfg::kDims + (me.row + n * Cfg::kRowThreads) * Cfg::kVec;
      if (dim >= dims) return;  // dims is a multiple of 8, hence of kVec
#pragma unroll
      for (int w = 0; w < Cfg::kVec; ++w) {
#pragma unroll
        for (int e = 0; e < Cfg::kVec; ++e) f(z[t][n][w][e], place[e * stride_e]);
        place += stride_d;
      }
      place += (Cfg::kRowThreads - 1) * Cfg::kVec * stride_d;
    }
  }
}

// ---- mainloop: the steps of one chunk -------------------------------------------------------------------------------

template <class Cfg>
__device__ __forceinline__ void store_state_tile(SharedStorage<Cfg>& shared,
                                                 const typename Registers<Cfg>::StateTile& z, const ThreadCoord& me) {
  using T = typename Cfg::T;
#pragma unroll
  for (int n = 0; n < Cfg::kStateVecs; ++n) {
#pragma unroll
    for (int w = 0; w < Cfg::kVec; ++w) {
      Vec<T> row;
#pragma unroll
      for (int e = 0; e < Cfg::kVec; ++e) row.x[e] = z[n][w][e];
      const int dim = (me.row + n * Cfg::kRowThreads) * Cfg::kVec + w;
      store_vec(&shared.z[dim][me.col * Cfg::kVec], row);
    }
  }
}

// scores_ij += a_i . b_j  and  out_i += a_i Z  over the dims of one tile.
template <class Cfg>
__device__ __forceinline__ void add_scores_and_inter(typename Registers<Cfg>::Scores& scores,
                                                     typename Registers<Cfg>::Rows& out,
                                                     const SharedStorage<Cfg>& shared, int stage,
                                                     const ThreadCoord& me) {
  using T = typename Cfg::T;
#pragma unroll 2
  for (int d = 0; d < Cfg::kDims; d += Cfg::kVec) {
    Vec<T> a[Cfg::kRows];
#pragma unroll
    for (int m = 0; m < Cfg::kRows; ++m) a[m] = load_vec(&shared.a[stage][me.row + m * Cfg::kRowThreads][d]);
#pragma unroll
    for (int n = 0; n < Cfg::kScores; ++n) {
      const Vec<T> b = load_vec(&shared.b[stage][me.col + n * Cfg::kColThreads][d]);
#pragma unroll
      for (int w = 0; w < Cfg::kVec; ++w) {
#pragma unroll
        for (int m = 0; m < Cfg::kRows; ++m) scores[m][n] += a[m].x[w] * b.x[w];
      }
    }
#pragma unroll
    for (int w = 0; w < Cfg::kVec; ++w) {
      const Vec<T> z = load_vec(&shared.z[d + w][me.col * Cfg::kVec]);
#pragma unroll
      for (int m = 0; m < Cfg::kRows; ++m) {
#pragma unroll
        for (int e = 0; e < Cfg::kVec; ++e) out[m][e] += a[m].x[w] * z.x[e];
      }
    }
  }
}

// Z = decay Z + sum_j weight_j b_j c_j^T  for one tile. The sum starts from zero: added one by one to a state that has
// grown, its terms would lose more.
template <class Cfg>
__device__ __forceinline__ void update_state(typename Registers<Cfg>::StateTile& z, typename Cfg::T decay,
                                             const SharedStorage<Cfg>& shared, int stage, int parity,
                                             const ThreadCoord& me) {
  using T = typename Cfg::T;
  // With more than one tile of state there are registers for one part of the sums at a time.
  constexpr int kAtOnce = Cfg::kTiles > 1 ? 1 : Cfg::kStateVecs;
#pragma unroll
  for (int part = 0; part < Cfg::kStateVecs; part += kAtOnce) {
    T sum[kAtOnce][Cfg::kVec][Cfg::kVec] = {};
#pragma unroll 2
    for (int first = 0; first < kChunk; first += Cfg::kVec) {
      const Vec<T> weight = load_vec(&shared.update_weight[first]);
#pragma unroll
      for (int i = 0; i < Cfg::kVec; ++i) {
        const int j = first + i;
        Vec<T> c = load_vec(&shared.c[parity][j][me.col * Cfg::kVec]);
#pragma unroll
        for (int e = 0; e < Cfg::kVec; ++e) c.x[e] *= weight.x[i];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          const Vec<T> b = load_vec(&shared.b[stage][j][(me.row + (part + n) * Cfg::kRowThreads) * Cfg::kVec]);
#pragma unroll
          for (int w = 0; w < Cfg::kVec; ++w) {
#pragma unroll
            for (int e = 0; e < Cfg::kVec; ++e) sum[n][w][e] += b.x[w] * c.x[e];
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
#pragma unroll
      for (int w = 0; w < Cfg::kVec; ++w) {
#pragma unroll
        for (int e = 0; e < Cfg::kVec; ++e) z[part + n][w][e] = decay * z[part + n][w][e] + sum[n][w][e];
      }
    }
  }
}

// To shared memory: scores with their factor, zero off the triangle.
template <class Cfg>
__device__ __forceinline__ void store_masked_scores(SharedStorage<Cfg>& shared,
                                                    const typename Registers<Cfg>::Scores& scores,
                                                    const ThreadCoord& me) {
#pragma unroll
  for (int m = 0; m < Cfg::kRows; ++m) {
#pragma unroll
    for (int n = 0; n < Cfg::kScores; ++n) {
      const int i = me.row + m * Cfg::kRowThreads, j = me.col + n * Cfg::kColThreads;
      shared.scores[i][j] = shared.score_weight[kChunk - 1 + i - j] * scores[m][n];
    }
  }
}

// out_i += sum_j scores_ij c_j; weighted by the lag i - j as well where kLagged.
template <class Cfg, bool kLagged>
__device__ __forceinline__ void add_intra(typename Registers<Cfg>::Rows& out, const SharedStorage<Cfg>& shared,
                                          int parity, const ThreadCoord& me) {
  using T = typename Cfg::T;
#pragma unroll 2
  for (int first = 0; first < kChunk; first += Cfg::kVec) {
    Vec<T> scores[Cfg::kRows];
#pragma unroll
    for (int m = 0; m < Cfg::kRows; ++m) scores[m] = load_vec(&shared.scores[me.row + m * Cfg::kRowThreads][first]);
#pragma unroll
    for (int i = 0; i < Cfg::kVec; ++i) {
      const Vec<T> c = load_vec(&shared.c[parity][first + i][me.col * Cfg::kVec]);
#pragma unroll
      for (int m = 0; m < Cfg::kRows; ++m) {
        T score = scores[m].x[i];
        if (kLagged) score *= static_cast<T>(me.row + m * Cfg::kRowThreads - first - i);
#pragma unroll
        for (int e = 0; e < Cfg::kVec; ++e) out[m][e] += score * c.x[e];
      }
    }
  }
}

// ---- epilogue of a chunk --------------------------------------------------------------------------------------------

// This thread's part of out_i . x_i; zero for a row the chunk does not have.
template <class Cfg>
__device__ __forceinline__ typename Cfg::T dot_with_row(const typename Cfg::T (&out)[Cfg::kVec],
                                                        const Operand<const typename Cfg::T>& x, int64_t first_row,
                                                        int i, int rows, int cols, const ThreadCoord& me) {
  const int col = me.col * Cfg::kVec;
  typename Cfg::T sum = 0;
  if (i < rows && col < cols) {
    const typename Cfg::T* from = x.data + (first_row + i) * x.stride + col;
#pragma unroll
    for (int e = 0; e < Cfg::kVec; ++e) sum += out[e] * from[e];
  }
  return sum;
}

template <class Cfg>
__device__ __forceinline__ void store_rows(const Operand<typename Cfg::T>& operand,
                                           const typename Registers<Cfg>::Rows& out, int64_t first_row, int rows,
                                           int cols, const ThreadCoord& me) {
  using T = typename Cfg::T;
  const int col = me.col * Cfg::kVec;
  if (col >= cols) return;
#pragma unroll
  for (int m = 0; m < Cfg::kRows; ++m) {
    const int i = me.row + m * Cfg::kRowThreads;
    if (i >= rows) return;
    T* to = operand.data + (first_row + i) * operand.stride + col;
    if (operand.is_vector) {
      Vec<T> row;
#pragma unroll
      for (int e = 0; e < Cfg::kVec; ++e) row.x[e] = out[m][e];
      store_global(to, row);
    } else {
#pragma unroll
      for (int e = 0; e < Cfg::kVec; ++e) to[e] = out[m][e];
    }
  }
}

// Sums the three numbers over the block, in a fixed order, and writes them to `to`.
template <class Cfg>
__device__ __forceinline__ void store_dots(typename Cfg::T* to, typename Cfg::T (&dots)[3],
                                           SharedStorage<Cfg>& shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      dots[i] += __shfl_xor_sync(0xffffffffu, dots[i], distance);
    }
    if (lane == 0) shared.dots[warp][i] = dots[i];
  }
  __syncthreads();
  if (threadIdx.x < 3) {
    typename Cfg::T sum = 0;
    for (int w = 0; w < Cfg::kThreads / 32; ++w) sum += shared.dots[w][threadIdx.x];
    to[threadIdx.x] = sum;
  }
}

// ---- kernel ---------------------------------------------------------------------------------------------------------

// Grid: x = slices x heads x units, slices fastest, so that the blocks sharing a and b run together; y = jobs.
// max_slices: of the job with the widest Dc.
template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, Cfg::kBlocksPerSm)
    la2_trilinear_simt_kernel(const __grid_constant__ TrilinearParams params, int max_slices) {
  using T = typename Cfg::T;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  SharedStorage<Cfg>& shared = *reinterpret_cast<SharedStorage<Cfg>*>(shared_bytes);

  const TrilinearJob& job = params.jobs[blockIdx.y];
  const bool reverse = job.reverse;
  bool has_work = true;
  if (threadIdx.x < 32) has_work = find_work<Cfg>(shared.work, params, job, max_slices);
  if (!__syncthreads_and(has_work)) return;
  const Work<T>& work = shared.work;
  const Unit& unit = work.unit;
  const ThreadCoord me;
  if (threadIdx.x <= kChunk) shared.power[threadIdx.x] = static_cast<T>(decay_power<T>(work.slope, threadIdx.x));
  __syncthreads();
  if (threadIdx.x < 2 * kChunk - 1) {  // on the triangle j <= i (reverse: j >= i), zero elsewhere
    const int i_minus_j = static_cast<int>(threadIdx.x) - (kChunk - 1);
    const int lag = reverse ? -i_minus_j : i_minus_j;
    shared.score_weight[threadIdx.x] = lag < 0 ? T(0) : static_cast<T>(job.intra) * shared.power[lag];
  }

  auto first_row_of = [&](int64_t step) { return (reverse ? work.num_chunks - 1 - step : step) * kChunk; };
  auto rows_of = [&](int64_t first_row) {
    return static_cast<int>(min(unit.length - first_row, static_cast<int64_t>(kChunk)));
  };

  // Starts the copies of one tile of a and b, with the chunk's first tile also those of its c.
  auto fetch = [&](int64_t step, int tile, int stage) {
    const int64_t first_row = first_row_of(step);
    const int rows = rows_of(first_row);
    const int first_dim = tile * Cfg::kDims;
    const int dims = job.dim_a - first_dim;
    if (!Cfg::kStateOnly) copy_rows_async<Cfg, Cfg::kDims>(shared.a[stage], work.a, first_row, first_dim, rows, dims);
    copy_rows_async<Cfg, Cfg::kDims>(shared.b[stage], work.b, first_row, first_dim, rows, dims);
    if (tile == 0) copy_rows_async<Cfg, Cfg::kSlice>(shared.c[step & 1], work.c, first_row, 0, rows, work.cols);
    __pipeline_commit();
  };
  if (work.num_chunks > 0) fetch(0, 0, 0);

  // Z as it enters the segment.
  typename Registers<Cfg>::StateTile z[Cfg::kTiles] = {};
  if (!Cfg::kStateOnly || params.states_alone) {
    const bool cut = params.is_cut;
    const void* data = cut ? job.local.data : job.initial.data;
    const State s =
        cut ? State{data, job.local.stride_s, job.local.stride_h, job.local.stride_d, job.local.stride_e} : job.initial;
    const int64_t slot = cut ? work.unit_idx : slot_of(s, unit.state);
    if (data != nullptr && slot >= 0) {
      const int64_t offset = slot * s.stride_s + work.head * s.stride_h + work.first_col * s.stride_e;
      with_state_type<T>(s.is_bf16, [&](auto stored) {
        using Stored = decltype(stored);
        for_each_state_element<Cfg>(z, me, job.dim_a, work.cols, static_cast<const Stored*>(s.data) + offset,
                                    s.stride_d, s.stride_e,
                                    [&](T& element, const Stored& place) { element = to_acc(place); });
      });
    }
  }

  int stage = 0;
  for (int64_t step = 0; step < work.num_chunks; ++step) {
    const int64_t first_row = first_row_of(step);
    const int rows = rows_of(first_row);  // the chunk's own C
    const int parity = static_cast<int>(step & 1);
    typename Registers<Cfg>::Scores scores = {};
    typename Registers<Cfg>::Rows out = {};

#pragma unroll
    for (int t = 0; t < Cfg::kTiles; ++t) {
      if (t * Cfg::kDims < job.dim_a) {
        __pipeline_wait_prior(0);
        __syncthreads();  // this tile is there; nobody reads the other stage, Z_t-1 or the last chunk's scores any more
        const bool is_last_tile = (t + 1) * Cfg::kDims >= job.dim_a;
        if (!is_last_tile) {
          fetch(step, t + 1, stage ^ 1);
        } else if (step + 1 < work.num_chunks) {
          fetch(step + 1, 0, stage ^ 1);
        }
        if (t == 0 && threadIdx.x < kChunk) {  // beyond the chunk's rows b and c are zero: any weight will do
          const int j = threadIdx.x;
          shared.update_weight[j] = static_cast<T>(job.update) * shared.power[reverse ? j + 1 : max(rows - 1 - j, 0)];
        }
        if (!Cfg::kStateOnly) store_state_tile<Cfg>(shared, z[t], me);
        if (!Cfg::kStateOnly || t == 0) __syncthreads();
        if (!Cfg::kStateOnly) add_scores_and_inter<Cfg>(scores, out, shared, stage, me);
        update_state<Cfg>(z[t], shared.power[rows], shared, stage, parity, me);
        stage ^= 1;
      }
    }

    if (!Cfg::kStateOnly) {
      T dots[3] = {};
#pragma unroll
      for (int m = 0; m < Cfg::kRows; ++m) {
        const int i = me.row + m * Cfg::kRowThreads;
        const int age = reverse ? max(rows - 1 - i, 0) : i + 1;  // tokens since Z
        const T weight = static_cast<T>(job.inter) * shared.power[age];
#pragma unroll
        for (int e = 0; e < Cfg::kVec; ++e) out[m][e] *= weight;
        if (job.dots != nullptr) {
          const T x_out = dot_with_row<Cfg>(out[m], work.x, first_row, i, rows, work.cols, me);
          dots[0] += x_out;
          dots[1] += static_cast<T>(age) * x_out;
        }
      }

      store_masked_scores<Cfg>(shared, scores, me);
      __syncthreads();
      add_intra<Cfg, false>(out, shared, parity, me);
      store_rows<Cfg>(work.out, out, first_row, rows, work.cols, me);

      if (job.dots != nullptr) {
        if (!reverse) {
          typename Registers<Cfg>::Rows lagged = {};
          add_intra<Cfg, true>(lagged, shared, parity, me);
#pragma unroll
          for (int m = 0; m < Cfg::kRows; ++m) {
            const int i = me.row + m * Cfg::kRowThreads;
            dots[2] += dot_with_row<Cfg>(lagged[m], work.x, first_row, i, rows, work.cols, me);
          }
        }
        const int64_t slot = first_slot_of_unit(unit, params.segment_len, kChunk) + first_row / kChunk;
        const int num_slices = (job.dim_c + Cfg::kSlice - 1) / Cfg::kSlice;
        store_dots<Cfg>(
            static_cast<T*>(job.dots) + ((slot * params.sizes.heads + work.head) * num_slices + work.slice) * 3, dots,
            shared);
      }
    }
  }

  const bool to_local = Cfg::kStateOnly && !params.states_alone;
  const MutableState& leaving = to_local ? job.local : job.final;
  if (leaving.data != nullptr && (to_local || ends_sweep(unit, reverse))) {
    const int64_t slot = to_local ? work.unit_idx : slot_of(leaving, unit.state);
    if (slot < 0) return;
    const int64_t offset = slot * leaving.stride_s + work.head * leaving.stride_h + work.first_col * leaving.stride_e;
    with_state_type<T>(leaving.is_bf16, [&](auto stored) {
      using Stored = decltype(stored);
      for_each_state_element<Cfg>(z, me, job.dim_a, work.cols, static_cast<Stored*>(leaving.data) + offset,
                                  leaving.stride_d, leaving.stride_e,
                                  [&](const T& element, Stored& place) { from_acc(place, element); });
    });
  }
}

}  // namespace la2::simt
