#include "decode.cuh"
#include "launch.h"

namespace la2::simt {
namespace {

template <class Cfg>
cudaError_t launch_kernel(void (*kernel)(DecodeParams), const DecodeParams& params, cudaStream_t stream) {
  const int64_t num_slices = (params.dim_v + Cfg::kSlice - 1) / Cfg::kSlice;
  if (params.rows == 0 || params.heads == 0 || num_slices == 0) return cudaSuccess;
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  if (params.heads > kMaxBlocks / num_slices || params.rows > kMaxBlocks / (num_slices * params.heads)) {
    return cudaErrorInvalidConfiguration;
  }
  const unsigned blocks = static_cast<unsigned>(num_slices * params.heads * params.rows);
  kernel<<<blocks, kDecodeThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <class Cfg>
cudaError_t launch_columns(const DecodeParams& params, cudaStream_t stream) {
  return launch_kernel<Cfg>(la2_decode_columns_simt_kernel<Cfg>, params, stream);
}
template <class Cfg>
cudaError_t launch_rows(const DecodeParams& params, cudaStream_t stream) {
  return launch_kernel<Cfg>(la2_decode_rows_simt_kernel<Cfg>, params, stream);
}

template <class T>
cudaError_t launch_typed(const DecodeParams& params, cudaStream_t stream) {
  constexpr int kVec = DecodeRows<T, 1>::kVec;
  const MutableState& state = params.state;
  auto is_vector = [&](int64_t inner, int64_t outer) {  // 16-byte accesses along the dim whose stride is `inner`
    return inner == 1 && (state.stride_s | state.stride_h | outer) % kVec == 0 &&
           reinterpret_cast<uintptr_t>(state.data) % 16 == 0;
  };
  if (is_vector(state.stride_e, state.stride_d)) {
    if (params.dim_k <= 64) return launch_columns<DecodeColumns<T, 64, true>>(params, stream);
    if (params.dim_k <= 128) return launch_columns<DecodeColumns<T, 128, true>>(params, stream);
    return launch_columns<DecodeColumns<T, 256, true>>(params, stream);
  }
  if (is_vector(state.stride_d, state.stride_e)) {
    if (params.dim_k <= 32 * kVec) return launch_rows<DecodeRows<T, 1>>(params, stream);
    if (params.dim_k <= 64 * kVec) return launch_rows<DecodeRows<T, 2>>(params, stream);
    return launch_rows<DecodeRows<T, 4>>(params, stream);
  }
  return launch_columns<DecodeColumns<T, 256, false>>(params, stream);
}

}  // namespace

cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream) {
  if (params.dim_k > kMaxDim) return cudaErrorInvalidValue;
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_typed<float>(params, stream);
    case DType::kBFloat16:
      return launch_typed<__nv_bfloat16>(params, stream);
    case DType::kFloat16:
      return launch_typed<__half>(params, stream);
    case DType::kFloat64:
      return launch_typed<double>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace la2::simt
