#include "extend_rows.cuh"

namespace la2::simt {
namespace {

using Kernel = void (*)(ExtendParams, ExtendTables, MutableState);

template <class Cfg>
cudaError_t launch_kernel(Kernel kernel, const ExtendParams& params, const ExtendTables& tables,
                          const MutableState& dense, bool overlaps, cudaStream_t stream) {
  const int64_t num_slices = (params.dim_v + Cfg::kSlice - 1) / Cfg::kSlice;
  const int64_t requests = params.requests + tail_blocks(params.tokens);
  if (params.heads == 0 || num_slices == 0) return cudaSuccess;
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  if (params.heads > kMaxBlocks / num_slices || requests > kMaxBlocks / (num_slices * params.heads))
    return cudaErrorInvalidConfiguration;
  const unsigned blocks = static_cast<unsigned>(num_slices * params.heads * requests);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kRecurrentThreads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params, tables, dense);
}

template <class Cfg>
cudaError_t launch_columns(const ExtendParams& params, const ExtendTables& tables, const MutableState& dense,
                           bool overlaps, cudaStream_t stream) {
  return launch_kernel<Cfg>(la2_extend_columns_simt_kernel<Cfg>, params, tables, dense, overlaps, stream);
}
template <class Cfg>
cudaError_t launch_rows(const ExtendParams& params, const ExtendTables& tables, const MutableState& dense,
                        bool overlaps, cudaStream_t stream) {
  return launch_kernel<Cfg>(la2_extend_rows_simt_kernel<Cfg>, params, tables, dense, overlaps, stream);
}

template <class T, class P>
cudaError_t launch_typed(const ExtendParams& params, const ExtendTables& tables, const MutableState& dense,
                         bool overlaps, cudaStream_t stream) {
  constexpr int kVec = RecurrentRows<T, P, 1, 1>::kVec;
  const MutableState& state = params.state;
  auto is_vector = [&](int64_t inner, int64_t outer) {  // vector accesses along the dim whose stride is `inner`
    return inner == 1 && (state.stride_s | state.stride_h | outer) % kVec == 0 &&
           reinterpret_cast<uintptr_t>(state.data) % (kVec * sizeof(P)) == 0;
  };
  if (is_vector(state.stride_e, state.stride_d)) {
    if (params.dim_k <= 64)
      return launch_columns<RecurrentColumns<T, P, 64, true, 1>>(params, tables, dense, overlaps, stream);
    if (params.dim_k <= 128)
      return launch_columns<RecurrentColumns<T, P, 128, true, 1>>(params, tables, dense, overlaps, stream);
    return launch_columns<RecurrentColumns<T, P, 256, true, 1>>(params, tables, dense, overlaps, stream);
  }
  if (is_vector(state.stride_d, state.stride_e)) {
    if (params.dim_k <= 32 * kVec)
      return launch_rows<RecurrentRows<T, P, 1, 1>>(params, tables, dense, overlaps, stream);
    if (params.dim_k <= 64 * kVec)
      return launch_rows<RecurrentRows<T, P, 2, 1>>(params, tables, dense, overlaps, stream);
    // four vectors a lane: float64 alone has dims that need them
    if constexpr (kVec == 2) return launch_rows<RecurrentRows<T, P, 4, 1>>(params, tables, dense, overlaps, stream);
  }
  return launch_columns<RecurrentColumns<T, P, 256, false, 1>>(params, tables, dense, overlaps, stream);
}

template <class T>
cudaError_t launch_any(const ExtendParams& params, const ExtendTables& tables, const MutableState& dense, bool overlaps,
                       cudaStream_t stream) {
  return params.state.is_bf16 ? launch_typed<T, __nv_bfloat16>(params, tables, dense, overlaps, stream)
                              : launch_typed<T, float>(params, tables, dense, overlaps, stream);
}

}  // namespace

cudaError_t launch_extend_rows(const ExtendParams& params, const ExtendTables& tables, const MutableState& dense,
                               bool overlaps, cudaStream_t stream) {
  if (params.dim_k > kMaxDim) return cudaErrorInvalidValue;
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_any<float>(params, tables, dense, overlaps, stream);
    case DType::kBFloat16:
      return launch_any<__nv_bfloat16>(params, tables, dense, overlaps, stream);
    case DType::kFloat16:
      return launch_any<__half>(params, tables, dense, overlaps, stream);
    case DType::kFloat64:
      return launch_typed<double, double>(params, tables, dense, overlaps, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace la2::simt
