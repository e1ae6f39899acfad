#include "launch.h"
#include "recurrent.cuh"

namespace la2::simt {
namespace {

template <class Cfg>
cudaError_t launch_kernel(void (*kernel)(RecurrentParams), const RecurrentParams& params, bool overlaps,
                          cudaStream_t stream) {
  const int64_t num_slices = (params.dim_v + Cfg::kSlice - 1) / Cfg::kSlice;
  if (params.rows == 0 || params.heads == 0 || num_slices == 0) return cudaSuccess;
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  if (params.heads > kMaxBlocks / num_slices || params.rows > kMaxBlocks / (num_slices * params.heads))
    return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(num_slices * params.heads * params.rows));
  config.blockDim = dim3(kRecurrentThreads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <class T, class P, int kGroup>
cudaError_t launch_typed(const RecurrentParams& params, bool overlaps, cudaStream_t stream) {
  constexpr int kVec = RecurrentRows<T, P, 1, kGroup>::kVec;
  const MutableState& state = params.state;
  auto is_vector = [&](int64_t inner, int64_t outer) {  // vector accesses along the dim whose stride is `inner`
    return inner == 1 && (state.stride_s | state.stride_h | outer) % kVec == 0 &&
           reinterpret_cast<uintptr_t>(state.data) % (kVec * sizeof(P)) == 0;
  };
  auto columns = [&](auto cfg) {
    using Cfg = decltype(cfg);
    return launch_kernel<Cfg>(la2_recurrent_columns_simt_kernel<Cfg>, params, overlaps, stream);
  };
  auto rows = [&](auto cfg) {
    using Cfg = decltype(cfg);
    return launch_kernel<Cfg>(la2_recurrent_rows_simt_kernel<Cfg>, params, overlaps, stream);
  };
  if (is_vector(state.stride_e, state.stride_d)) {
    if (params.dim_k <= 64) return columns(RecurrentColumns<T, P, 64, true, kGroup>());
    if (params.dim_k <= 128) return columns(RecurrentColumns<T, P, 128, true, kGroup>());
    return columns(RecurrentColumns<T, P, 256, true, kGroup>());
  }
  if (is_vector(state.stride_d, state.stride_e)) {
    if (params.dim_k <= 32 * kVec) return rows(RecurrentRows<T, P, 1, kGroup>());
    if (params.dim_k <= 64 * kVec) return rows(RecurrentRows<T, P, 2, kGroup>());
    // four vectors a lane: float64 alone has dims that need them
    if constexpr (kVec == 2) return rows(RecurrentRows<T, P, 4, kGroup>());
  }
  return columns(RecurrentColumns<T, P, 256, false, kGroup>());
}

template <class T, class P>
cudaError_t launch_grouped(const RecurrentParams& params, bool overlaps, cudaStream_t stream) {
  constexpr int kGroup = sizeof(typename Accumulation<T>::Type) == 8 ? 4 : 8;
  // One token of one: without groups. Also to commit one, unless it may be none.
  return params.tokens == 1 && params.num_accepted.data == nullptr
             ? launch_typed<T, P, 1>(params, overlaps, stream)
             : launch_typed<T, P, kGroup>(params, overlaps, stream);
}

template <class T>
cudaError_t launch_any(const RecurrentParams& params, bool overlaps, cudaStream_t stream) {
  return params.state.is_bf16 ? launch_grouped<T, __nv_bfloat16>(params, overlaps, stream)
                              : launch_grouped<T, float>(params, overlaps, stream);
}

}  // namespace

cudaError_t launch_recurrent(const RecurrentParams& params, bool overlaps, cudaStream_t stream) {
  if (params.dim_k > kMaxDim) return cudaErrorInvalidValue;
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_any<float>(params, overlaps, stream);
    case DType::kBFloat16:
      return launch_any<__nv_bfloat16>(params, overlaps, stream);
    case DType::kFloat16:
      return launch_any<__half>(params, overlaps, stream);
    case DType::kFloat64:
      return launch_grouped<double, double>(params, overlaps, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace la2::simt
