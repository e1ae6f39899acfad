// The micro-GEMM all equations are made of: a register tile of kTileRows rows times at most kTileVecs
// vectors, gathering a[m] * b[k][n] over k, with both operands in scratch.
#pragma once

#include "vec.h"

namespace la2::cpu {
namespace {

// The tile leaves room in the register file for one row of b and one element of a: 16 + 2 of 32 registers
// with AVX-512, 12 + 3 + 1 of 16 with AVX2, 8 + 2 (+ products, there is no fused multiply-add) of 16 without.
#if LA2_VEC_BYTES == 64
constexpr int kTileRows = 8, kTileVecs = 2;
#elif LA2_VEC_BYTES == 32
constexpr int kTileRows = 4, kTileVecs = 3;
#else
constexpr int kTileRows = 4, kTileVecs = 2;
#endif

// A matrix in scratch, stored as column panels as wide as a register tile (the last one may be narrower):
// what the micro-GEMM reads of b is contiguous, whatever the number of columns, and never collides with
// itself in the first-level cache.
template <class T>
struct Panels {
  static constexpr int kWidth = kTileVecs * kLanes<T>;

  T* data;
  int rows, cols;  // cols is a multiple of kLanes

  static int start(int col) { return col / kWidth * kWidth; }
  // The distance between rows in the panel that holds this column.
  LA2_INLINE int pitch(int col) const { return min_of(kWidth, cols - start(col)); }
  LA2_INLINE T* at(int row, int col) const {
    const int first = start(col);
    return data + static_cast<ptrdiff_t>(first) * rows + row * pitch(col) + (col - first);
  }
};

template <int N>
struct Width {};

// Calls step(Width<n>, col) for tiles of n vectors that cover columns [begin, end), both multiples of kLanes,
// none across a panel's edge.
template <class T, int kVecs = kTileVecs, class Step>
LA2_INLINE void for_each_tile(int begin, int end, const Step& step) {
  for (int col = begin; col < end;) {
    const int stop = min_of(end, Panels<T>::start(col) + Panels<T>::kWidth);
    const int vecs = (stop - col) / kLanes<T>;
    if (vecs == kVecs) step(Width<kVecs>{}, col);
    if constexpr (kVecs > 1) {
      if (vecs < kVecs) for_each_tile<T, kVecs - 1>(col, stop, step);
    }
    col = stop;
  }
}

// Accumulators, in registers once everything that touches them is inlined.
template <class T, int kVecs>
struct Tile {
  Vec<T> at[kTileRows][kVecs];
};

template <class T, int kVecs>
LA2_INLINE Tile<T, kVecs> zero_tile(Width<kVecs>) {
  return {};
}

template <class T, int kVecs>
LA2_INLINE void store_tile(const Tile<T, kVecs>& c, T* p, int pitch) {
  LA2_UNROLL
  for (int m = 0; m < kTileRows; ++m) {
    LA2_UNROLL
    for (int n = 0; n < kVecs; ++n) store(p + m * pitch + n * kLanes<T>, c.at[m][n]);
  }
}

// c[m] *= factor[m * step]
template <class T, int kVecs>
LA2_INLINE void scale_rows(Tile<T, kVecs>& c, const T* factor, int step) {
  LA2_UNROLL
  for (int m = 0; m < kTileRows; ++m) {
    LA2_UNROLL
    for (int n = 0; n < kVecs; ++n) c.at[m][n] *= factor[m * step];
  }
}

// c[m][n] *= table[m * step + n], n counting lanes
template <class T, int kVecs>
LA2_INLINE void multiply(Tile<T, kVecs>& c, const T* table, int step) {
  LA2_UNROLL
  for (int m = 0; m < kTileRows; ++m) {
    LA2_UNROLL
    for (int n = 0; n < kVecs; ++n) c.at[m][n] *= load(table + m * step + n * kLanes<T>);
  }
}

// One step of k for rows [first, last) of the tile: c[m] += a[m] b.
template <class T, int kVecs>
LA2_INLINE void add_outer(Tile<T, kVecs>& c, const T* a, int a_pitch, const T* b, int first, int last) {
  Vec<T> row[kVecs];
  LA2_UNROLL
  for (int n = 0; n < kVecs; ++n) row[n] = load(b + n * kLanes<T>);
  LA2_UNROLL
  for (int m = 0; m < kTileRows; ++m) {
    if (m < first || m >= last) continue;
    const T x = a[m * a_pitch];
    LA2_UNROLL
    for (int n = 0; n < kVecs; ++n) c.at[m][n] += x * row[n];
  }
}

// c[m] += sum over k < count of a[m][k] b[k], with a stored by rows: a[m * pitch + k].
template <class T, int kVecs>
LA2_INLINE void add_product(Tile<T, kVecs>& c, const T* a, int a_pitch, const T* b, int b_pitch, int count) {
  for (int k = 0; k < count; ++k) add_outer(c, a + k, a_pitch, b + k * b_pitch, 0, kTileRows);
}

// The same with a stored transposed: a[k * pitch + m].
template <class T, int kVecs>
LA2_INLINE void add_product_transposed(Tile<T, kVecs>& c, const T* a, int a_pitch, const T* b, int b_pitch, int count) {
  for (int k = 0; k < count; ++k) add_outer(c, a + k * a_pitch, 1, b + k * b_pitch, 0, kTileRows);
}

// The same for a triangular block, k < min(count, kTileRows): row m takes only k <= m (kLower) or only k >= m.
// The other half is skipped, not multiplied by zero, so that a NaN or an inf never travels against time.
template <bool kLower, class T, int kVecs>
LA2_INLINE void add_triangle_transposed(Tile<T, kVecs>& c, const T* a, int a_pitch, const T* b, int b_pitch,
                                        int count) {
  LA2_UNROLL
  for (int k = 0; k < kTileRows; ++k) {
    if (k >= count) break;
    add_outer(c, a + k * a_pitch, 1, b + k * b_pitch, kLower ? k : 0, kLower ? kTileRows : k + 1);
  }
}

// The tile at (row, col) of a b, for all rows of b.
template <class T, int kVecs>
LA2_INLINE void add_product(Tile<T, kVecs>& c, const Panels<T>& a, int row, const Panels<T>& b, int col) {
  const int pitch = b.pitch(col);
  for (int k = 0; k < b.rows; k += Panels<T>::kWidth)
    add_product(c, a.at(row, k), a.pitch(k), b.at(k, col), pitch, min_of(Panels<T>::kWidth, b.rows - k));
}

// The tile at (row, col) of a^T b, for rows [first, last) of a and b.
template <class T, int kVecs>
LA2_INLINE void add_product_transposed(Tile<T, kVecs>& c, const Panels<T>& a, int row, const Panels<T>& b, int col,
                                       int first, int last) {
  add_product_transposed(c, a.at(first, row), a.pitch(row), b.at(first, col), b.pitch(col), last - first);
}

}  // namespace
}  // namespace la2::cpu
