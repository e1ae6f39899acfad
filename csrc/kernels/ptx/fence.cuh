// Orders what the compiler or the hardware may reorder.
#pragma once

#include <stdint.h>

namespace la2::ptx {

// No memory access moves across; no instruction is made. Bounds how many loads are in flight, and so the registers
// they need.
__device__ __forceinline__ void scheduling_fence() { asm volatile("" ::: "memory"); }

// The same value, of which the compiler knows nothing: what is computed from it is computed here, and not kept in
// registers across a loop around it.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

__device__ __forceinline__ int64_t opaque_wide(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

// This thread's ordinary writes to shared memory before, reads of them by wgmma and by the copy engine (the async
// proxy) after. A barrier between writer and reader must follow.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace la2::ptx
