// One token for each row: S = lambda S + k v^T in place, o = scale q^T S. Each state is read once and written
// once, in the order it lies in memory; everything else is small beside that.
#pragma once

#include "tiles.h"

namespace la2::cpu {
namespace {

template <class S>
struct DecodeStep {
  using T = typename S::Acc;
  using Element = typename S::Element;
  using State = Plain<T>;
  static constexpr int W = kLanes<T>;

  const T *q, *k, *v;  // [D], [D], [E]
  T* out;              // [E]
  StateView<T> state;  // [D, E]
  int D, E;
  T decay, scale;

  void run() const {
    if (state.stride_col == 1) {
      int col = 0;
      for (; col + 4 * W <= E; col += 4 * W) columns<4>(col, false);
      for (; col < E; col += W) columns<1>(col, is_half<T>(col, E));
    } else if (state.stride_row == 1) {
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
bool decode(const DecodeParams& p, const Parallel& parallel) {
  using T = typename S::Acc;
  using Element = typename S::Element;
  constexpr int W = kLanes<T>;
  const int D = static_cast<int>(p.dim_k), E = static_cast<int>(p.dim_v);

  auto widen = [](T* x, const Rows& from, int64_t row, int64_t head, int dim) {
    const Element* data = static_cast<const Element*>(from.data) + row * from.stride_b + head * from.stride_h;
    for (int i = 0; i < dim; i += W) store(x + i, load_elements<S>(data + i, is_half<T>(i, dim)));
  };
  auto step = [&](int64_t job, char* memory) {
    const int64_t row = job / p.heads, head = job % p.heads;
    Arena arena(memory);
    T* const q = arena.take<T>(kMaxHeadDim);
    T* const k = arena.take<T>(kMaxHeadDim);
    T* const v = arena.take<T>(kMaxHeadDim);
    T* const out = arena.take<T>(kMaxHeadDim);

    const int64_t slot = p.state_indices ? integer_at(p.state_indices, p.indices_are_int64, row) : row;
    if (slot < 0) {
      for (int i = 0; i < E; ++i) out[i] = 0;
    } else {
      widen(q, p.q, row, head, D);
      widen(k, p.k, row, head, D);
      widen(v, p.v, row, head, E);
      T* const state = static_cast<T*>(p.state.data) + slot * p.state.stride_s + head * p.state.stride_h;
      DecodeStep<S>{q,
                    k,
                    v,
                    out,
                    {state, p.state.stride_d, p.state.stride_e},
                    D,
                    E,
                    static_cast<T>(decay_power<T>(slope_at<T>(p.slope, row, head), 1)),
                    static_cast<T>(p.scale)}
          .run();
    }
    Element* to = static_cast<Element*>(p.out.data) + row * p.out.stride_b + head * p.out.stride_h;
    for (int i = 0; i < E; i += W) store_elements<S>(to + i, load(out + i), is_half<T>(i, E));
  };

  constexpr double kCostOfState = 8;  // in multiply-adds of the sweeps, for an element that comes from memory
  const double work = kCostOfState * static_cast<double>(p.rows * p.heads) * static_cast<double>(p.dim_k * p.dim_v);
  return run_jobs(parallel, p.rows * p.heads, work, 4 * kMaxHeadDim * static_cast<int64_t>(sizeof(T)), step);
}

}  // namespace
}  // namespace la2::cpu
