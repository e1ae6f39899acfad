// The functions behind the instances that CMake lists, one in each translation unit, and how they launch.
#pragma once

#include <cuda_runtime_api.h>

#include "launch.h"

#define LA2_INSTANCE_FUNCTION_(name) launch_##name
#define LA2_INSTANCE_FUNCTION(name) LA2_INSTANCE_FUNCTION_(name)

namespace la2::sm90 {

// Sets the jobs' by_slices. Blocks along x, for the first walked_jobs of them: as many as there are items or as
// options.max_blocks allows.
inline int64_t blocks_of_items(TrilinearParams& params, const LaunchOptions& options, int slice, int walked_jobs) {
  int64_t most_slices = 0;
  for (int i = 0; i < params.num_jobs; ++i) {
    const int64_t slices = (params.jobs[i].dim_c + slice - 1) / slice;
    params.jobs[i].by_slices = Division::by(slices > 0 ? slices : 1);
    if (i < walked_jobs && slices > most_slices) most_slices = slices;
  }
  const int64_t items =
      most_slices * params.sizes.heads * params.num_units * (options.state_only ? params.num_pieces : 1);
  if (items > INT32_MAX) return items;  // they are counted in 32 bits: launch_kernel refuses
  return options.max_blocks > 0 && items > options.max_blocks ? options.max_blocks : items;
}

template <class Kernel, class... Args>
cudaError_t launch_kernel(Kernel kernel, int64_t blocks, int jobs, int threads, size_t shared_bytes,
                          const LaunchOptions& options, cudaStream_t stream, const Args&... args) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
      error != cudaSuccess)
    return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(jobs));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (options.overlaps) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  if (options.in_one_pass) {
    cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace la2::sm90
