// bf16 tiles made fp16 in place, for the gradients. fp16 has three bits more, so that no operand has to go in as a sum
// of two (Config::kScales), and a range of its own: each row of a tile is divided by the power of two that brings its
// largest element to the top of that range, and what was divided by comes back in float32, where the results are. The
// notebook is ../DESIGN.md.
//
//   a_i = 2^alpha_i a'_i    b_j = 2^beta_j b'_j    c_j = 2^gamma_j c'_j    Z = 2^zeta Z'    e_j = beta_j + gamma_j
//
//   out_i = 2^(alpha_i + m_i + k) [ 2^(zeta - m_i - k) lambda^n a'_i Z' + sum_j P'_ij c'_j ]
//   P'_ij = lambda^|i-j| 2^(e_j - m_i - k) (a'_i . b'_j)                m_i: the largest e_j - |i-j| log2(1/lambda)
//   Z     = lambda^C Z + 2^m sum_j (lambda^n 2^(e_j - m)) b'_j c'_j^T   m: m_i of the row the sweep leaves the chunk by
//
// so P' fills fp16's range from the top whatever the magnitudes of rows are, and however steep the slope.
#pragma once

#include "steps.cuh"

namespace la2::sm90 {

constexpr int kTopBit = 15;      // a row's largest element lies in [2^15, 2^16): 65280 at most, of 8 bits
constexpr int kScoreBits = 25;   // k: a'_i . b'_j of 128 elements is under 2^39, P' of 256 under 2^15
constexpr int kTokenBits = 60;   // puts rows of a chunk up to 2^186 apart into float32's range
constexpr int kNoToken = -1000;  // e_j of a row of zeros
constexpr int kConverterWarps = 3;

// 2^exponent, or what float32 has nearest to it.
__device__ __forceinline__ float two_to(int exponent) {
  const int normal = min(exponent, 127) + 127;
  return __uint_as_float(normal > 0 ? normal << 23 : (normal > -23 ? 1 << (normal + 22) : 0));
}
// x 2^exponent, also where 2^exponent is none of float32.
__device__ __forceinline__ float times_two_to(float x, int exponent) {
  const int half = exponent / 2;
  return x * two_to(half) * two_to(exponent - half);
}
// of the leading bit; -127 of zero
__device__ __forceinline__ int exponent_of(float x) { return static_cast<int>(__float_as_uint(x) >> 23 & 255) - 127; }

// The exponents of one chunk.
struct alignas(16) Scales {
  float token[kChunk];                        // 2^(e_j - most + kTokenBits)
  int16_t of_a[kChunk], of_second_a[kChunk];  // alpha
  int16_t of_b[kChunk], of_c[kChunk];         // beta, gamma; kNoToken of a row of zeros
  int16_t upto[kChunk];                       // m
  int most;                                   // the largest e_j

  // By one warp, from of_b and of_c. slope_log2: log2(1/lambda).
  __device__ __forceinline__ void fill(float slope_log2, bool reverse, int lane) {
    const float step = reverse ? -slope_log2 : slope_log2;
    int e[2], largest = kNoToken;
    float u[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = 2 * lane + i;
      e[i] = max(of_b[j] + of_c[j], kNoToken);
      largest = max(largest, e[i]);
      u[i] = fmaf(step, static_cast<float>(j), static_cast<float>(e[i]));
    }
    largest = __reduce_max_sync(0xffffffffu, largest);
    // The largest u of all rows up to this one, in the order of the sweep; first of whole lanes.
    float before = fmaxf(u[0], u[1]);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int from = reverse ? lane + distance : lane - distance;
      const float other = __shfl_sync(0xffffffffu, before, from & 31);
      if (from == (from & 31)) before = fmaxf(before, other);
    }
    const float own = reverse ? u[1] : u[0];
    const int neighbor = reverse ? lane + 1 : lane - 1;
    const float others = __shfl_sync(0xffffffffu, before, neighbor & 31);
    const float upto_own = neighbor == (neighbor & 31) ? fmaxf(own, others) : own;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = 2 * lane + i;
      const float all = i == (reverse ? 1 : 0) ? upto_own : before;
      upto[j] = static_cast<int16_t>(max(__float2int_ru(fmaf(-step, static_cast<float>(j), all)), kNoToken));
      token[j] = two_to(e[i] - largest + kTokenBits);
    }
    if (lane == 0) most = largest;
  }
};

// What a state is divided by for its fp16 copy: brings `largest`, which bounds it, to [2^13, 2^14).
__device__ __forceinline__ int state_exponent(float largest) { return min(max(exponent_of(largest) - 13, -126), 113); }

// Of pairs of fp16, none negative, of all lanes of a warp.
__device__ __forceinline__ float largest_of_pairs(uint32_t pairs) {
  const uint32_t bits = __reduce_max_sync(0xffffffffu, max(pairs & 0xffffu, pairs >> 16));  // they compare as integers
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// What the decay takes from a row to the next, in bits; where nothing is left the number does not matter.
__device__ __forceinline__ float bits_of_slope(float slope) { return fminf(slope * 1.44269504f, 2000.f); }

// Some rows of a bf16 tile on their way to fp16, in the registers of a warp.
template <class Tile>
struct RowsInFlight {
  static constexpr int kLanes = Tile::kCols > 128 ? 8 : 4;  // of a row: each has every kLanes-th 16 bytes
  static constexpr int kRows = 32 / kLanes, kVectors = Tile::kCols / 8 / kLanes;
  uint4 values[kVectors];
  uint32_t largest;  // pairs of magnitudes as integers, 0x80 too large; those that are not finite negative
  tile::SwizzledAddress<Tile> at;

  // `batch`: of kRows rows. Rows from `rows` on become zero. Four lanes have half of the banks: of rows whose swizzle
  // differs in that bit, eight have all.
  __device__ __forceinline__ int row_of(int batch, int lane) const {
    const int group = lane / kLanes;
    return batch * kRows + (kLanes == 4 ? (group & 1) * 4 + group / 2 : group);
  }
  __device__ __forceinline__ RowsInFlight(uint32_t tile, int batch, int rows, int lane)
      : largest(0), at{tile + Tile::offset(row_of(batch, lane), lane % kLanes)} {
    const bool is_there = row_of(batch, lane) < rows;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      values[i] = {0, 0, 0, 0};
      if (is_there) values[i] = *static_cast<const uint4*>(__cvta_shared_to_generic(at.at(0, i * kLanes)));
    }
  }
  __device__ __forceinline__ void find_largest() {
    auto magnitudes = [](uint32_t pair) { return (pair & 0x7fff7fffu) + 0x00800080u; };
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t two = __vmaxs2(magnitudes(values[i].x), magnitudes(values[i].y));
      largest = __vimax3_s16x2(largest, two, __vmaxs2(magnitudes(values[i].z), magnitudes(values[i].w)));
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) largest = __vmaxs2(largest, __shfl_xor_sync(~0u, largest, step));
  }
  __device__ __forceinline__ void store(int16_t* exponents, int batch, int lane) {
    const int magnitude = max(static_cast<int>(max(largest & 0xffffu, largest >> 16)) - 0x80, 0);
    // bf16 ends at 2^127 above and the factor at 2^126: what is smaller than that keeps all its bits anyway
    const int exponent = max((magnitude >> 7) - 127 - kTopBit, -126);
    if (lane % kLanes == 0) exponents[row_of(batch, lane)] = static_cast<int16_t>(magnitude == 0 ? kNoToken : exponent);
    const uint32_t factor = static_cast<uint32_t>(127 - exponent) * 0x00800080u;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      uint32_t pairs[4] = {values[i].x, values[i].y, values[i].z, values[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 scaled = tile::unpack<__nv_bfloat16>(tile::multiply_bf16(pairs[j], factor));
        pairs[j] = tile::pack<__half>(scaled.x, scaled.y);
      }
      *static_cast<uint4*>(__cvta_shared_to_generic(at.at(0, i * kLanes))) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  }
};

// Rows of two tiles to fp16 in place, those from `rows` on to zero, by `warp` of kConverterWarps; two for the time that
// one takes. Tiles of unlike width go one after the other.
template <class Tile, class Second>
__device__ __forceinline__ void convert_rows(uint32_t tile, int16_t* exponents, uint32_t second,
                                             int16_t* second_exponents, int rows, int warp, int lane) {
  using First = RowsInFlight<Tile>;
  using Other = RowsInFlight<Second>;
  constexpr bool kTogether = First::kRows == Other::kRows;
#pragma unroll 1
  for (int batch = warp; batch < kChunk / First::kRows; batch += kConverterWarps) {
    First x(tile, batch, rows, lane);
    if constexpr (kTogether) {
      Other y(second, batch, rows, lane);
      x.find_largest();
      y.find_largest();
      x.store(exponents, batch, lane);
      y.store(second_exponents, batch, lane);
    } else {
      x.find_largest();
      x.store(exponents, batch, lane);
    }
  }
  if constexpr (!kTogether) {
#pragma unroll 1
    for (int batch = warp; batch < kChunk / Other::kRows; batch += kConverterWarps) {
      Other y(second, batch, rows, lane);
      y.find_largest();
      y.store(second_exponents, batch, lane);
    }
  }
}
template <class Tile>
__device__ __forceinline__ void convert_rows(uint32_t tile, int16_t* exponents, int rows, int warp, int lane) {
  using First = RowsInFlight<Tile>;
#pragma unroll 1
  for (int batch = warp; batch < kChunk / First::kRows; batch += kConverterWarps) {
    First x(tile, batch, rows, lane);
    x.find_largest();
    x.store(exponents, batch, lane);
  }
}

// ---- steps of a chunk

// The job's factors without their powers of two, which fp16 has no room for.
struct ScaledWeights : Weights {
  int inter_exponent, intra_exponent;

  __device__ void fill(float slope, float inter, float intra, bool reverse, int thread, int num_threads) {
    const int of_inter = exponent_of(inter) + 1, of_intra = exponent_of(intra) + 1;  // to [1/2, 1)
    Weights::fill(slope, times_two_to(inter, -of_inter), times_two_to(intra, -of_intra), reverse, thread, num_threads);
    if (thread == 0) {
      inter_exponent = of_inter;
      intra_exponent = of_intra;
    }
  }
};

// P' as A operand.
__device__ __forceinline__ void mask_scaled_scores(uint32_t (&masked)[kChunk / 16][4],
                                                   const Accumulators<kChunk / 2>& p, const ScaledWeights& weights,
                                                   const Scales& scales, const WarpgroupLane& me) {
  const int row = me.warp * 16 + me.group;
  const float* mask = weights.mask() + (row - me.pair * 2);
  const float2* tokens = reinterpret_cast<const float2*>(scales.token) + me.pair;
  // 2^(most - m_i), and what the scores and the tokens' factors have too much
  const float rows[2] = {two_to(scales.most - scales.upto[row] - kScoreBits - kTokenBits),
                         two_to(scales.most - scales.upto[row + 8] - kScoreBits - kTokenBits)};
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
    const float2 token = tokens[4 * n];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int x = 8 * half - 8 * n, i = 2 * (n % 2) + half;
      masked[n / 2][i] = tile::pack<__half>(p[4 * n + 2 * half] * token.x * (mask[x] * rows[half]),
                                            p[4 * n + 2 * half + 1] * token.y * (mask[x - 1] * rows[half]));
    }
  }
}

// Of a row of out: 2^exponent [inter a'Z' + P'c'], but for alpha.
struct RowScale {
  float inter;
  int exponent;

  // inter: lambda^n times the job's factor; zeta: of the state.
  __device__ __forceinline__ RowScale(const ScaledWeights& weights, const Scales& scales, int zeta, bool reverse,
                                      int rows, int row) {
    const float weight = row_weight(weights, reverse, rows, row);
    const int own = scales.upto[row] + kScoreBits;
    const int ahead = zeta + weights.inter_exponent - own - weights.intra_exponent;  // of the state
    // 2^80 ahead, what the chunk adds is nothing, and float32 would end.
    const int dropped = max(ahead + exponent_of(weight) - 80, 0);
    inter = times_two_to(weight, min(ahead - dropped, 254));
    exponent = own + weights.intra_exponent + dropped;
  }
  __device__ __forceinline__ float last(int alpha) const { return two_to(exponent + alpha); }
};

}  // namespace la2::sm90
