// Programmatic dependent launch (sm_90; PTX ISA "griddepcontrol"): the order of kernels on a stream, loosened. Nothing
// on older GPUs, nor where the launch did not ask for it.
#pragma once

namespace la2::ptx {

// The next kernel of the stream may start, once all blocks of this one have said so.
__device__ __forceinline__ void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The kernel before this one is complete and its writes are visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace la2::ptx
