// One instance of the sm80 kernel: a translation unit of its own, written by CMake (LA2_INSTANCE_NAME, and the
// arguments of Config as LA2_DTYPE, LA2_TILE_A, LA2_SLICE, LA2_SPLIT, LA2_SLOPE_GRAD).
#include "core/tile.h"
#include "kernels/simt/launch_overlapping.h"
#include "kernels/sm80/launch_instance.h"
#include "kernels/sm80/one_pass.cuh"
#include "kernels/sm80/trilinear.cuh"
#include "kernels/sm80/two_roles.cuh"

namespace la2::sm80 {
namespace {

using bf16 = __nv_bfloat16;  // the list's names
using fp16 = __half;

constexpr int kMostShared = 163 * 1024;  // of a block of compute capability 8.0

template <class Kernel>
cudaError_t allow_shared(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <class Cfg>
cudaError_t launch(TrilinearParams params, const LaunchOptions& options, cudaStream_t stream) {
  int64_t slices = 0;
  for (int i = 0; i < params.num_jobs; ++i) {
    const int64_t needed = (params.jobs[i].dim_c + Cfg::kSlice - 1) / Cfg::kSlice;
    if (needed > slices) slices = needed;
  }
  for (int i = 0; i < params.num_jobs; ++i) params.jobs[i].by_slices = Division::by(slices > 0 ? slices : 1);
  const int64_t jobs_in_x = Cfg::kAhead ? params.num_jobs : 1;
  const int64_t blocks = slices * params.sizes.heads * params.num_units * jobs_in_x;
  if (blocks == 0) return cudaSuccess;
  if (Cfg::kTwoRoles && (params.num_jobs != 1 || params.jobs[0].reverse)) return cudaErrorInvalidConfiguration;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(params.num_jobs / jobs_in_x),
                  Cfg::kStateOnly ? static_cast<unsigned>(params.num_pieces) : 1);
  if (options.in_one_pass) {
    if constexpr (kHasOnePass<Cfg>) {
      constexpr int kShared = sizeof(OnePassStorage<Cfg>);
      static_assert(kShared <= kMostShared, "compute capability 8.0 has no more");
      const auto kernel = la2_one_pass_sm80_kernel<Cfg>;
      if (const cudaError_t error = allow_shared(kernel, kShared); error != cudaSuccess) return error;
      return simt::launch_together(kernel, grid, Cfg::kThreads, kShared, stream, params);
    }
    return cudaErrorInvalidDeviceFunction;
  }
  const auto kernel = [] {
    if constexpr (Cfg::kTwoRoles)
      return la2_two_roles_sm80_kernel<Cfg>;
    else
      return la2_trilinear_sm80_kernel<Cfg>;
  }();
  constexpr int kShared = sizeof(SharedStorage<Cfg>);
  constexpr int kPlanned = sm80_shared_bytes({Cfg::kTileA, Cfg::kSlice, Cfg::kChunk}, Cfg::kSlopeGrad);
  static_assert(Cfg::kStateOnly || Cfg::kTwoRoles ? kShared <= kPlanned : kShared == kPlanned,
                "the planner counts on it");
  if (const cudaError_t error = allow_shared(kernel, kShared); error != cudaSuccess) return error;
  return simt::launch_overlapping(kernel, grid, Cfg::kThreads, kShared, options.overlaps, stream, params);
}

}  // namespace

cudaError_t LA2_INSTANCE_FUNCTION(LA2_INSTANCE_NAME)(const TrilinearParams& params, const LaunchOptions& options,
                                                     cudaStream_t stream) {
  using Main = Config<LA2_DTYPE, LA2_TILE_A, LA2_SLICE, LA2_SPLIT, LA2_SLOPE_GRAD, false>;
  if (!options.state_only) return launch<Main>(params, options, stream);
  if constexpr (!LA2_SLOPE_GRAD)
    return launch<Config<LA2_DTYPE, LA2_TILE_A, LA2_SLICE, LA2_SPLIT, false, true>>(params, options, stream);
  return cudaErrorInvalidDeviceFunction;  // the instance without it serves the state pass
}

}  // namespace la2::sm80
