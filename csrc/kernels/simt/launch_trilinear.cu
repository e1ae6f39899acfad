#include "launch_trilinear.cuh"

namespace la2::simt {
namespace {

template <bool kStateOnly>
cudaError_t launch(const TrilinearParams& params, DType dtype, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_typed<float, kStateOnly>(params, stream);
    case DType::kFloat64:
      return launch_typed<double, kStateOnly>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_trilinear(const TrilinearParams& params, DType dtype, cudaStream_t stream) {
  return launch<false>(params, dtype, stream);
}

cudaError_t launch_state_pass(const TrilinearParams& params, DType dtype, cudaStream_t stream) {
  return launch<true>(params, dtype, stream);
}

}  // namespace la2::simt
