// Orders what the compiler may not reorder.
#pragma once

namespace la2::ptx {

// No memory access moves across; no instruction is made. Bounds how many loads are in flight, and so the registers
// they need.
__device__ __forceinline__ void scheduling_fence() { asm volatile("" ::: "memory"); }

}  // namespace la2::ptx
