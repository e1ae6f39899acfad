// Which instruction set this machine gets.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace la2::cpu {

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* limit = std::getenv("LA2_CPU");
  auto is_limit = [&](const char* name) { return limit && std::strcmp(limit, name) == 0; };
  if (is_limit("baseline")) return kernels_baseline;

  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && !is_limit("avx2")) return kernels_avx512;
  if (has_avx2) return kernels_avx2;
#endif
  return kernels_baseline;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace la2::cpu
