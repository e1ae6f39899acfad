// A block's part of one state in registers, and what a token does to it: s = lambda s + k_t v_t^T, o_t = q_t^T s.
// A part is all of D for a slice of E. Two of them, for the two orders a state comes in:
//
//   ColumnsPart (KV, stride_e == 1, and any other strides): kLanes threads beside each other cover the slice, each has
//               kRows consecutive rows of D;
//   RowsPart    (VK, stride_d == 1): kLanes lanes of a warp cover D, each has kCols consecutive columns of E.
//
// Every element sees the same operations in the same order in all of them, and a sum over D has one order in each of
// the two: runs of 8 rows (VK: 4 rows) one after the other, then the runs as a tree, neighbours first. So neither the
// pool's dtype, nor how much a block takes, nor the number of tokens in a call changes a bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../../core/decay.h"
#include "../params.h"
#include "../tile/silu.cuh"
#include "element.cuh"

namespace la2::simt {

constexpr int kMaxDim = 256;

template <class T>
struct Accumulation {
  using Type = float;
};
template <>
struct Accumulation<double> {
  using Type = double;
};

// Where a block works.
struct Place {
  int64_t row, head;
  int first_col, cols;  // of E
  int64_t slot;
};

// ---- elements -------------------------------------------------------------------------------------------------------

// Written out, so that no compiler contracts them another way in another kernel. k v is exact for 16-bit inputs: then
// the rounding of the fma is all there is.
__device__ __forceinline__ float update(float s, float decay, float k, float v) {
  return __fmaf_rn(decay, s, __fmul_rn(k, v));
}
__device__ __forceinline__ double update(double s, double decay, double k, double v) {
  return __fma_rn(decay, s, __dmul_rn(k, v));
}
__device__ __forceinline__ float add_product(float sum, float q, float s) { return __fmaf_rn(q, s, sum); }
__device__ __forceinline__ double add_product(double sum, double q, double s) { return __fma_rn(q, s, sum); }

// kCount elements as they lie in memory, in registers of 32 bits: moved 16, 8 or 4 bytes at once. from: a multiple of
// that.
template <class T, int kCount>
struct Pack {
  static constexpr int kWords = kCount * sizeof(T) / 4;
  uint32_t words[kWords] = {};

  __device__ __forceinline__ void load(const T* from) {
    if constexpr (kWords % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 raw = reinterpret_cast<const uint4*>(from)[i];
        words[4 * i] = raw.x, words[4 * i + 1] = raw.y, words[4 * i + 2] = raw.z, words[4 * i + 3] = raw.w;
      }
    } else if constexpr (kWords % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kWords / 2; ++i) {
        const uint2 raw = reinterpret_cast<const uint2*>(from)[i];
        words[2 * i] = raw.x, words[2 * i + 1] = raw.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint32_t*>(from)[i];
    }
  }
  __device__ __forceinline__ auto operator[](int i) const {
    if constexpr (sizeof(T) == 8) {
      return __hiloint2double(static_cast<int>(words[2 * i + 1]), static_cast<int>(words[2 * i]));
    } else if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else {
      return half_of(words[i / 2], i % 2 != 0, T());
    }
  }

 private:
  __device__ __forceinline__ static float half_of(uint32_t word, bool is_upper, __nv_bfloat16) {
    return __uint_as_float(is_upper ? word & 0xffff0000u : word << 16);
  }
  __device__ __forceinline__ static float half_of(uint32_t word, bool is_upper, __half) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(is_upper ? word >> 16 : word)));
  }
};

// Elements of q, k and v: 16-bit rows are aligned (ops/arguments.cpp), others may begin anywhere.
template <class T, int kCount>
__device__ __forceinline__ void load_elements(Pack<T, kCount>& to, const T* from) {
  if constexpr (sizeof(T) == 2) {
    to.load(from);
  } else {
    constexpr int kWordsEach = sizeof(T) / 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Pack<T, 1> one;
      one.load(from + i);
#pragma unroll
      for (int w = 0; w < kWordsEach; ++w) to.words[i * kWordsEach + w] = one.words[w];
    }
  }
}

// SiLU of each, rounded to T.
template <class T, int kCount>
__device__ __forceinline__ void take_silu(Pack<T, kCount>& pack) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (uint32_t& word : pack.words) word = tile::silu_pair<T>(word);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const auto y = tile::silu(pack[i]);
      if constexpr (sizeof(T) == 4) {
        pack.words[i] = __float_as_uint(y);
      } else {
        pack.words[2 * i] = static_cast<uint32_t>(__double2loint(y));
        pack.words[2 * i + 1] = static_cast<uint32_t>(__double2hiint(y));
      }
    }
  }
}
template <class T, int kCount, int kPacks>
__device__ __forceinline__ void take_silu(Pack<T, kCount> (&packs)[kPacks]) {
#pragma unroll
  for (Pack<T, kCount>& pack : packs) take_silu(pack);
}
// bits: of Silu.
template <class Token>
__device__ __forceinline__ void take_silu_of_token(Token& token, int bits) {
  if (bits & kSiluQ) take_silu(token.q);
  if (bits & kSiluK) take_silu(token.k);
  if (bits & kSiluV) take_silu(token.v);
}

// kVec elements of a state between memory and registers, `stride` apart (1: kVector).
template <bool kVector, int kVec, class P, class Acc>
__device__ __forceinline__ void load_vec(Acc* s, const P* from, int64_t stride) {
  if constexpr (kVector) {
    Pack<P, kVec> pack;
    pack.load(from);
#pragma unroll
    for (int e = 0; e < kVec; ++e) s[e] = pack[e];
  } else {
#pragma unroll
    for (int e = 0; e < kVec; ++e) s[e] = to_acc(from[e * stride]);
  }
}
// The intrinsics are the default write-back; a plain store may come out as several of 4 bytes.
template <int kVec>
__device__ __forceinline__ void store_vector(float* to, const float* s) {
#pragma unroll
  for (int e = 0; e < kVec; e += 4)
    __stwb(reinterpret_cast<float4*>(to + e), make_float4(s[e], s[e + 1], s[e + 2], s[e + 3]));
}
template <int kVec>
__device__ __forceinline__ void store_vector(double* to, const double* s) {
#pragma unroll
  for (int e = 0; e < kVec; e += 2) __stwb(reinterpret_cast<double2*>(to + e), make_double2(s[e], s[e + 1]));
}
template <int kVec>
__device__ __forceinline__ void store_vector(__nv_bfloat16* to, const float* s) {
  auto pair = [&](int e) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(s[e], s[e + 1]);
    return *reinterpret_cast<const uint32_t*>(&both);
  };
#pragma unroll
  for (int e = 0; e < kVec; e += 8)
    __stwb(reinterpret_cast<uint4*>(to + e), make_uint4(pair(e), pair(e + 2), pair(e + 4), pair(e + 6)));
}
template <bool kVector, int kVec, class P, class Acc>
__device__ __forceinline__ void store_vec(P* to, const Acc* s, int64_t stride) {
  if constexpr (kVector) {
    store_vector<kVec>(to, s);
  } else {
#pragma unroll
    for (int e = 0; e < kVec; ++e) from_acc(to[e * stride], s[e]);
  }
}

// A slice of a head's state in a slot: first row, first column.
template <class P>
struct StateView {
  P* data;
  int64_t stride_d, stride_e;

  __device__ __forceinline__ StateView(const MutableState& state, int64_t first)
      : data(static_cast<P*>(state.data) + first), stride_d(state.stride_d), stride_e(state.stride_e) {}
  __device__ __forceinline__ StateView(const MutableState& state, const Place& place, int64_t slot)
      : StateView(state, slot * state.stride_s + place.head * state.stride_h + place.first_col * state.stride_e) {}
};

// ---- sums -----------------------------------------------------------------------------------------------------------

constexpr int log2_of(int x) { return x <= 1 ? 0 : 1 + log2_of(x / 2); }

// Adds each of x up over the lanes that differ in the bits kBegin .. kEnd / 2, neighbours first. With every step a lane
// gives half of its sums away, so that each is formed once: left are x[0 .. kept_sums). Returns which sum x[0] is.
template <int kBegin, int kEnd, int kCount, class Acc>
__device__ __forceinline__ int sum_over_lanes(Acc (&x)[kCount]) {
  int first = 0, count = kCount;
#pragma unroll
  for (int distance = kBegin; distance < kEnd; distance *= 2) {
    if (count > 1) {
      count /= 2;
      const bool is_upper = (threadIdx.x & distance) != 0;
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        if (i >= count) continue;
        const Acc keep = is_upper ? x[i + count] : x[i];
        const Acc give = is_upper ? x[i] : x[i + count];
        x[i] = keep + __shfl_xor_sync(0xffffffffu, give, distance);
      }
      if (is_upper) first += count;
    } else {
      x[0] += __shfl_xor_sync(0xffffffffu, x[0], distance);
    }
  }
  return first;
}
constexpr int kept_sums(int begin, int end, int count) {
  const int kept = count >> log2_of(end / begin);
  return kept > 1 ? kept : 1;
}

// parts[0 .. kParts), kStride apart, as a tree, neighbours first.
template <int kParts, int kStride, class Acc>
__device__ __forceinline__ Acc sum_tree(const Acc* parts) {
  if constexpr (kParts == 1) {
    return parts[0];
  } else {
    return sum_tree<kParts / 2, kStride>(parts) + sum_tree<kParts / 2, kStride>(parts + kParts / 2 * kStride);
  }
}

// ---- columns --------------------------------------------------------------------------------------------------------

// P: the state's element in memory; a thread's kRows of D are runs of 8.
template <class T_, class P_, int kMaxDimK_, int kRows_, int kLanes_, bool kVector_>
class ColumnsPart {
 public:
  using T = T_;
  using P = P_;
  using Acc = typename Accumulation<T>::Type;
  static constexpr bool kVector = kVector_;  // stride_e == 1 and every row starts at a multiple of 16 bytes
  static constexpr int kMaxDimK = kMaxDimK_, kRows = kRows_, kLanes = kLanes_;
  static constexpr int kVec = 16 / sizeof(P);
  static constexpr int kThreads = kLanes * (kMaxDimK / kRows);
  // As many as fit without a spill.
  static constexpr int kMinBlocks = (sizeof(T) > 2 ? 256 : kRows * kVec > 32 ? 512 : 768) / kThreads;
  static constexpr int kParts = kThreads / 32;  // of a column's sum: one from each warp
  static constexpr int kSlice = kLanes * kVec;  // columns of E
  static_assert(kRows % 8 == 0 && kThreads % 32 == 0);

  struct Token {
    Pack<T, 8> q[kRows / 8], k[kRows / 8];  // zero where there are no rows
    Pack<T, kVec> v;
    // Rows of a token; v from the slice's first column on; q == nullptr: no outputs.
    __device__ __forceinline__ void load(const ColumnsPart& part, const T* gQ, const T* gK, const T* gV) {
      if (!part.is_inside_) return;
#pragma unroll
      for (int run = 0; run < kRows / 8; ++run) {
        if (!part.has_run(run)) continue;
        if (gQ != nullptr) load_elements(q[run], gQ + part.dim_ + 8 * run);
        load_elements(k[run], gK + part.dim_ + 8 * run);
      }
      load_elements(v, gV + part.col_);
    }
  };
  struct Sum {
    Acc x[kVec];
  };

  __device__ __forceinline__ ColumnsPart(int64_t dim_k, int cols)
      : dim_(threadIdx.x / kLanes * kRows),
        col_(threadIdx.x % kLanes * kVec),
        rows_(min(static_cast<int>(dim_k) - dim_, kRows)),
        is_inside_(col_ < cols && rows_ > 0) {}

  template <class Any>
  __device__ __forceinline__ void load(const StateView<Any>& state) {
    const Any* const from = state.data + dim_ * state.stride_d + col_ * state.stride_e;
    for_each_row([&](int i) { load_vec<kVector, kVec>(s_[i], from + i * state.stride_d, state.stride_e); });
  }
  template <class Any>
  __device__ __forceinline__ void store(const StateView<Any>& state) const {
    Any* const to = state.data + dim_ * state.stride_d + col_ * state.stride_e;
    for_each_row([&](int i) { store_vec<kVector, kVec>(to + i * state.stride_d, s_[i], state.stride_e); });
  }

  // What is outside of the state is zero and stays so.
  __device__ __forceinline__ Sum take(const Token& token, Acc decay) {
    Acc runs[kRows / 8][kVec] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Acc q = token.q[i / 8][i % 8], k = token.k[i / 8][i % 8];
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        s_[i][e] = update(s_[i][e], decay, k, token.v[e]);
        runs[i / 8][e] = add_product(runs[i / 8][e], q, s_[i][e]);
      }
    }
    Sum sum;
#pragma unroll
    for (int e = 0; e < kVec; ++e) sum.x[e] = sum_tree<kRows / 8, kVec>(&runs[0][e]);
    return sum;
  }

  __device__ __forceinline__ void leave(Sum sum, Acc* parts) const {
    const int first = sum_over_lanes<kLanes, 32>(sum.x);
    Acc* const to = parts + threadIdx.x / 32 * kSlice + col_ + first;
#pragma unroll
    for (int i = 0; i < kept_sums(kLanes, 32, kVec); ++i) to[i] = sum.x[i];
  }

 private:
  // Of a thread that is inside: dims are multiples of 8, so a run is there or not.
  __device__ __forceinline__ bool has_run(int run) const { return run == 0 || 8 * run < rows_; }
  template <class Body>
  __device__ __forceinline__ void for_each_row(const Body& body) const {
    if (!is_inside_) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (has_run(i / 8)) body(i);
  }

  int dim_, col_, rows_;
  bool is_inside_;
  Acc s_[kRows][kVec] = {};
};

// ---- rows -----------------------------------------------------------------------------------------------------------

template <class T_, class P_, int kMaxDimK_, int kCols_>
class RowsPart {
 public:
  using T = T_;
  using P = P_;
  using Acc = typename Accumulation<T>::Type;
  static constexpr bool kVector = true;
  static constexpr int kMaxDimK = kMaxDimK_, kCols = kCols_;
  static constexpr int kVec = 16 / sizeof(P);
  static constexpr int kRun = kVec < 4 ? kVec : 4;  // rows that are summed one after the other
  static constexpr int kLanes = kMaxDimK / kVec < 32 ? kMaxDimK / kVec : 32;
  static constexpr int kVecs = kMaxDimK / kVec / kLanes;  // of a lane, kLanes * kVec rows apart
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = sizeof(T) > 2 ? 2 : kCols * kVecs * kVec > 32 ? 3 : 5;
  static constexpr int kParts = 1;
  static constexpr int kSlice = kThreads / kLanes * kCols;  // columns of E

  struct Token {
    Pack<T, kVec> q[kVecs], k[kVecs];
    Pack<T, kCols> v;
    __device__ __forceinline__ void load(const RowsPart& part, const T* gQ, const T* gK, const T* gV) {
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        if (part.dim(i) >= part.dims_) continue;
        if (gQ != nullptr) load_elements(q[i], gQ + part.dim(i));
        load_elements(k[i], gK + part.dim(i));
      }
#pragma unroll
      for (int col = 0; col < kCols; col += kColsAtOnce) {
        if (col >= part.cols_) continue;
        Pack<T, kColsAtOnce> some;
        load_elements(some, gV + part.col_ + col);
#pragma unroll
        for (int w = 0; w < some.kWords; ++w) v.words[col / kColsAtOnce * some.kWords + w] = some.words[w];
      }
    }
  };
  // Of each column, by the lane's vectors.
  struct Sum {
    Acc x[kVecs * kCols];
  };

  __device__ __forceinline__ RowsPart(int64_t dim_k, int cols)
      : dims_(static_cast<int>(dim_k)), col_(threadIdx.x / kLanes * kCols), cols_(min(max(cols - col_, 0), kCols)) {}

  template <class Any>
  __device__ __forceinline__ void load(const StateView<Any>& state) {
    const Any* const from = state.data + col_ * state.stride_e;
    for_each_vec([&](int col, int i) { load_vec<true, kVec>(s_[col][i], from + col * state.stride_e + dim(i), 1); });
  }
  template <class Any>
  __device__ __forceinline__ void store(const StateView<Any>& state) const {
    Any* const to = state.data + col_ * state.stride_e;
    for_each_vec([&](int col, int i) { store_vec<true, kVec>(to + col * state.stride_e + dim(i), s_[col][i], 1); });
  }

  __device__ __forceinline__ Sum take(const Token& token, Acc decay) {
    Sum sum;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
#pragma unroll
      for (int col = 0; col < kCols; ++col) {
        Acc runs[kVec / kRun] = {};
#pragma unroll
        for (int w = 0; w < kVec; ++w) {
          s_[col][i][w] = update(s_[col][i][w], decay, token.k[i][w], token.v[col]);
          runs[w / kRun] = add_product(runs[w / kRun], token.q[i][w], s_[col][i][w]);
        }
        sum.x[i * kCols + col] = sum_tree<kVec / kRun, 1>(runs);
      }
    }
    return sum;
  }

  __device__ __forceinline__ void leave(Sum sum, Acc* parts) const {
    constexpr int kKept = kept_sums(1, kLanes, kVecs * kCols), kSplits = log2_of(kVecs * kCols / kKept);
    static_assert(kKept <= kCols);
    const int first = sum_over_lanes<1, kLanes>(sum.x);
    // The first splits, by the lowest bits, were between a lane's vectors.
#pragma unroll
    for (int distance = kVecs / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int i = 0; i < kKept; ++i) sum.x[i] += __shfl_xor_sync(0xffffffffu, sum.x[i], distance);
    // One of the lanes that hold the same.
    constexpr int kCopies = (kLanes - 1) & ~((1 << kSplits) - kVecs);
    if ((threadIdx.x & kCopies) != 0) return;
#pragma unroll
    for (int i = 0; i < kKept; ++i) parts[col_ + first % kCols + i] = sum.x[i];
  }

 private:
  static constexpr int kColsAtOnce = kCols < 8 ? kCols : 8;  // of E, a multiple of 8

  __device__ __forceinline__ int dim(int i) const {
    return (static_cast<int>(threadIdx.x) % kLanes + i * kLanes) * kVec;
  }
  template <class Body>
  __device__ __forceinline__ void for_each_vec(const Body& body) const {
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
#pragma unroll
      for (int col = 0; col < kCols; ++col)
        if (col < cols_ && dim(i) < dims_) body(col, i);
  }

  int dims_, col_, cols_;
  Acc s_[kCols][kVecs][kVec] = {};
};

}  // namespace la2::simt
