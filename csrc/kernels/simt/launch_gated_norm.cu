#include "gated_norm.cuh"
#include "launch.h"
#include "launch_overlapping.h"

namespace la2::simt {
namespace {

template <class T>
cudaError_t launch_typed(const GatedNormParams& params, bool overlaps, cudaStream_t stream) {
  constexpr int64_t kWarp = 32, kMaxThreads = norm_threads(sizeof(T));
  const int64_t warps = (params.width + kNormVec * kWarp - 1) / (kNormVec * kWarp);
  const int threads = static_cast<int>(warps * kWarp < kMaxThreads ? warps * kWarp : kMaxThreads);
  return launch_overlapping(la2_gated_norm_simt_kernel<T>, dim3(static_cast<unsigned>(params.rows)), threads, 0,
                            overlaps, stream, params);
}

}  // namespace

cudaError_t launch_gated_norm(const GatedNormParams& params, bool overlaps, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 0x7fffffff, kMaxWidth = int64_t{1} << 30;
  if (params.rows == 0 || params.width == 0) return cudaSuccess;
  if (params.rows > kMaxBlocks) return cudaErrorInvalidConfiguration;
  if (params.width % kNormVec != 0 || params.width > kMaxWidth) return cudaErrorInvalidValue;
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_typed<float>(params, overlaps, stream);
    case DType::kBFloat16:
      return launch_typed<__nv_bfloat16>(params, overlaps, stream);
    case DType::kFloat16:
      return launch_typed<__half>(params, overlaps, stream);
    case DType::kFloat64:
      return launch_typed<double>(params, overlaps, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace la2::simt
