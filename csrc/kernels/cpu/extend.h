// Packed new tokens of many requests against a pool of states: the forward sweep from slot to slot.
#pragma once

#include "forward.h"
#include "pool.h"

namespace la2::cpu {
namespace {

// One request, one head, a slice of E: snapshots first, since its own slot may be the one it reads.
template <class S>
struct ExtendTask {
  using T = typename S::Acc;
  using Element = typename S::Element;

  const ExtendParams& p;
  int64_t request, head;
  int first, cols;

  static int64_t bytes(int dim_k, int dim_v) {
    Arena counter;
    counter.take<T>(static_cast<int64_t>(dim_k) * dim_v);
    return counter.bytes() + ForwardScratch<S>::bytes(dim_k, dim_v, false);
  }

  void run(char* memory) const {
    Arena arena(memory);
    T* const copy = arena.take<T>(p.dim_k * cols);
    char* const scratch = memory + arena.bytes();
    const int64_t begin = integer_at(p.cu_seqlens.data, p.cu_seqlens.is_int64, request);
    const int64_t length = integer_at(p.cu_seqlens.data, p.cu_seqlens.is_int64, request + 1) - begin;
    const int64_t named = slot_of(p.read_slots, request, request);
    const int64_t read_slot = p.has_initial_state && !p.has_initial_state[request] ? -1 : named;
    const int64_t write_slot = slot_of(p.write_slots, request, named);
    const PoolSlice<T> slice{p.state, head, static_cast<int>(p.dim_k), first, cols, {copy, cols, 1}};

    ForwardSweep<S> x = {};
    x.a = rows<const Element>(p.q, begin, 0);
    x.b = rows<const Element>(p.k, begin, 0);
    x.c = rows<const Element>(p.v, begin, first);
    x.dim_a = static_cast<int>(p.dim_k);
    x.dim_c = cols;
    x.slope = slope_at<T>(p.slope, request, head);
    x.scale = p.scale;
    if (read_slot >= 0) x.initial = {copy, cols, 1};
    auto sweep = [&](int64_t tokens, int64_t to_slot) {
      if (read_slot >= 0) slice.load(read_slot);
      x.length = tokens;
      x.final = to_slot >= 0 ? slice.copy : StateView<T>{};
      x.run(scratch);
      if (to_slot >= 0) slice.store(to_slot);
    };

    if (p.snapshot_offsets.data) {
      const Indices& offsets = p.snapshot_offsets;
      const int64_t last = integer_at(offsets.data, offsets.is_int64, request + 1);
      for (int64_t m = integer_at(offsets.data, offsets.is_int64, request); m < last; ++m) {
        const int64_t slot = slot_of(p.snapshot_slots, m, -1);
        if (slot >= 0) sweep(integer_at(p.snapshot_tokens.data, p.snapshot_tokens.is_int64, m), slot);
      }
    }
    if (named < 0 && write_slot < 0) return zero(begin, begin + length);
    if (length == 0 && read_slot >= 0 && read_slot == write_slot) return;
    x.out = rows<Element>(p.out, begin, first);
    sweep(length, write_slot);
  }

  void zero(int64_t begin, int64_t end) const {
    const SeqRows<Element> out = rows<Element>(p.out, begin, first);
    for (int64_t row = 0; row < end - begin; ++row)
      for (int col = 0; col < cols; ++col) out.row(row)[col] = 0;
  }

 private:
  static int64_t slot_of(const Indices& slots, int64_t i, int64_t otherwise) {
    return slots.data ? integer_at(slots.data, slots.is_int64, i) : otherwise;
  }
  template <class E, class AnyRows>
  SeqRows<E> rows(const AnyRows& x, int64_t begin, int column) const {
    return {static_cast<E*>(x.data) + begin * x.stride_n + head * x.stride_h + column, x.stride_n};
  }
};

template <class S>
bool extend(const ExtendParams& p, const Parallel& parallel) {
  using T = typename S::Acc;
  const int D = static_cast<int>(p.dim_k), E = static_cast<int>(p.dim_v);
  const int panels = panel_count<T>(E);
  const Slices slices(p.requests * p.heads, panels, parallel.num_threads);
  auto run = [&](int64_t job, char* memory) {
    const int64_t task = job / slices.count, slice = job % slices.count;
    const int first = slices.begin(slice, panels) * Panels<T>::kWidth;
    const int last = min_of(E, slices.end(slice, panels) * Panels<T>::kWidth);
    ExtendTask<S>{p, task / p.heads, task % p.heads, first, last - first}.run(memory);
  };
  const Sizes sizes{1, p.heads, p.tokens, p.dim_k, p.dim_v, p.requests + p.snapshots};
  if (!run_jobs(parallel, slices.jobs(), sweep_work(sizes), ExtendTask<S>::bytes(D, E), run)) return false;
  const int64_t behind = integer_at(p.cu_seqlens.data, p.cu_seqlens.is_int64, p.requests);
  for (int64_t head = 0; head < p.heads; ++head) ExtendTask<S>{p, 0, head, 0, E}.zero(behind, p.tokens);
  return true;
}

}  // namespace
}  // namespace la2::cpu
