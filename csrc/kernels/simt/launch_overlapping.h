// A launch that may start before the kernel before it on the stream is done (ptx/launch_order.cuh).
#pragma once

#include <cuda_runtime.h>

namespace la2::simt {

// overlaps: compute capability 9.0 and later, and the kernel waits for the one before it.
template <class... Params, class... Args>
cudaError_t launch_overlapping(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, bool overlaps,
                               cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace la2::simt
