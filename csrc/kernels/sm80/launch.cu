#include "launch.h"
#include "launch_instance.h"

namespace la2::sm80 {

#define LA2_INSTANCE(name, ...)                                                                        \
  cudaError_t LA2_INSTANCE_FUNCTION(name)(const TrilinearParams& params, const LaunchOptions& options, \
                                          cudaStream_t stream);
#include "launch_instance.inc"
#undef LA2_INSTANCE

namespace {

// The dtypes as the list of instances names them.
constexpr DType bf16 = DType::kBFloat16, fp16 = DType::kFloat16;

struct Entry {
  Instance instance;
  cudaError_t (*launch)(const TrilinearParams&, const LaunchOptions&, cudaStream_t);
};
constexpr Entry kEntries[] = {
#define LA2_INSTANCE(name, dtype, tile_a, slice, split, slope_grad) \
  {{dtype, tile_a, slice, split, slope_grad}, &LA2_INSTANCE_FUNCTION(name)},
#include "launch_instance.inc"
#undef LA2_INSTANCE
};

}  // namespace

cudaError_t launch_trilinear(const TrilinearParams& params, const Instance& wanted, const LaunchOptions& options,
                             cudaStream_t stream) {
  for (const Entry& entry : kEntries) {
    const Instance& i = entry.instance;
    if (i.dtype == wanted.dtype && i.tile_a == wanted.tile_a && i.slice == wanted.slice && i.split == wanted.split &&
        i.slope_grad == wanted.slope_grad)
      return entry.launch(params, options, stream);
  }
  return cudaErrorInvalidDeviceFunction;
}

}  // namespace la2::sm80
