// Stands in for libtorch_cuda.so when linking, and is never shipped: with it the CUDA library can be built
// beside a CPU-only torch, and records its dependency on libtorch_cuda.so all the same. It defines the
// shims that torch/csrc/inductor/aoti_torch/c/shim.h hides behind USE_CUDA and that csrc/ops declares.
#include <stdint.h>

int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) {
  (void)device_index;
  *stream = 0;
  return 1;  // AOTI_TORCH_FAILURE
}
