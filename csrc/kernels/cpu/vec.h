// Vectors of the instruction set this file is compiled for: GCC vector extensions, one width
// (LA2_VEC_BYTES), two lane types (float, double), and the four storage types that are loaded into them.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../params.h"

#if LA2_VEC_BYTES > 16
#include <immintrin.h>
#endif

#define LA2_INLINE inline __attribute__((always_inline))
#define LA2_UNROLL _Pragma("GCC unroll 16")

namespace la2::cpu {
namespace {

template <class T>
struct VecOf {
  typedef T Type __attribute__((vector_size(LA2_VEC_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::Type;

template <class T>
constexpr int kLanes = LA2_VEC_BYTES / static_cast<int>(sizeof(T));

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
template <class T>
constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}

// Any alignment.
template <class T>
LA2_INLINE Vec<T> load(const T* p) {
  Vec<T> x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
template <class T>
LA2_INLINE void store(T* p, Vec<T> x) {
  __builtin_memcpy(p, &x, sizeof(x));
}

// 0, 1, 2, ...
template <class T>
LA2_INLINE Vec<T> lane_numbers() {
  Vec<T> x = {};
  LA2_UNROLL
  for (int lane = 0; lane < kLanes<T>; ++lane) x[lane] = static_cast<T>(lane);
  return x;
}

LA2_INLINE double sum_lanes(Vec<double> x) {
  double sum = 0;
  LA2_UNROLL
  for (int lane = 0; lane < kLanes<double>; ++lane) sum += x[lane];
  return sum;
}

// Lanes of float folded onto lanes of double.
LA2_INLINE Vec<double> fold_to_double(Vec<float> x) {
  typedef float Half __attribute__((vector_size(LA2_VEC_BYTES / 2)));
  Half halves[2];
  __builtin_memcpy(halves, &x, sizeof(x));
  return __builtin_convertvector(halves[0], Vec<double>) + __builtin_convertvector(halves[1], Vec<double>);
}
LA2_INLINE Vec<double> fold_to_double(Vec<double> x) { return x; }

// Storage: how an element type in memory becomes lanes of Acc and back, rounding to nearest even.
typedef uint16_t Bits16 __attribute__((vector_size(LA2_VEC_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(LA2_VEC_BYTES)));

template <class T>
struct Plain {
  using Element = T;
  using Acc = T;
  static LA2_INLINE Vec<T> widen(Vec<T> x) { return x; }
  static LA2_INLINE Vec<T> narrow(Vec<T> x) { return x; }
  using Narrow = Vec<T>;
};
using Float32 = Plain<float>;
using Float64 = Plain<double>;

struct BFloat16 {
  using Element = uint16_t;
  using Acc = float;
  using Narrow = Bits16;
  static LA2_INLINE Vec<float> widen(Bits16 x) { return (Vec<float>)(__builtin_convertvector(x, Bits32) << 16); }
  static LA2_INLINE Bits16 narrow(Vec<float> x) {
    const Bits32 bits = (Bits32)x;
    const Bits32 is_nan = (Bits32)(x != x);
    const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), Bits16);
  }
};

struct Float16 {
  using Element = uint16_t;
  using Acc = float;
  using Narrow = Bits16;
#if LA2_VEC_BYTES == 64
  // The masked forms with all lanes on: GCC 12 warns of the undefined register in its own plain ones.
  static LA2_INLINE Vec<float> widen(Bits16 x) { return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)x); }
  static LA2_INLINE Bits16 narrow(Vec<float> x) {
    return (Bits16)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#elif LA2_VEC_BYTES == 32
  static LA2_INLINE Vec<float> widen(Bits16 x) { return (Vec<float>)_mm256_cvtph_ps((__m128i)x); }
  static LA2_INLINE Bits16 narrow(Vec<float> x) {
    return (Bits16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#else
  static LA2_INLINE Bits32 select(Bits32 mask, Bits32 a, Bits32 b) { return (mask & a) | (~mask & b); }
  static LA2_INLINE Vec<float> widen(Bits16 x) {
    const Bits32 half = __builtin_convertvector(x, Bits32);
    const Bits32 magnitude = (half & 0x7fffu) << 13;
    const Bits32 rebias = (half & 0x7c00u) == 0x7c00u ? Bits32{} + (224u << 23) : Bits32{} + (112u << 23);
    // A subnormal half is a multiple of 2^-24: put it behind a leading one at 2^-14 and take that away.
    const Bits32 one = Bits32{} + (113u << 23);
    const Bits32 subnormal = (Bits32)((Vec<float>)(magnitude | one) - (Vec<float>)one);
    const Bits32 is_subnormal = (Bits32)((half & 0x7c00u) == 0u);
    return (Vec<float>)(select(is_subnormal, subnormal, magnitude + rebias) | ((half & 0x8000u) << 16));
  }
  static LA2_INLINE Bits16 narrow(Vec<float> x) {
    const Bits32 bits = (Bits32)x;
    const Bits32 magnitude = bits & 0x7fffffffu;
    const Bits32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14 the adder itself rounds to a multiple of 2^-24, the spacing of floats at 0.5.
    const Bits32 half_one = Bits32{} + 0x3f000000u;
    const Bits32 subnormal = (Bits32)((Vec<float>)magnitude + (Vec<float>)half_one) - half_one;
    const Bits32 special = select((Bits32)(x != x), Bits32{} + 0x7e00u, Bits32{} + 0x7c00u);
    Bits32 half = select((Bits32)(magnitude < (113u << 23)), subnormal, normal);
    half = select((Bits32)(magnitude >= (143u << 23)), special, half);
    return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Bits16);
  }
#endif
};

// kLanes elements, or, where `half`, the first kLanes / 2 and zeros: head dims are multiples of 8 and no
// vector is longer than 16 lanes, so a row ends at a full or at a half vector.
template <class S>
LA2_INLINE Vec<typename S::Acc> load_elements(const typename S::Element* p, bool half) {
  typename S::Narrow x = {};
  if (half) {
    __builtin_memcpy(&x, p, sizeof(x) / 2);
  } else {
    __builtin_memcpy(&x, p, sizeof(x));
  }
  return S::widen(x);
}
template <class S>
LA2_INLINE void store_elements(typename S::Element* p, Vec<typename S::Acc> value, bool half) {
  const typename S::Narrow x = S::narrow(value);
  if (half) {
    __builtin_memcpy(p, &x, sizeof(x) / 2);
  } else {
    __builtin_memcpy(p, &x, sizeof(x));
  }
}

// Lanes of a and b in turn: the first halves, the second halves.
#if LA2_VEC_BYTES == 64
LA2_INLINE Vec<float> interleave_low(Vec<float> a, Vec<float> b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
LA2_INLINE Vec<float> interleave_high(Vec<float> a, Vec<float> b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
LA2_INLINE Vec<double> interleave_low(Vec<double> a, Vec<double> b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
LA2_INLINE Vec<double> interleave_high(Vec<double> a, Vec<double> b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#elif LA2_VEC_BYTES == 32
LA2_INLINE Vec<float> interleave_low(Vec<float> a, Vec<float> b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
LA2_INLINE Vec<float> interleave_high(Vec<float> a, Vec<float> b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
LA2_INLINE Vec<double> interleave_low(Vec<double> a, Vec<double> b) {
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}
LA2_INLINE Vec<double> interleave_high(Vec<double> a, Vec<double> b) {
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}
#else
LA2_INLINE Vec<float> interleave_low(Vec<float> a, Vec<float> b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
LA2_INLINE Vec<float> interleave_high(Vec<float> a, Vec<float> b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
LA2_INLINE Vec<double> interleave_low(Vec<double> a, Vec<double> b) { return __builtin_shufflevector(a, b, 0, 2); }
LA2_INLINE Vec<double> interleave_high(Vec<double> a, Vec<double> b) { return __builtin_shufflevector(a, b, 1, 3); }
#endif

// A square block of kLanes vectors, transposed in registers: log2(kLanes) rounds of interleaving row i with
// row i + kLanes / 2.
template <class T>
LA2_INLINE void transpose_square(Vec<T> (&x)[kLanes<T>]) {
  constexpr int kHalf = kLanes<T> / 2;
  LA2_UNROLL
  for (int round = 1; round < kLanes<T>; round *= 2) {
    Vec<T> y[kLanes<T>];
    LA2_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      y[2 * i] = interleave_low(x[i], x[i + kHalf]);
      y[2 * i + 1] = interleave_high(x[i], x[i + kHalf]);
    }
    LA2_UNROLL
    for (int i = 0; i < kLanes<T>; ++i) x[i] = y[i];
  }
}

}  // namespace
}  // namespace la2::cpu
