// SiLU of a chunk's operands where the copies have left them in shared memory, before anyone reads them: a role of
// warps that copy nothing. Else q, k and v would go to memory and back for it, which takes longer than the operator.
#pragma once

#include "../tile/silu.cuh"
#include "steps.cuh"

namespace la2::sm90 {

// SiLU of elements that lie side by side, by `threads` threads; zeros stay zeros. A unit of 16 bytes waits for longer
// than it computes: two are under way at once.
template <class T>
__device__ __forceinline__ void activate_units(uint4* units, int count, int thread, int threads) {
  auto activate = [](const uint4& x) {
    return make_uint4(tile::silu_pair<T>(x.x), tile::silu_pair<T>(x.y), tile::silu_pair<T>(x.z),
                      tile::silu_pair<T>(x.w));
  };
  int i = thread;
#pragma unroll 1
  for (; i + threads < count; i += 2 * threads) {
    const uint4 first = units[i], second = units[i + threads];
    const uint4 first_result = activate(first), second_result = activate(second);
    units[i] = first_result;
    units[i + threads] = second_result;
  }
  if (i < count) units[i] = activate(units[i]);
}

// From where a stage's copies have arrived (`landed`) to where it is full. thread: of 32 kWarps.
template <class T, int kWarps, class AnyStage>
__device__ __forceinline__ void activate_stage(AnyStage& stage, int silu, uint64_t& landed, uint64_t& full,
                                               uint32_t parity, int thread) {
  constexpr int kUnitsOfA = AnyStage::kHasA ? sizeof(stage.b) / 16 : 0, kUnitsOfB = sizeof(stage.b) / 16;
  constexpr int kUnitsOfC = sizeof(stage.c) / 16;
  static_assert(sizeof(AnyStage) == 16 * (kUnitsOfA + kUnitsOfB + kUnitsOfC), "b, a and c lie side by side");
  uint4* const units = reinterpret_cast<uint4*>(&stage);
  ptx::mbarrier_wait(shared_address(&landed), parity);
  const int of_b = silu & kSiluK ? kUnitsOfB : 0, of_a = silu & kSiluQ ? kUnitsOfA : 0;
  const int of_c = silu & kSiluV ? kUnitsOfC : 0;
  const int first = of_b > 0 ? 0 : kUnitsOfB;
  const bool is_one_piece = of_a == kUnitsOfA;  // with c behind b or a
  activate_units<T>(units + first, of_b + of_a + (is_one_piece ? of_c : 0), thread, 32 * kWarps);
  if (!is_one_piece) activate_units<T>(units + kUnitsOfB + kUnitsOfA, of_c, thread, 32 * kWarps);
  ptx::fence_proxy_async();  // the tensor core reads what threads wrote
  // Every thread for what it wrote: racecheck does not see that one stands for its warp. It costs no time.
  ptx::mbarrier_arrive(shared_address(&full));
}

}  // namespace la2::sm90
