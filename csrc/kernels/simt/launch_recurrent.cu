#include "launch.h"
#include "launch_overlapping.h"
#include "recurrent.cuh"
#include "with_state_part.cuh"

namespace la2::simt {
namespace {

// Blocks of `block_bytes` by which a block asks for states ahead (prefetch_states). That many bytes are half of what
// the blocks on 132 SMs work on. Not of states that L2 may still hold.
unsigned blocks_ahead(const RecurrentParams& params, int64_t element_bytes, int64_t block_bytes) {
  constexpr int64_t kAhead = 6 << 20, kLeast = 64 << 20;
  const MutableState& s = params.state;
  const int64_t state_bytes = params.dim_k * params.dim_v * element_bytes;
  const bool is_one_piece =
      (s.stride_e == 1 && s.stride_d == params.dim_v) || (s.stride_d == 1 && s.stride_e == params.dim_k);
  const bool is_aligned = (reinterpret_cast<uintptr_t>(s.data) | (s.stride_s | s.stride_h) * element_bytes) % 16 == 0;
  if (!is_one_piece || !is_aligned || params.rows * params.heads < kLeast / state_bytes) return 0;
  return static_cast<unsigned>(kAhead / block_bytes);
}

template <class Part, bool kIsOneToken>
cudaError_t launch_kernel(const RecurrentParams& params, bool overlaps, cudaStream_t stream) {
  const int64_t num_slices = (params.dim_v + Part::kSlice - 1) / Part::kSlice;
  if (params.rows == 0 || params.heads == 0 || num_slices == 0) return cudaSuccess;
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  if (params.heads > kMaxBlocks / num_slices || params.rows > kMaxBlocks / (num_slices * params.heads))
    return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(num_slices * params.heads * params.rows));
  if constexpr (kIsOneToken) {  // nothing of it in shared memory
    auto launch = [&](auto kernel, unsigned ahead) {
      return launch_overlapping(kernel, grid, Part::kThreads, 0, overlaps, stream, params, ahead);
    };
    if constexpr (Part::kVector && sizeof(typename Part::T) <= 4) {
      constexpr int64_t kElement = sizeof(typename Part::P);
      const unsigned ahead = overlaps ? blocks_ahead(params, kElement, Part::kSlice * params.dim_k * kElement) : 0;
      if (ahead != 0) return launch(la2_recurrent_one_simt_kernel<Part, true>, ahead);
    }
    return launch(la2_recurrent_one_simt_kernel<Part, false>, 0u);
  } else {
    constexpr size_t kTokenBytes = TokenRows<Part>::kElements * sizeof(typename Part::T);
    constexpr size_t kSumBytes = kTokensAtOnce * Part::kParts * Part::kSlice * sizeof(typename Part::Acc);
    constexpr size_t kUnasked = 47 * 1024;  // of 48 KiB that a block may have, all it declares included
    const size_t token_bytes = static_cast<size_t>(params.tokens) * kTokenBytes;
    if (token_bytes + kSumBytes > kUnasked) {
      const cudaError_t error =
          cudaFuncSetAttribute(la2_recurrent_simt_kernel<Part>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kMaxRecurrentTokens * kTokenBytes));
      if (error != cudaSuccess) return error;
    }
    return launch_overlapping(la2_recurrent_simt_kernel<Part>, grid, Part::kThreads, token_bytes, overlaps, stream,
                              params);
  }
}

template <class T, class P, bool kIsOneToken>
cudaError_t launch_tokens(const RecurrentParams& params, bool overlaps, cudaStream_t stream) {
  return with_state_part<T, P, kIsOneToken>(
      params.state, params.dim_k, params.dim_v, params.rows * params.heads,
      [&](auto part) { return launch_kernel<typename decltype(part)::Type, kIsOneToken>(params, overlaps, stream); });
}

template <class T, class P>
cudaError_t launch_typed(const RecurrentParams& params, bool overlaps, cudaStream_t stream) {
  // Also to commit one, unless it may be none.
  const bool is_one_token = params.tokens == 1 && params.num_accepted.data == nullptr;
  return is_one_token ? launch_tokens<T, P, true>(params, overlaps, stream)
                      : launch_tokens<T, P, false>(params, overlaps, stream);
}

template <class T>
cudaError_t launch_any(const RecurrentParams& params, bool overlaps, cudaStream_t stream) {
  return params.state.is_bf16 ? launch_typed<T, __nv_bfloat16>(params, overlaps, stream)
                              : launch_typed<T, float>(params, overlaps, stream);
}

}  // namespace

cudaError_t launch_recurrent(const RecurrentParams& params, bool overlaps, cudaStream_t stream) {
  if (params.dim_k > kMaxDim || params.tokens > kMaxRecurrentTokens) return cudaErrorInvalidValue;
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_any<float>(params, overlaps, stream);
    case DType::kBFloat16:
      return launch_any<__nv_bfloat16>(params, overlaps, stream);
    case DType::kFloat16:
      return launch_any<__half>(params, overlaps, stream);
    case DType::kFloat64:
      return launch_typed<double, double>(params, overlaps, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace la2::simt
