#include "launch.h"
#include "launch_instance.h"
#include "tensor_map.h"

namespace la2::sm90 {

#define LA2_INSTANCE(name, ...)                                                                     \
  cudaError_t LA2_INSTANCE_FUNCTION(name)(const TrilinearParams& params, const TrilinearMaps& maps, \
                                          const LaunchOptions& options, cudaStream_t stream);
#include "launch_instance.inc"
#undef LA2_INSTANCE

namespace {

// The dtypes as the list of instances names them.
constexpr DType bf16 = DType::kBFloat16, fp16 = DType::kFloat16;

using Launch = cudaError_t (*)(const TrilinearParams&, const TrilinearMaps&, const LaunchOptions&, cudaStream_t);

struct Entry {
  Instance instance;
  Launch launch;
};
constexpr Entry kEntries[] = {
#define LA2_INSTANCE(name, dtype, tile_a, slice, split, both, silu) \
  {{dtype, tile_a, slice, split, both, silu}, &LA2_INSTANCE_FUNCTION(name)},
#include "launch_instance.inc"
#undef LA2_INSTANCE
};

constexpr int kChunk = 64, kRowsOfWarp = 16;

cudaError_t make_maps(const TrilinearParams& params, DType dtype, const LaunchOptions& options, TrilinearMaps* maps) {
  const Sizes& s = params.sizes;
  // No copy is made then: empty sequences hand their state on.
  if (s.batch == 0 || s.heads == 0 || s.length == 0) return cudaSuccess;
  // Coordinates and the numbers of items have 32 bits in the kernels.
  if (s.length > INT32_MAX - kChunk || s.batch > INT32_MAX || s.heads > INT32_MAX) return cudaErrorInvalidConfiguration;
  for (int i = 0; i < params.num_jobs; ++i) {
    const TrilinearJob& job = params.jobs[i];
    JobMaps& m = maps->jobs[i];
    cudaError_t error = make_tensor_map(&m.b, job.b, s, dtype, job.dim_a, kChunk);
    if (error == cudaSuccess) error = make_tensor_map(&m.c, job.c, s, dtype, job.dim_c, kChunk);
    if (!options.state_only) {
      if (error == cudaSuccess) error = make_tensor_map(&m.a, job.a, s, dtype, job.dim_a, kChunk);
      if (error == cudaSuccess) error = make_tensor_map(&m.out, job.out, s, dtype, job.dim_c, kRowsOfWarp);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_trilinear(const TrilinearParams& params, const Instance& wanted, const LaunchOptions& options,
                             cudaStream_t stream) {
  for (const Entry& entry : kEntries) {
    const Instance& i = entry.instance;
    if (i.dtype != wanted.dtype || i.tile_a != wanted.tile_a || i.slice != wanted.slice || i.split != wanted.split ||
        i.both != wanted.both || i.silu != wanted.silu)
      continue;
    TrilinearMaps maps{};
    if (const cudaError_t error = make_maps(params, wanted.dtype, options, &maps); error != cudaSuccess) return error;
    return entry.launch(params, maps, options, stream);
  }
  return cudaErrorInvalidDeviceFunction;
}

}  // namespace la2::sm90
