// What warpgroups of sm_90 need besides their products: registers, barriers.
#pragma once

#include <stdint.h>

namespace la2::ptx {

// Hands registers back or takes them (PTX ISA "setmaxnreg"; every warp of a warpgroup, sm_90a). ptxas honours it only
// where the kernel has a register cap at entry and each role is a branch of one if/else.
template <int kRegisters>
__device__ __forceinline__ void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_acquire() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barrier `id` (1..15; 0 is __syncthreads) among `threads` threads, whole warps.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts these threads as arrived there and goes on. What they wrote before is seen behind the barrier.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A value that all lanes have, in a form that the compiler knows it from: descriptors made of it stay in uniform
// registers, from where wgmma takes them.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// True in one lane of a converged warp, always the same. What only that lane does takes uniform registers without a
// loop over the lanes, which a comparison of lane numbers would get.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n}"
      : "=r"(elected));
  return elected != 0;
}

// A float of shared memory to all lanes of the warp, read by lane 0 alone.
__device__ __forceinline__ float broadcast_shared(uint32_t shared) {
  float value;
  asm volatile(
      "{\n.reg .pred first;\n.reg .u32 lane;\n.reg .b32 bits;\nmov.b32 bits, 0;\nmov.u32 lane, %%laneid;\n"
      "setp.eq.u32 first, lane, 0;\n@first ld.shared.b32 bits, [%1];\n"
      "shfl.sync.idx.b32 bits, bits, 0, 31, -1;\nmov.b32 %0, bits;\n}"
      : "=f"(value)
      : "r"(shared)
      : "memory");
  return value;
}

}  // namespace la2::ptx
