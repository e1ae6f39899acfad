// The forward sweep: out = scale T(a, b, c), T(a, b, c)_i = sum_{j <= i} lambda^(i-j) (a_i . b_j) c_j, over one
// sequence and head, chunk by chunk with the state Z = sum lambda^(..) b_j c_j^T [dim_a, dim_c] in scratch.
// The forward pass is T(q, k, v) with Z = S; dq is T(grad_out, v, k) with Z = S^T.
#pragma once

#include "tiles.h"

namespace la2::cpu {
namespace {

template <class S>
struct ForwardScratch {
  using T = typename S::Acc;
  Decay<T> decay;
  Panels<T> a_t;          // [dim_a, C]
  Panels<T> b;            // [C, dim_a]
  Panels<T> c;            // [C, dim_c]
  CarriedState<T> state;  // [dim_a, dim_c]
  T* scores;              // [C, C], row j, column i: scale lambda^(i-j) a_i . b_j
  Panels<T> aged;         // [dim_a, dim_c], only for the slope gradient

  ForwardScratch(Arena& arena, int dim_a, int dim_c, bool has_slope_terms)
      : decay(arena),
        a_t(take_panels<T>(arena, dim_a, kChunk)),
        b(take_panels<T>(arena, kChunk, dim_a)),
        c(take_panels<T>(arena, kChunk, dim_c)),
        state(take_state<T>(arena, dim_a, dim_c)),
        scores(arena.take<T>(kChunk * kChunk)),
        aged(take_panels<T>(arena, has_slope_terms ? dim_a : 0, dim_c)) {}

  static int64_t bytes(int dim_a, int dim_c, bool has_slope_terms) {
    Arena counter;
    ForwardScratch(counter, dim_a, dim_c, has_slope_terms);
    return counter.bytes();
  }
};

template <class S>
struct ForwardSweep {
  using T = typename S::Acc;
  using Element = typename S::Element;
  using Scratch = ForwardScratch<S>;

  SeqRows<const Element> a, b;  // [N, dim_a]
  SeqRows<const Element> c;     // [N, dim_c]
  SeqRows<Element> out;         // [N, dim_c]; no data: the state alone is wanted
  int64_t length;               // N, of this sequence
  int dim_a, dim_c;
  double slope, scale;
  StateView<const T> initial;  // [dim_a, dim_c]
  StateView<T> final;
  // In the sweep that makes dq, if the slope gradient is wanted (see backward.h):
  double* slope_terms;            // one for each panel of dim_c, or nullptr
  SeqRows<const Element> q;       // [N, dim_c]
  StateView<const T> grad_final;  // [dim_a, dim_c]

  void run(char* memory) const {
    Arena arena(memory);
    const Scratch x(arena, dim_a, dim_c, slope_terms);
    x.decay.fill(slope, scale, static_cast<int>(min_of<int64_t>(length, kChunk)));
    load_state(x.state, initial, dim_c);
    if (slope_terms) clear(x.aged);

    Prefetcher next;
    next.add(a, dim_a);
    next.add(b, dim_a);
    next.add(c, dim_c);
    if (out.data) next.add(out, dim_c);
    const int steps = (kChunk + dim_a) / kTileRows * panel_count<T>(dim_c);

    for (int64_t start = 0; start < length; start += kChunk) {
      const int rows = static_cast<int>(min_of<int64_t>(length - start, kChunk));
      load_transposed<S>(x.a_t, a.from(start), rows, dim_a);
      load_rows<S>(x.b, b.from(start), rows, dim_a);
      load_rows<S>(x.c, c.from(start), rows, dim_c);
      next.begin(start + rows, min_of(start + rows + kChunk, length), steps);
      if (out.data) outputs(x, start, rows, next);
      if (slope_terms) age(x, rows);
      if (start + rows < length || final.data) update_state(x, rows, next);
    }
    if (slope_terms && grad_final.data) add_final_terms(x);
    if (final.data) store_state(final, x.state.value, 0, dim_c);
  }

 private:
  void outputs(const Scratch& x, int64_t start, int rows, Prefetcher& next) const {
    scores(x, rows, next);
    for_each_tile<T>(0, x.c.cols, [&](auto width, int col) {
      RowDots<S> dots;
      for (int row = 0; row < rows; row += kTileRows) {
        next.step();
        if (slope_terms) {
          auto o = zero_tile<T>(width);
          inter(o, x, x.aged, row, col);
          dots.add(o, q.from(start + row), rows - row, col, dim_c, 1, 0);
        }
        auto o = zero_tile<T>(width);
        inter(o, x, x.state.value, row, col);
        if (slope_terms) dots.add(o, q.from(start + row), rows - row, col, dim_c, row + 1, 1);
        intra(o, x, row, rows, col);
        store_rows<S>(o, out.from(start + row), rows - row, col, dim_c);
      }
      if (slope_terms) slope_terms[col / Panels<T>::kWidth] += dots.sum();
    });
  }

  // scores = (A B^T . M)^T scale, in the tiles that touch i >= j
  static void scores(const Scratch& x, int rows, Prefetcher& next) {
    for (int j = 0; j < rows; j += kTileRows) {
      for_each_tile<T>(j / kLanes<T> * kLanes<T>, round_up(rows, kLanes<T>), [&](auto width, int i) {
        next.step();
        auto p = zero_tile<T>(width);
        add_product(p, x.b, j, x.a_t, i);
        multiply(p, x.decay.scaled(i - j), -1);
        store_tile(p, x.scores + j * kChunk + i, kChunk);
      });
    }
  }

  // o = scale diag(lambda^r) A Z
  template <int kVecs>
  static LA2_INLINE void inter(Tile<T, kVecs>& o, const Scratch& x, const Panels<T>& state, int row, int col) {
    add_product_transposed(o, x.a_t, row, state, col, 0, state.rows);
    scale_rows(o, x.decay.scaled(row + 1), 1);
  }

  // o += scale (A B^T . M) C
  template <int kVecs>
  static LA2_INLINE void intra(Tile<T, kVecs>& o, const Scratch& x, int row, int rows, int col) {
    const int pitch = x.c.pitch(col);
    const T* p = x.scores + row;
    add_product_transposed(o, p, kChunk, x.c.at(0, col), pitch, row);
    add_triangle_transposed<true>(o, p + row * kChunk, kChunk, x.c.at(row, col), pitch, rows - row);
  }

  // Z = lambda^C Z + (diag(lambda^(C-r)) B)^T C. Nothing reads b after this.
  static void update_state(const Scratch& x, int rows, Prefetcher& next) {
    scale_rows(x.b, rows, x.decay.power(rows - 1), -1);
    accumulate(x.state, x.decay.factor(rows), x.b, x.c, rows, 0, x.c.cols, next);
  }

  // R = lambda^C (R + C Z)
  static void age(const Scratch& x, int rows) {
    const Factor<T> decay = x.decay.factor(rows);
    const T tokens = static_cast<T>(rows);
    for (int i = 0; i < x.aged.rows * x.aged.cols; i += kLanes<T>) {
      const Vec<T> older = load(x.aged.data + i) + tokens * load(x.state.value.data + i);
      store(x.aged.data + i, decay.high * older + decay.low * older);
    }
  }

  // <R, grad_final_state>
  void add_final_terms(const Scratch& x) const {
    for (int col = 0; col < dim_c; ++col) {
      double sum = 0;
      for (int row = 0; row < dim_a; ++row)
        sum += static_cast<double>(*x.aged.at(row, col)) * static_cast<double>(*grad_final.at(row, col));
      slope_terms[col / Panels<T>::kWidth] += sum;
    }
  }
};

template <class S>
bool forward(const ForwardParams& p, const Parallel& parallel) {
  using T = typename S::Acc;
  using Element = typename S::Element;
  const int D = static_cast<int>(p.sizes.dim_k), E = static_cast<int>(p.sizes.dim_v);
  const int64_t heads = p.sizes.heads;
  const int panels = panel_count<T>(E);
  const Slices slices(p.sizes.num_seqs * heads, panels, parallel.num_threads);

  auto sweep = [&](int64_t job, char* memory) {
    const int64_t task = job / slices.count, slice = job % slices.count;
    const int first = slices.begin(slice, panels) * Panels<T>::kWidth;
    const int last = min_of(E, slices.end(slice, panels) * Panels<T>::kWidth);
    const Span span(p.sizes, p.cu_seqlens, task / heads, task % heads);
    ForwardSweep<S> x = {};
    x.a = span.rows<Element>(p.q);
    x.b = span.rows<Element>(p.k);
    x.c = span.rows<Element>(p.v).columns(first);
    x.out = span.rows<Element>(p.out).columns(first);
    x.length = span.length;
    x.dim_a = D;
    x.dim_c = last - first;
    x.slope = span.slope<T>(p.slope);
    x.scale = p.scale;
    x.initial = span.state<T>(p.initial_state).columns(first);
    x.final = span.state<T>(p.final_state).columns(first);
    x.run(memory);
  };
  expect_writes<Element>(p.out, p.sizes, E);
  return run_jobs(parallel, slices.jobs(), sweep_work(p.sizes), ForwardScratch<S>::bytes(D, E, false), sweep);
}

}  // namespace
}  // namespace la2::cpu
