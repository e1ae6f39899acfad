// Host entries of the sm90 family: bf16 and fp16 on GPUs of compute capability 9.0 (csrc/kernels/trilinear.h says what
// is computed).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../../core/tile.h"
#include "../trilinear.h"

namespace la2::sm90 {

// Tensor maps of a job's operands, boxes of [64, 64] (a, b, c) and [16, 64] (out).
struct JobMaps {
  CUtensorMap a, b, c, out;
};
struct TrilinearMaps {
  JobMaps jobs[kMaxJobs];
};

// Which of the operands that are rounded from float32 go in as a sum of two 16-bit numbers: the state, and the weighted
// c. Gradients need it for an error below that of their own rounding (../DESIGN.md); out does not, and dq does without
// the second half of c where it has an instance of its own (sm90_has_dq).
enum class Split { kNone, kState, kStateAndValues };

// Which instance: Da rounded up to tile_a, slices of Dc; both: jobs[1] is T(a', c, b) where jobs[0] is T(a, b, c),
// sweeps alike and is computed along with it, from the same state (dk and dv). silu: takes SiLU of the operands that
// jobs[0].silu names.
struct Instance {
  DType dtype;
  int tile_a, slice;
  Split split;
  bool both, silu;
};

// The gradients' state pass splits both; its instances go with those of the main pass that every shape has.
constexpr Split split_of(bool gradients) { return gradients ? Split::kStateAndValues : Split::kNone; }
constexpr Split split_of_dq(const Tile& tile) { return sm90_has_dq(tile) ? Split::kState : Split::kStateAndValues; }

struct LaunchOptions {
  int64_t max_blocks = 0;       // of a job; a block takes every max_blocks-th item. 0: a block for each item
  bool state_only = false;      // gathers the segments' states into job.local; the main pass does everything else
  bool in_one_pass = false;     // all passes in one kernel, whose blocks are all resident: out in slices of 64
  bool overlaps = false;        // may start before the kernel before it is done
  bool reads_previous = false;  // and then waits for it: out where it reads states, gradients before all else
};

// Rows must be 16-byte aligned (base, strides). cudaErrorInvalidDeviceFunction: no such instance was built.
// cudaErrorCooperativeLaunchTooLarge: not all blocks can be resident, nothing was launched.
cudaError_t launch_trilinear(const TrilinearParams& params, const Instance& instance, const LaunchOptions& options,
                             cudaStream_t stream);

}  // namespace la2::sm90
