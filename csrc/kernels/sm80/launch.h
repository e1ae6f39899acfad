// Host entry of the sm80 family (bf16 and fp16; csrc/kernels/trilinear.h says what is computed).
#pragma once

#include <cuda_runtime_api.h>

#include "../trilinear.h"

namespace la2::sm80 {

// Which instance: Da rounded up to tile_a and slices of Dc columns as the planner chose (csrc/core/plan.h), split
// operands for gradients, with or without the slope gradient's dots.
struct Instance {
  DType dtype;
  int tile_a, slice;
  bool split, slope_grad;
};

struct LaunchOptions {
  bool state_only = false;   // gathers the segments' states into job.local; the main pass does everything else
  bool overlaps = false;     // compute capability 9.0 and later: may start before the kernel before it is done
  bool in_one_pass = false;  // all passes of a forward in one kernel, whose blocks are all resident (one_pass.cuh)
};

// Rows must be 16-byte aligned (base, strides). cudaErrorInvalidDeviceFunction: no such instance was built.
// cudaErrorCooperativeLaunchTooLarge: not all blocks of one pass can be resident, and nothing was done.
cudaError_t launch_trilinear(const TrilinearParams& params, const Instance& instance, const LaunchOptions& options,
                             cudaStream_t stream);

}  // namespace la2::sm80
