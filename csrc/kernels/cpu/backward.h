// The backward pass: dq by a forward sweep, dk and dv by one reverse sweep, both independent of each other.
//
// The reverse sweep goes over the chunks right to left with X = lambda * (gradient of the state at the chunk's
// right edge) in scratch, so that X enters the last chunk as grad_final_state, undecayed:
//   dV = diag(lambda^(C-r)) K X   + scale (Q K^T . M)^T dO
//   dK = diag(lambda^(C-r)) V X^T + scale (dO V^T . M)^T Q
//   X  = lambda^C X + scale (diag(lambda^r) Q)^T dO;   d initial_state is what leaves the first chunk.
//
// The slope gradient is minus the sum over all pairs i > j of (i-j) times what the pair adds to the loss; the
// states count as tokens -1 and N-1 (k_-1 v_-1^T = initial_state, q dO^T = grad_final_state). No difference of nearly
// equal numbers is formed. A pair inside a chunk is counted from the scores,
//   intra = sum_{i>j} (i-j) scale M_ij (q_i . k_j) (do_i . v_j).
// The distance of a pair across chunks is r_i, plus C - r_j, plus the whole chunks between. With "inter" the part of
// dq and dk that came through the state, and R the state with each of its pairs weighed by the chunks it has passed,
//   after  = sum_r r q_r . dq_inter_r           before = sum_r (C-r) k_r . dk_inter_r
//   R      = lambda^C (R + C S), R_0 = 0        between = sum_r scale lambda^r q_r^T R do_r, and <R, grad_final_state>
// (The usual way to the last, a telescoping sum of q_r . dq_inter_r and k_r . dk_inter_r, is nearly free, but the
// rounding of early chunks then counts once for every later token: 2e-3 at N = 32768, s = 0.5, where this has 4e-7.)
#pragma once

#include "forward.h"

namespace la2::cpu {
namespace {

template <class S>
struct ReverseScratch {
  using T = typename S::Acc;
  Decay<T> decay;
  Panels<T> q;              // [C, D]
  Panels<T> grad;           // [C, E] of grad_out
  Panels<T> k_t;            // [D, C]
  Panels<T> v_t;            // [E, C]
  CarriedState<T> state;    // [D, E] X
  CarriedState<T> state_t;  // [E, D]
  T* qk;                    // [C, C], row i, column j: scale lambda^(i-j) q_i . k_j
  T* gv;                    // [C, C]                   scale lambda^(i-j) do_i . v_j

  ReverseScratch(Arena& arena, int D, int E)
      : decay(arena),
        q(take_panels<T>(arena, kChunk, D)),
        grad(take_panels<T>(arena, kChunk, E)),
        k_t(take_panels<T>(arena, D, kChunk)),
        v_t(take_panels<T>(arena, E, kChunk)),
        state(take_state<T>(arena, D, E)),
        state_t(take_state<T>(arena, E, D)),
        qk(arena.take<T>(kChunk * kChunk)),
        gv(arena.take<T>(kChunk * kChunk)) {}

  static int64_t bytes(int D, int E) {
    Arena counter;
    ReverseScratch(counter, D, E);
    return counter.bytes();
  }
};

template <class S>
struct ReverseSweep {
  using T = typename S::Acc;
  using Element = typename S::Element;
  using Scratch = ReverseScratch<S>;

  SeqRows<const Element> q, k;     // [N, D]
  SeqRows<const Element> v, grad;  // [N, E]
  SeqRows<Element> dk;             // [N, D]
  SeqRows<Element> dv;             // [N, E]
  int64_t length;                  // N, of this sequence
  int D, E;
  double slope, scale;
  StateView<const T> grad_final;  // [D, E]
  StateView<T> grad_initial;
  int d_begin, d_end;   // the columns of dk this slice writes, whole panels of D
  int e_begin, e_end;   // the columns of dv and of grad_initial
  double* before;       // slope terms, one for each panel of D; nullptr: not wanted
  double* intra_pairs;  // one slope term; nullptr in all slices but the first

  void run(char* memory) const {
    Arena arena(memory);
    const Scratch x(arena, D, E);
    x.decay.fill(slope, scale, static_cast<int>(min_of<int64_t>(length, kChunk)));
    load_state(x.state, grad_final, E);
    load_state(x.state_t, grad_final.transposed(), D);

    Prefetcher next;
    next.add(q, D);
    next.add(k, D);
    next.add(v, E);
    next.add(grad, E);
    next.add(dk.columns(d_begin), d_end - d_begin);
    next.add(dv.columns(e_begin), e_end - e_begin);
    const int steps = kChunk / kTileRows + (D + kChunk) / kTileRows * panel_count<T>(e_end - e_begin);

    for (int64_t end = length; end > 0;) {
      const int rows = static_cast<int>((end - 1) % kChunk + 1);
      const int64_t start = end - rows;
      load_rows<S>(x.q, q.from(start), rows, D);
      load_rows<S>(x.grad, grad.from(start), rows, E);
      load_transposed<S>(x.k_t, k.from(start), rows, D);
      load_transposed<S>(x.v_t, v.from(start), rows, E);
      next.begin(max_of<int64_t>(start - kChunk, 0), start, steps);
      scores(x, rows, next);
      for_each_tile<T>(e_begin, round_up(e_end, kLanes<T>), [&](auto width, int col) {
        for (int row = 0; row < rows; row += kTileRows) {
          auto o = zero_tile<T>(width);
          next.step();
          inter(o, x, x.k_t, x.state.value, row, rows, col);
          intra(o, x.qk, x.grad, row, rows, col);
          store_rows<S>(o, dv.from(start + row), rows - row, col, E);
        }
      });
      for_each_tile<T>(d_begin, round_up(d_end, kLanes<T>), [&](auto width, int col) {
        RowDots<S> dots;
        for (int row = 0; row < rows; row += kTileRows) {
          auto o = zero_tile<T>(width);
          next.step();
          inter(o, x, x.v_t, x.state_t.value, row, rows, col);
          if (before) dots.add(o, k.from(start + row), rows - row, col, D, rows - 1 - row, -1);
          intra(o, x.gv, x.q, row, rows, col);
          store_rows<S>(o, dk.from(start + row), rows - row, col, D);
        }
        if (before) before[col / Panels<T>::kWidth] += dots.sum();
      });
      if (start > 0 || grad_initial.data) update_state(x, rows, start > 0, next);
      end = start;
    }
    if (grad_initial.data) store_state(grad_initial, x.state.value, e_begin, e_end);
  }

 private:
  // qk = scale Q K^T . M and gv = scale dO V^T . M, in the tiles that touch i >= j
  void scores(const Scratch& x, int rows, Prefetcher& next) const {
    Vec<double> distance_sum = {};
    for (int i = 0; i < rows; i += kTileRows) {
      for_each_tile<T>(0, round_up(min_of(i + kTileRows, rows), kLanes<T>), [&](auto width, int j) {
        next.step();
        T* p = x.qk + i * kChunk + j;
        auto score = zero_tile<T>(width);
        add_product(score, x.q, i, x.k_t, j);
        multiply(score, x.decay.scaled_back(i - j), -1);
        store_tile(score, p, kChunk);

        score = zero_tile<T>(width);
        add_product(score, x.grad, i, x.v_t, j);
        if (intra_pairs) distance_sum += weigh_by_distance(score, p, i - j);
        multiply(score, x.decay.scaled_back(i - j), -1);
        store_tile(score, x.gv + i * kChunk + j, kChunk);
      });
    }
    if (intra_pairs) *intra_pairs += sum_lanes(distance_sum);
  }

  // sum (i-j) qk_ij (do_i . v_j) of a tile, i - j = first in its corner; qk is 0 where i < j
  template <int kVecs>
  static LA2_INLINE Vec<double> weigh_by_distance(const Tile<T, kVecs>& gv, const T* qk, int first) {
    Vec<T> sum = {};
    LA2_UNROLL
    for (int m = 0; m < kTileRows; ++m) {
      LA2_UNROLL
      for (int n = 0; n < kVecs; ++n) {
        const Vec<T> distance = static_cast<T>(first + m - n * kLanes<T>) - lane_numbers<T>();
        sum += distance * gv.at[m][n] * load(qk + m * kChunk + n * kLanes<T>);
      }
    }
    return fold_to_double(sum);
  }

  // o = diag(lambda^(C-r)) A Z: dV from K and X, dK from V and X^T
  template <int kVecs>
  static LA2_INLINE void inter(Tile<T, kVecs>& o, const Scratch& x, const Panels<T>& a_t, const Panels<T>& state,
                               int row, int rows, int col) {
    add_product_transposed(o, a_t, row, state, col, 0, state.rows);
    scale_rows(o, x.decay.power(rows - 1 - row), -1);
  }

  // o += P^T C: dV from qk and dO, dK from gv and Q
  template <int kVecs>
  static LA2_INLINE void intra(Tile<T, kVecs>& o, const T* scores, const Panels<T>& c, int row, int rows, int col) {
    const int pitch = c.pitch(col), next = row + kTileRows;
    const T* p = scores + row * kChunk + row;
    add_triangle_transposed<false>(o, p, kChunk, c.at(row, col), pitch, rows - row);
    add_product_transposed(o, p + kTileRows * kChunk, kChunk, c.at(next, col), pitch, rows - next);
  }

  // X = lambda^C X + scale (diag(lambda^r) Q)^T dO. Nothing reads q after this.
  void update_state(const Scratch& x, int rows, bool needs_transposed, Prefetcher& next) const {
    scale_rows(x.q, rows, x.decay.scaled(1), 1);
    const Factor<T> decay = x.decay.factor(rows);
    accumulate(x.state, decay, x.q, x.grad, rows, e_begin, round_up(e_end, kLanes<T>), next);
    if (!needs_transposed) return;
    if (e_end - e_begin == E) {
      transpose_panels(x.state_t.value, x.state.value, D, E);
    } else {
      accumulate(x.state_t, decay, x.grad, x.q, rows, d_begin, round_up(d_end, kLanes<T>), next);
    }
  }
};

template <class S>
bool backward(const BackwardParams& p, const Parallel& parallel) {
  using T = typename S::Acc;
  using Element = typename S::Element;
  const int D = static_cast<int>(p.sizes.dim_k), E = static_cast<int>(p.sizes.dim_v);
  const int64_t heads = p.sizes.heads, tasks = p.sizes.num_seqs * heads;
  const int d_panels = panel_count<T>(D), e_panels = panel_count<T>(E);
  const Slices slices(tasks, max_of(d_panels, e_panels), parallel.num_threads);

  // Slope terms of every task: after and between (by panels of D), before (likewise), intra. Added up in this order
  // below, whoever computed them.
  const int terms_per_task = p.grad_slope ? 2 * d_panels + 1 : 0;
  const Block terms_memory(tasks * terms_per_task * static_cast<int64_t>(sizeof(double)));
  if (!terms_memory.is_valid()) return false;
  double* const terms = reinterpret_cast<double*>(terms_memory.data());
  for (int64_t i = 0; i < tasks * terms_per_task; ++i) terms[i] = 0;

  // The reverse sweeps, the longer ones, come first.
  auto sweep = [&](int64_t job, char* memory) {
    const bool is_reverse = job < slices.jobs();
    if (!is_reverse) job -= slices.jobs();
    const int64_t task = job / slices.count, slice = job % slices.count;
    const Span span(p.sizes, p.cu_seqlens, task / heads, task % heads);
    const double slope = span.slope<T>(p.slope);
    const int d_begin = slices.begin(slice, d_panels) * Panels<T>::kWidth;
    const int d_end = min_of(D, slices.end(slice, d_panels) * Panels<T>::kWidth);
    const int e_begin = slices.begin(slice, e_panels) * Panels<T>::kWidth;
    const int e_end = min_of(E, slices.end(slice, e_panels) * Panels<T>::kWidth);
    double* const of_task = terms + task * terms_per_task;

    if (is_reverse) {
      ReverseSweep<S> x = {};
      x.q = span.rows<Element>(p.q);
      x.k = span.rows<Element>(p.k);
      x.v = span.rows<Element>(p.v);
      x.grad = span.rows<Element>(p.grad_out);
      x.dk = span.rows<Element>(p.grad_k);
      x.dv = span.rows<Element>(p.grad_v);
      x.length = span.length;
      x.D = D;
      x.E = E;
      x.slope = slope;
      x.scale = p.scale;
      x.grad_final = span.state<T>(p.grad_final_state);
      x.grad_initial = span.state<T>(p.grad_initial_state);
      x.d_begin = d_begin;
      x.d_end = d_end;
      x.e_begin = e_begin;
      x.e_end = e_end;
      if (p.grad_slope) x.before = of_task + d_panels;
      if (p.grad_slope && slice == 0) x.intra_pairs = of_task + 2 * d_panels;
      x.run(memory);
    } else if (d_begin < d_end) {
      ForwardSweep<S> x = {};
      x.a = span.rows<Element>(p.grad_out);
      x.b = span.rows<Element>(p.v);
      x.c = span.rows<Element>(p.k).columns(d_begin);
      x.out = span.rows<Element>(p.grad_q).columns(d_begin);
      x.length = span.length;
      x.dim_a = E;
      x.dim_c = d_end - d_begin;
      x.slope = slope;
      x.scale = p.scale;
      x.initial = span.state<T>(p.initial_state).transposed().columns(d_begin);
      if (p.grad_slope) x.slope_terms = of_task + d_begin / Panels<T>::kWidth;
      x.q = span.rows<Element>(p.q).columns(d_begin);
      x.grad_final = span.state<T>(p.grad_final_state).transposed().columns(d_begin);
      x.run(memory);
    }
  };
  expect_writes<Element>(p.grad_q, p.sizes, D);
  expect_writes<Element>(p.grad_k, p.sizes, D);
  expect_writes<Element>(p.grad_v, p.sizes, E);
  const int64_t scratch = max_of(ReverseScratch<S>::bytes(D, E), ForwardScratch<S>::bytes(E, D, p.grad_slope));
  if (!run_jobs(parallel, 2 * slices.jobs(), 3 * sweep_work(p.sizes), scratch, sweep)) return false;

  if (p.grad_slope) {
    for (int64_t task = 0; task < tasks; ++task) {
      double sum = 0;
      for (int i = 0; i < terms_per_task; ++i) sum += terms[task * terms_per_task + i];
      static_cast<T*>(p.grad_slope)[task] = static_cast<T>(-sum);
    }
  }
  return true;
}

}  // namespace
}  // namespace la2::cpu
