#include "extend_rows.cuh"
#include "launch_overlapping.h"
#include "with_state_part.cuh"

namespace la2::simt {
namespace {

template <class Part>
cudaError_t launch_kernel(const ExtendParams& params, const ExtendTables& tables, bool overlaps, cudaStream_t stream) {
  const int64_t num_slices = (params.dim_v + Part::kSlice - 1) / Part::kSlice;
  const int64_t requests = params.requests + tail_blocks(params.tokens);
  if (params.heads == 0 || num_slices == 0) return cudaSuccess;
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  if (params.heads > kMaxBlocks / num_slices || requests > kMaxBlocks / (num_slices * params.heads))
    return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(num_slices * params.heads * requests));
  return launch_overlapping(la2_extend_rows_simt_kernel<Part>, grid, Part::kThreads, 0, overlaps, stream, params,
                            tables);
}

template <class T, class P>
cudaError_t launch_typed(const ExtendParams& params, const ExtendTables& tables, bool overlaps, cudaStream_t stream) {
  const int64_t states = params.requests * params.heads;
  return with_state_part<T, P, true>(params.state, params.dim_k, params.dim_v, states, [&](auto part) {
    return launch_kernel<typename decltype(part)::Type>(params, tables, overlaps, stream);
  });
}

template <class T>
cudaError_t launch_any(const ExtendParams& params, const ExtendTables& tables, bool overlaps, cudaStream_t stream) {
  return params.state.is_bf16 ? launch_typed<T, __nv_bfloat16>(params, tables, overlaps, stream)
                              : launch_typed<T, float>(params, tables, overlaps, stream);
}

}  // namespace

cudaError_t launch_extend_rows(const ExtendParams& params, const ExtendTables& tables, bool overlaps,
                               cudaStream_t stream) {
  if (params.dim_k > kMaxDim) return cudaErrorInvalidValue;
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_any<float>(params, tables, overlaps, stream);
    case DType::kBFloat16:
      return launch_any<__nv_bfloat16>(params, tables, overlaps, stream);
    case DType::kFloat16:
      return launch_any<__half>(params, tables, overlaps, stream);
    case DType::kFloat64:
      return launch_typed<double, double>(params, tables, overlaps, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace la2::simt
