// One instance of the sm80 kernel: a translation unit of its own, written by CMake (LA2_INSTANCE_NAME, and the
// arguments of Config as LA2_DTYPE, LA2_TILE_A, LA2_SLICE, LA2_SPLIT, LA2_SLOPE_GRAD).
#include "core/tile.h"
#include "kernels/simt/launch_overlapping.h"
#include "kernels/sm80/launch_instance.h"
#include "kernels/sm80/trilinear.cuh"

namespace la2::sm80 {
namespace {

using bf16 = __nv_bfloat16;  // the list's names
using fp16 = __half;

template <class Cfg>
cudaError_t launch(TrilinearParams params, bool overlaps, cudaStream_t stream) {
  int64_t slices = 0;
  for (int i = 0; i < params.num_jobs; ++i) {
    const int64_t needed = (params.jobs[i].dim_c + Cfg::kSlice - 1) / Cfg::kSlice;
    if (needed > slices) slices = needed;
  }
  for (int i = 0; i < params.num_jobs; ++i) params.jobs[i].by_slices = Division::by(slices > 0 ? slices : 1);
  const int64_t blocks = slices * params.sizes.heads * params.num_units;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = la2_trilinear_sm80_kernel<Cfg>;
  constexpr int kShared = sizeof(SharedStorage<Cfg>);
  constexpr int kPlanned = sm80_shared_bytes({Cfg::kTileA, Cfg::kSlice, Cfg::kChunk}, Cfg::kSlopeGrad);
  static_assert(Cfg::kStateOnly ? kShared <= kPlanned : kShared == kPlanned, "the planner counts on it");
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
      error != cudaSuccess)
    return error;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(params.num_jobs));
  return simt::launch_overlapping(kernel, grid, Cfg::kThreads, kShared, overlaps, stream, params);
}

}  // namespace

cudaError_t LA2_INSTANCE_FUNCTION(LA2_INSTANCE_NAME)(const TrilinearParams& params, const LaunchOptions& options,
                                                     cudaStream_t stream) {
  using Main = Config<LA2_DTYPE, LA2_TILE_A, LA2_SLICE, LA2_SPLIT, LA2_SLOPE_GRAD, false>;
  if (!options.state_only) return launch<Main>(params, options.overlaps, stream);
  if constexpr (!LA2_SLOPE_GRAD)
    return launch<Config<LA2_DTYPE, LA2_TILE_A, LA2_SLICE, LA2_SPLIT, false, true>>(params, options.overlaps, stream);
  return cudaErrorInvalidDeviceFunction;  // the instance without it serves the state pass
}

}  // namespace la2::sm80
