#include "slope_grad.cuh"

namespace la2::simt {

cudaError_t launch_slope_grad(const SlopeGradParams& params, cudaStream_t stream) {
  // One grid dimension: the other holds no more than 65535.
  const int64_t sequences = params.is_shared ? 1 : params.sizes.num_seqs;
  if (params.sizes.heads == 0 || sequences == 0) return cudaSuccess;
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  if (params.sizes.heads > kMaxBlocks / sequences) return cudaErrorInvalidConfiguration;
  const unsigned blocks = static_cast<unsigned>(params.sizes.heads * sequences);
  if (params.is_double) {
    la2_slope_grad_simt_kernel<double><<<blocks, kSlopeGradThreads, 0, stream>>>(params);
  } else {
    la2_slope_grad_simt_kernel<float><<<blocks, kSlopeGradThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace la2::simt
