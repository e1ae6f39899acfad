// What will be read soon, into L2 (sm_90; PTX ISA "cp.async.bulk.prefetch.L2"). Nothing on older GPUs.
#pragma once

#include <stdint.h>

namespace la2::ptx {

// from and bytes: multiples of 16.
__device__ __forceinline__ void prefetch_into_l2(const void* from, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
#endif
}

}  // namespace la2::ptx
