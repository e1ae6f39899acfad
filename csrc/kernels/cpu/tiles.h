// Scratch tiles of a chunk: decay tables, rows and states in, rows and states out.
#pragma once

#include "../../core/decay.h"
#include "gemm.h"
#include "work.h"

namespace la2::cpu {
namespace {

// Rows per chunk. The work per token is 4 D E flops through the state and C (D + E) inside the chunk, and the state is
// read and written once a chunk. Measured with AVX-512, 32 against 64: 10 % faster at D = E = 64, 2 % at 128 and 192,
// 3 % slower at 256.
constexpr int kChunk = 32;

constexpr int kMaxHeadDim = 256;

// Rows and columns of scratch are written to these multiples, so that register tiles stay inside what was
// written.
template <class T>
constexpr int kPad = max_of(kLanes<T>, kTileRows);

// Fetches the rows of the next chunk, a few at every step. Rows that lie far apart ([B, N, H, D] tensors) are beyond
// the hardware prefetcher, and all rows at once are more than the core can wait for; asked for between register
// tiles, they arrive behind the arithmetic.
class Prefetcher {
 public:
  template <class E>
  void add(const SeqRows<E>& rows, int cols) {
    stream_[num_streams_++] = {reinterpret_cast<const char*>(rows.data), rows.stride * static_cast<int64_t>(sizeof(E)),
                               cols * static_cast<int>(sizeof(E))};
  }
  // Rows [first, last) of every stream are to come, in about `steps` steps.
  void begin(int64_t first, int64_t last, int steps) {
    first_ = row_ = first;
    last_ = last;
    current_ = first < last ? 0 : num_streams_;
    rows_per_step_ = static_cast<int>((num_streams_ * (last - first) + steps - 1) / steps);
  }
  LA2_INLINE void step() {
    for (int i = 0; i < rows_per_step_ && current_ < num_streams_; ++i) {
      const Stream& stream = stream_[current_];
      for (int byte = 0; byte < stream.row_bytes; byte += 64)
        __builtin_prefetch(stream.data + row_ * stream.stride + byte, 0, 2);
      if (++row_ == last_) {
        row_ = first_;
        ++current_;
      }
    }
  }

 private:
  struct Stream {
    const char* data;
    int64_t stride;  // bytes
    int row_bytes;
  };
  Stream stream_[6];
  int num_streams_ = 0, current_ = 0, rows_per_step_ = 0;
  int64_t first_ = 0, last_ = 0, row_ = 0;
};

// A factor that is not rounded to T: a gentle head's state is multiplied by lambda^C thousands of times, always with
// the same rounding error.
template <class T>
struct Factor {
  T high, low;
};

// Powers of one head's lambda, [n] for n = 0..kChunk. `scaled` has zeros in front, `scaled_back` is the mirror
// image: a row of M is a contiguous piece of either, and the part of it on the wrong side of the diagonal is 0.
// `power` has zeros for the rows of a register tile that lie behind the end of a chunk.
template <class T>
class Decay {
 public:
  explicit Decay(Arena& arena)
      : power_(arena.take<T>(kTileRows + kChunk + 1) + kTileRows),
        power_rest_(arena.take<T>(kChunk + 1)),
        scaled_(arena.take<T>(2 * kChunk + 1)),
        scaled_back_(arena.take<T>(2 * kChunk + 1)) {}

  // Powers up to `longest`, the rows of the longest chunk to come.
  void fill(double slope, double scale, int longest) const {
    for (int n = 0; n <= kChunk; ++n) {
      const double power = n <= longest ? decay_power<T>(slope, n) : 0;
      power_[n] = static_cast<T>(power);
      power_rest_[n] = static_cast<T>(power - static_cast<double>(power_[n]));
      scaled_[kChunk + n] = scaled_back_[kChunk - n] = n <= longest ? static_cast<T>(scale * power) : 0;
    }
    for (int n = 1; n <= kTileRows; ++n) power_[-n] = 0;
    for (int n = 1; n <= kChunk; ++n) scaled_[kChunk - n] = scaled_back_[kChunk + n] = 0;
  }

  // lambda^n as a sum of two numbers of type T
  Factor<T> factor(int n) const { return {power_[n], power_rest_[n]}; }
  // lambda^n, lambda^(n+1), ...
  LA2_INLINE const T* power(int n) const { return power_ + n; }
  // scale times lambda^n, lambda^(n+1), ..., and scale times lambda^n, lambda^(n-1), ...
  LA2_INLINE const T* scaled(int n) const { return scaled_ + kChunk + n; }
  LA2_INLINE const T* scaled_back(int n) const { return scaled_back_ + kChunk - n; }

 private:
  T *power_, *power_rest_, *scaled_, *scaled_back_;
};

template <class T>
Panels<T> take_panels(Arena& arena, int rows, int cols) {
  const int padded = round_up(cols, kLanes<T>);
  return {arena.take<T>(static_cast<int64_t>(rows) * padded), rows, padded};
}

// value + rest = decay (value + rest) + the tile. Where multiply and add are fused, decay.high * old - sum is exact but
// for one rounding of a number as small as the addend.
template <class T, int kVecs>
LA2_INLINE void add_to_state(const Tile<T, kVecs>& c, T* value, T* rest, int pitch, const Factor<T>& decay) {
  LA2_UNROLL
  for (int m = 0; m < kTileRows; ++m) {
    LA2_UNROLL
    for (int n = 0; n < kVecs; ++n) {
      const int at = m * pitch + n * kLanes<T>;
      const Vec<T> old = load(value + at);
      const Vec<T> addend = decay.low * old + (decay.high * load(rest + at) + c.at[m][n]);
      const Vec<T> sum = decay.high * old + addend;
      store(value + at, sum);
      store(rest + at, (decay.high * old - sum) + addend);
    }
  }
}

// A state that is carried over a whole sequence: value + rest, where rest is what rounding took from value so far
// (compensated summation), so that the error of long sums over a gentle head does not grow with their length.
template <class T>
struct CarriedState {
  Panels<T> value, rest;
};

template <class T>
CarriedState<T> take_state(Arena& arena, int rows, int cols) {
  return {take_panels<T>(arena, rows, cols), take_panels<T>(arena, rows, cols)};
}

// z = decay z + a^T b in columns [begin, end), for the first `count` rows of a and b.
template <class T>
void accumulate(const CarriedState<T>& z, const Factor<T>& decay, const Panels<T>& a, const Panels<T>& b, int count,
                int begin, int end, Prefetcher& next) {
  for_each_tile<T>(begin, end, [&](auto width, int col) {
    const int pitch = z.value.pitch(col);
    for (int row = 0; row < z.value.rows; row += kTileRows) {
      next.step();
      auto sum = zero_tile<T>(width);
      add_product_transposed(sum, a, row, b, col, 0, count);
      add_to_state(sum, z.value.at(row, col), z.rest.at(row, col), pitch, decay);
    }
  });
}

template <class T>
int panel_count(int cols) {
  return (cols + Panels<T>::kWidth - 1) / Panels<T>::kWidth;
}

// Whether the vector at this column is the half one at the end of a row.
template <class T>
LA2_INLINE bool is_half(int col, int cols) {
  return cols - col < kLanes<T>;
}

// x = the rows of a chunk, in the accumulation type; zeros beyond.
template <class S>
void load_rows(const Panels<typename S::Acc>& x, const SeqRows<const typename S::Element>& rows, int count, int cols) {
  using T = typename S::Acc;
  for (int r = 0; r < count; ++r) {
    const typename S::Element* row = rows.row(r);
    for (int col = 0; col < cols; col += kLanes<T>)
      store(x.at(r, col), load_elements<S>(row + col, is_half<T>(col, cols)));
  }
  for (int r = count; r < round_up(count, kTileRows); ++r)
    for (int col = 0; col < cols; col += kLanes<T>) store(x.at(r, col), Vec<T>{});
}

// x = the rows of a chunk, transposed: x[col][r]; zeros beyond the last row.
template <class S>
void load_transposed(const Panels<typename S::Acc>& x, const SeqRows<const typename S::Element>& rows, int count,
                     int cols) {
  using T = typename S::Acc;
  constexpr int W = kLanes<T>;
  for (int r = 0; r < round_up(count, kPad<T>); r += W) {
    for (int col = 0; col < cols; col += W) {
      Vec<T> square[W];
      LA2_UNROLL
      for (int i = 0; i < W; ++i)
        square[i] = r + i < count ? load_elements<S>(rows.row(r + i) + col, is_half<T>(col, cols)) : Vec<T>{};
      transpose_square<T>(square);
      LA2_UNROLL
      for (int i = 0; i < W; ++i)
        if (i < W / 2 || !is_half<T>(col, cols)) store(x.at(col + i, r), square[i]);
    }
  }
}

// y = x transposed, for x of [rows, cols], both multiples of 8.
template <class T>
void transpose_panels(const Panels<T>& y, const Panels<T>& x, int rows, int cols) {
  constexpr int W = kLanes<T>;
  for (int row = 0; row < rows; row += W) {
    for (int col = 0; col < cols; col += W) {
      Vec<T> square[W];
      LA2_UNROLL
      for (int i = 0; i < W; ++i) square[i] = i < W / 2 || !is_half<T>(row, rows) ? load(x.at(row + i, col)) : Vec<T>{};
      transpose_square<T>(square);
      LA2_UNROLL
      for (int i = 0; i < W; ++i)
        if (i < W / 2 || !is_half<T>(col, cols)) store(y.at(col + i, row), square[i]);
    }
  }
}

// x[r] *= factor[r * step], r < count
template <class T>
void scale_rows(const Panels<T>& x, int count, const T* factor, int step) {
  for (int r = 0; r < count; ++r)
    for (int col = 0; col < x.cols; col += kLanes<T>) store(x.at(r, col), factor[r * step] * load(x.at(r, col)));
}

// The first `count` rows of a tile to memory.
template <class S, int kVecs>
LA2_INLINE void store_rows(const Tile<typename S::Acc, kVecs>& c, const SeqRows<typename S::Element>& rows, int count,
                           int col, int cols) {
  using T = typename S::Acc;
  LA2_UNROLL
  for (int m = 0; m < kTileRows; ++m) {
    if (m >= count) break;
    LA2_UNROLL
    for (int n = 0; n < kVecs; ++n) {
      const int at = col + n * kLanes<T>;
      store_elements<S>(rows.row(m) + at, c.at[m][n], is_half<T>(at, cols));
    }
  }
}

template <class T>
void clear(const Panels<T>& x) {
  for (int i = 0; i < x.rows * x.cols; i += kLanes<T>) store(x.data + i, Vec<T>{});
}

// z = the state (zeros if absent), and back. Loops run along the axis that is contiguous in memory.
template <class T>
void load_state(const CarriedState<T>& z, const StateView<const T>& s, int cols) {
  clear(z.rest);
  if (!s.data) return clear(z.value);
  const Panels<T>& x = z.value;
  for (int first = 0; first < x.cols; first += Panels<T>::kWidth) {
    const int pitch = x.pitch(first), width = min_of(pitch, cols - first);
    T* panel = x.at(0, first);
    const T* from = s.at(0, first);
    if (s.stride_col == 1) {
      for (int row = 0; row < x.rows; ++row)
        for (int col = 0; col < width; ++col) panel[row * pitch + col] = from[row * s.stride_row + col];
    } else {
      for (int col = 0; col < width; ++col)
        for (int row = 0; row < x.rows; ++row) panel[row * pitch + col] = from[row * s.stride_row + col * s.stride_col];
    }
    for (int row = 0; row < x.rows; ++row)
      for (int col = width; col < pitch; ++col) panel[row * pitch + col] = 0;
  }
}

template <class T>
void store_state(const StateView<T>& s, const Panels<T>& x, int begin, int end) {
  for (int first = begin; first < end; first += Panels<T>::kWidth) {
    const int pitch = x.pitch(first), width = min_of(pitch, end - first);
    const T* panel = x.at(0, first);
    T* to = s.at(0, first);
    if (s.stride_col == 1) {
      for (int row = 0; row < x.rows; ++row)
        for (int col = 0; col < width; ++col) to[row * s.stride_row + col] = panel[row * pitch + col];
    } else {
      for (int col = 0; col < width; ++col)
        for (int row = 0; row < x.rows; ++row) to[row * s.stride_row + col * s.stride_col] = panel[row * pitch + col];
    }
  }
}

// The weighted sum of row dot products x_r . y_r between register tiles and rows in memory. The products of one
// tile add up in T, tiles in double.
template <class S>
class RowDots {
  using T = typename S::Acc;

 public:
  // The first `count` rows of a tile that begins at column col; row m weighs weight + m * step.
  template <int kVecs>
  LA2_INLINE void add(const Tile<T, kVecs>& x, const SeqRows<const typename S::Element>& y, int count, int col,
                      int cols, int weight, int step) {
    Vec<T> sum = {};
    LA2_UNROLL
    for (int m = 0; m < kTileRows; ++m) {
      if (m >= count) break;
      Vec<T> dot = {};
      LA2_UNROLL
      for (int n = 0; n < kVecs; ++n) {
        const int at = col + n * kLanes<T>;
        dot += x.at[m][n] * load_elements<S>(y.row(m) + at, is_half<T>(at, cols));
      }
      sum += static_cast<T>(weight + m * step) * dot;
    }
    sum_ += fold_to_double(sum);
  }

  double sum() const { return sum_lanes(sum_); }

 private:
  Vec<double> sum_ = {};
};

}  // namespace
}  // namespace la2::cpu
