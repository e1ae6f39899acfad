// Host side of the trilinear kernel for one element type; launch_trilinear_<type>.cu makes the instances.
#pragma once

#include "trilinear.cuh"

namespace la2::simt {

template <class Cfg>
cudaError_t launch_config(const TrilinearParams& params, cudaStream_t stream) {
  int max_dim_c = 0;
  for (int i = 0; i < params.num_jobs; ++i)
    max_dim_c = params.jobs[i].dim_c > max_dim_c ? params.jobs[i].dim_c : max_dim_c;
  const int max_slices = (max_dim_c + Cfg::kSlice - 1) / Cfg::kSlice;
  if (max_slices == 0 || params.sizes.heads == 0 || params.num_units == 0) return cudaSuccess;
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  if (params.sizes.heads > kMaxBlocks / max_slices) return cudaErrorInvalidConfiguration;
  if (params.num_units > kMaxBlocks / (max_slices * params.sizes.heads)) return cudaErrorInvalidConfiguration;

  constexpr int kSharedBytes = sizeof(SharedStorage<Cfg>);
  const cudaError_t status =
      cudaFuncSetAttribute(la2_trilinear_simt_kernel<Cfg>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  const dim3 grid(static_cast<unsigned>(max_slices * params.sizes.heads * params.num_units), params.num_jobs);
  la2_trilinear_simt_kernel<Cfg><<<grid, Cfg::kThreads, kSharedBytes, stream>>>(params, max_slices);
  return cudaGetLastError();
}

// Tiles of Da beyond a job's own dim_a cost registers, not time: the widest job picks the instance.
template <class T, bool kStateOnly>
cudaError_t launch_typed(const TrilinearParams& params, cudaStream_t stream) {
  int max_dim_a = 0;
  for (int i = 0; i < params.num_jobs; ++i)
    max_dim_a = params.jobs[i].dim_a > max_dim_a ? params.jobs[i].dim_a : max_dim_a;
  if (max_dim_a <= 64) return launch_config<TrilinearConfig<T, 64, kStateOnly>>(params, stream);
  if (max_dim_a <= 128) return launch_config<TrilinearConfig<T, 128, kStateOnly>>(params, stream);
  if (max_dim_a <= 256) return launch_config<TrilinearConfig<T, 256, kStateOnly>>(params, stream);
  return cudaErrorInvalidValue;
}

extern template cudaError_t launch_typed<float, false>(const TrilinearParams&, cudaStream_t);
extern template cudaError_t launch_typed<float, true>(const TrilinearParams&, cudaStream_t);
extern template cudaError_t launch_typed<double, false>(const TrilinearParams&, cudaStream_t);
extern template cudaError_t launch_typed<double, true>(const TrilinearParams&, cudaStream_t);

}  // namespace la2::simt
