// Launches that may start before the kernel before them on the stream is done (ptx/launch_order.cuh), or whole.
#pragma once

#include <cuda_runtime.h>

namespace la2::simt {

template <class... Params, class... Args>
cudaError_t launch_with(const cudaLaunchAttribute* attribute, void (*kernel)(Params...), dim3 grid, int threads,
                        size_t shared_bytes, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute attributes[1];
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (attribute != nullptr) attributes[config.numAttrs++] = *attribute;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// overlaps: compute capability 9.0 and later, and the kernel waits for the one before it.
template <class... Params, class... Args>
cudaError_t launch_overlapping(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, bool overlaps,
                               cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  return launch_with(overlaps ? &overlap : nullptr, kernel, grid, threads, shared_bytes, stream, args...);
}

// All blocks resident, for a kernel whose blocks wait for each other.
template <class... Params, class... Args>
cudaError_t launch_together(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                            const Args&... args) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  return launch_with(&together, kernel, grid, threads, shared_bytes, stream, args...);
}

}  // namespace la2::simt
