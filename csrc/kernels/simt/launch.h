// Entry points of the simt family: plain CUDA on every sm_80 and later. Every one enqueues on `stream`, allocates
// nothing, keeps no reference to host memory, and returns what the launch returned; cudaErrorInvalidConfiguration:
// more blocks than a grid holds (2^31 - 1); cudaErrorInvalidValue: a dtype or dim it has no kernel for.
#pragma once

#include <cuda_runtime.h>

#include "../trilinear.h"

namespace la2::simt {

// Tokens of a chunk: segment_len is a multiple of it, and the dots' slots count in it.
constexpr int kChunk = 32;

// Columns of Dc of one block; a job has ceil(dim_c / slice_dim) slices, and its dots as many.
constexpr int slice_dim(bool is_double) { return is_double ? 32 : 64; }

// Runs the jobs of `params` (trilinear.h) in float32 or float64, one launch for all of them; dims are multiples of 8
// up to 256. Where params.is_cut, launch_state_pass and launch_combine come before.
cudaError_t launch_trilinear(const TrilinearParams& params, DType dtype, cudaStream_t stream);

// Fills job.local of every job: what each segment gathers from a zero state. The last segment of a sequence (in the
// order of the job's sweep) is left out, since nobody reads it. Uses a job's b, c, update, reverse, dims and local.
cudaError_t launch_state_pass(const TrilinearParams& params, DType dtype, cudaStream_t stream);

// Turns the states that a state pass (of any family) left in job.local of every job into the states entering each
// segment. job.local is contiguous over [Da, Dc], or opaque (params.local_floats). is_double: states are float64, else
// float32. overlaps: may start before the state pass is done (compute capability 9.0), and waits for it.
cudaError_t launch_combine(const TrilinearParams& params, bool is_double, bool overlaps, cudaStream_t stream);

// The slope gradient from the dots the dq and dk jobs left, and from the states' gradients, summed in float64.
struct SlopeGradParams {
  Sizes sizes;
  SeqOffsets cu_seqlens;
  int64_t chunk;       // of the kernels that wrote the dots
  const void* dots_q;  // [num_chunk_slots, H, slices_q, 3], of the dq job
  const void* dots_k;  // [num_chunk_slots, H, slices_k, 3], of the dk job
  int64_t slices_q, slices_k;
  State initial_state;       // [num_seqs, H, D, E]; absent: zero
  State grad_initial_state;  // needed where initial_state is there
  void* grad_slope;          // [num_seqs, H] contiguous; is_shared: [H], summed over the sequences
  bool is_shared;
  bool is_double;  // dots, states and grad_slope are float64, else float32
};
cudaError_t launch_slope_grad(const SlopeGradParams& params, cudaStream_t stream);

// Tokens against a pool of states (params.h). Slots outside [0, params.slots) are padding. No two rows may name the
// same slot where states are written. overlaps: as of launch_combine.
cudaError_t launch_recurrent(const RecurrentParams& params, bool overlaps, cudaStream_t stream);

// Behind launch_recurrent of one token, whose outputs are its x (params.h). overlaps: it reads gate and weight before
// that kernel is done, so these may not be the work of the kernel right before it, unless that one waits like
// launch_recurrent for all that came earlier.
cudaError_t launch_gated_norm(const GatedNormParams& params, bool overlaps, cudaStream_t stream);

}  // namespace la2::simt
