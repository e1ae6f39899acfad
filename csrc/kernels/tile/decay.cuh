// Powers of lambda by signed distance.
#pragma once

#include "../../core/decay.h"

namespace la2::tile {

// ascending(x) = lambda^x for x >= 0, descending(x) = lambda^-x for x <= 0, both 0 on the other side. Causal masks,
// tails and both directions of the sweep are then plain look-ups at a lane's base plus a constant.
template <int kChunk>
struct Decay {
  float ascending_[2 * kChunk + 1], descending_[2 * kChunk + 1];  // x = -C .. C

  __device__ const float* ascending() const { return ascending_ + kChunk; }
  __device__ const float* descending() const { return descending_ + kChunk; }
  // Along the sweep: from an earlier row to a later one; and against it.
  __device__ const float* along(bool reverse) const { return reverse ? descending() : ascending(); }
  __device__ const float* against(bool reverse) const { return reverse ? ascending() : descending(); }

  __device__ void fill(float slope, int thread, int num_threads) {
    for (int x = thread; x <= kChunk; x += num_threads) {
      const float power = rounded_decay_power(slope, x), acausal = x == 0 ? power : 0.f;
      ascending_[kChunk + x] = descending_[kChunk - x] = power;
      ascending_[kChunk - x] = descending_[kChunk + x] = acausal;
    }
  }
};

}  // namespace la2::tile
