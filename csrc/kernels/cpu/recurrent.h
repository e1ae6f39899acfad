// One or a few tokens for each row, one after the other: S = lambda S + k v^T, o = scale q^T S. Each state is read once
// and written once, in the order it lies in memory; everything else is small beside that.
//
// A step is the same operations in the same order whoever asks for it, so verify and commit give the bits of as many
// decode steps, with one exception: a bfloat16 state is rounded once a call, behind its last token, where decode steps
// round it once a token.
#pragma once

#include "pool.h"
#include "tiles.h"

namespace la2::cpu {
namespace {

// The axis along which a state is contiguous in the pool: it decides the order of out's sums, of a copy too.
enum class StateOrder { kRows, kColumns, kNone };

template <class S>
struct RecurrentStep {
  using T = typename S::Acc;
  using Element = typename S::Element;
  using State = Plain<T>;
  static constexpr int W = kLanes<T>;

  const T *q, *k, *v;  // [D], [D], [E]
  T* out;              // [E]
  StateView<T> state;  // [D, E]
  StateOrder order;
  int D, E;
  T decay, scale;

  void run() const {
    if (order == StateOrder::kRows) {
      int col = 0;
      for (; col + 4 * W <= E; col += 4 * W) columns<4>(col, false);
      for (; col < E; col += W) columns<1>(col, is_half<T>(col, E));
    } else if (order == StateOrder::kColumns) {
      for (int col = 0; col < E; ++col) transposed_column(col);
    } else {
      for (int col = 0; col < E; ++col) strided_column(col);
    }
  }

 private:
  // kVecs vectors of columns, S in rows of E
  template <int kVecs>
  LA2_INLINE void columns(int col, bool half) const {
    Vec<T> value[kVecs], sum[kVecs];
    for (int n = 0; n < kVecs; ++n) {
      value[n] = load_elements<State>(v + col + n * W, half);
      sum[n] = Vec<T>{};
    }
    for (int row = 0; row < D; ++row) {
      T* s = state.at(row, col);
      LA2_UNROLL
      for (int n = 0; n < kVecs; ++n) {
        const Vec<T> next = decay * load_elements<State>(s + n * W, half) + k[row] * value[n];
        store_elements<State>(s + n * W, next, half);
        sum[n] += q[row] * next;
      }
    }
    for (int n = 0; n < kVecs; ++n) store_elements<State>(out + col + n * W, scale * sum[n], half);
  }

  // One column that is contiguous in memory, S^T in rows of D
  void transposed_column(int col) const {
    T* s = state.at(0, col);
    Vec<T> sum = {};
    for (int row = 0; row < D; row += W) {
      const bool half = is_half<T>(row, D);
      const Vec<T> next = decay * load_elements<State>(s + row, half) + v[col] * load_elements<State>(k + row, half);
      store_elements<State>(s + row, next, half);
      sum += load_elements<State>(q + row, half) * next;
    }
    out[col] = scale * static_cast<T>(sum_lanes(fold_to_double(sum)));
  }

  void strided_column(int col) const {
    T sum = 0;
    for (int row = 0; row < D; ++row) {
      T* s = state.at(row, col);
      *s = decay * *s + k[row] * v[col];
      sum += q[row] * *s;
    }
    out[col] = scale * sum;
  }
};

template <class S>
bool recurrent(const RecurrentParams& p, const Parallel& parallel) {
  using T = typename S::Acc;
  using Element = typename S::Element;
  constexpr int W = kLanes<T>;
  const int D = static_cast<int>(p.dim_k), E = static_cast<int>(p.dim_v);
  const StateOrder order = p.state.stride_e == 1   ? StateOrder::kRows
                           : p.state.stride_d == 1 ? StateOrder::kColumns
                                                   : StateOrder::kNone;
  const bool in_place = p.writes_state && !p.state.is_bf16;  // else on a copy
  const int64_t copied = in_place ? 0 : p.dim_k * p.dim_v;

  auto widen = [](T* x, const Rows& from, int64_t row, int64_t token, int64_t head, int dim) {
    const int64_t at = row * from.stride_b + token * from.stride_n + head * from.stride_h;
    const Element* data = static_cast<const Element*>(from.data) + at;
    for (int i = 0; i < dim; i += W) store(x + i, load_elements<S>(data + i, is_half<T>(i, dim)));
  };
  auto write = [&p, E](const T* x, int64_t row, int64_t token, int64_t head) {
    const int64_t at = row * p.out.stride_b + token * p.out.stride_n + head * p.out.stride_h;
    Element* to = static_cast<Element*>(p.out.data) + at;
    for (int i = 0; i < E; i += W) store_elements<S>(to + i, load(x + i), is_half<T>(i, E));
  };
  auto run = [&](int64_t job, char* memory) {
    const int64_t row = job / p.heads, head = job % p.heads;
    Arena arena(memory);
    T* const q = arena.take<T>(kMaxHeadDim);
    T* const k = arena.take<T>(kMaxHeadDim);
    T* const v = arena.take<T>(kMaxHeadDim);
    T* const out = arena.take<T>(kMaxHeadDim);
    T* const copy = arena.take<T>(copied);

    const int64_t slot = p.state_indices ? integer_at(p.state_indices, p.indices_are_int64, row) : row;
    int64_t count = p.tokens;
    if (p.num_accepted.data)
      count = min_of(max_of<int64_t>(integer_at(p.num_accepted.data, p.num_accepted.is_int64, row), 0), p.tokens);
    if (slot < 0) count = 0;

    const bool copy_in_columns = order == StateOrder::kColumns;
    const PoolSlice<T> slice{p.state, head, D, 0, E, {copy, copy_in_columns ? 1 : E, copy_in_columns ? D : 1}};
    StateView<T> state = slice.copy;
    if (count > 0 && in_place) {
      T* const pool = static_cast<T*>(p.state.data) + slot * p.state.stride_s + head * p.state.stride_h;
      state = {pool, p.state.stride_d, p.state.stride_e};
    } else if (count > 0) {
      slice.load(slot);
    }
    const T decay = static_cast<T>(decay_power<T>(slope_at<T>(p.slope, row, head), 1));
    // Without outputs q is zero: the same step, so the same states to the bit.
    if (!p.q.data)
      for (int i = 0; i < D; i += W) store(q + i, Vec<T>{});
    for (int64_t token = 0; token < count; ++token) {
      if (p.q.data) widen(q, p.q, row, token, head, D);
      widen(k, p.k, row, token, head, D);
      widen(v, p.v, row, token, head, E);
      RecurrentStep<S>{q, k, v, out, state, order, D, E, decay, static_cast<T>(p.scale)}.run();
      if (p.q.data) write(out, row, token, head);
    }
    if (count > 0 && p.writes_state && !in_place) slice.store(slot);
    if (!p.q.data) return;
    for (int i = 0; i < E; i += W) store(out + i, Vec<T>{});
    for (int64_t token = count; token < p.tokens; ++token) write(out, row, token, head);
  };

  constexpr double kCostOfState = 8;  // in multiply-adds of the sweeps, for an element that comes from memory
  const double cost = kCostOfState + 2 * static_cast<double>(p.tokens - 1);
  const double work = cost * static_cast<double>(p.rows * p.heads) * static_cast<double>(p.dim_k * p.dim_v);
  const int64_t scratch = (4 * kMaxHeadDim + copied) * static_cast<int64_t>(sizeof(T));
  return run_jobs(parallel, p.rows * p.heads, work, scratch, run);
}

}  // namespace
}  // namespace la2::cpu
