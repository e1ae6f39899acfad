#include "combine.cuh"
#include "launch.h"
#include "launch_overlapping.h"

namespace la2::simt {
namespace {

// A few to an SM: a block for each item took 50 us on an H100 for 20 short packed sequences at H = 8 (3,712 blocks), of
// which none had anything to combine. Dense calls of two segments have no such items.
constexpr int64_t kMostBlocks = 512, kMostSmallBlocks = 2048;

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
  const int64_t items =
      element_blocks * params.sizes.heads * (params.units != nullptr ? params.num_units : params.sizes.num_seqs);
  if (items == 0) return cudaSuccess;
  if (items > INT32_MAX - kMostSmallBlocks) return cudaErrorInvalidConfiguration;
  // Of opaque states two segments are one, which may have come in pieces: 40 registers, so that many blocks share an
  // SM. Of more, 16 at a time leave registers for one block, and 8 for two.
  const bool is_opaque = params.local_floats != 0, is_dense = params.cu_seqlens.data == nullptr && !params.units;
  const bool is_one_state = is_opaque && is_dense && params.by_segments.divisor <= 2;
  const auto kernel = is_one_state ? la2_combine_simt_kernel<T, true, 1>
                      : is_opaque  ? la2_combine_simt_kernel<T, true, 16>
                                   : la2_combine_simt_kernel<T, false, 8>;
  const int64_t most_blocks = is_one_state ? kMostSmallBlocks : kMostBlocks;
  const dim3 grid(static_cast<unsigned>(items < most_blocks ? items : most_blocks),
                  static_cast<unsigned>(params.num_jobs));
  return launch_overlapping(kernel, grid, kCombineThreads, 0, overlaps, stream, params,
                            static_cast<int>(element_blocks), static_cast<int>(items));
}

}  // namespace

cudaError_t launch_combine(const TrilinearParams& params, bool is_double, bool overlaps, cudaStream_t stream) {
  return is_double ? launch<double>(params, overlaps, stream) : launch<float>(params, overlaps, stream);
}

}  // namespace la2::simt
