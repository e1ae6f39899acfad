#include "combine.cuh"
#include "launch.h"

namespace la2::simt {
namespace {

template <class T>
cudaError_t launch(const TrilinearParams& params, bool overlaps, cudaStream_t stream) {
  int64_t elements = 0;
  for (int i = 0; i < params.num_jobs; ++i) {
    const int64_t needed =
        params.local_floats != 0 ? params.local_floats : int64_t{params.jobs[i].dim_a} * params.jobs[i].dim_c;
    if (needed > elements) elements = needed;
  }
  constexpr int64_t kPerBlock = kCombineThreads * (sizeof(Vec<T>) / sizeof(T));
  const int64_t element_blocks = (elements + kPerBlock - 1) / kPerBlock;
  const bool is_dense = params.cu_seqlens.data == nullptr;
  const int64_t blocks = element_blocks * params.sizes.heads * (is_dense ? params.sizes.num_seqs : params.num_units);
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(params.num_jobs));
  config.blockDim = dim3(kCombineThreads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, la2_combine_simt_kernel<T>, params, static_cast<int>(element_blocks));
}

}  // namespace

cudaError_t launch_combine(const TrilinearParams& params, bool is_double, bool overlaps, cudaStream_t stream) {
  return is_double ? launch<double>(params, overlaps, stream) : launch<float>(params, overlaps, stream);
}

}  // namespace la2::simt
