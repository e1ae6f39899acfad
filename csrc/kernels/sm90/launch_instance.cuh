// One instance of the sm90 trilinear kernel and of its state pass: a translation unit of its own, written by CMake
// (LA2_INSTANCE_NAME, and the arguments of Config as LA2_DTYPE, LA2_TILE_A, LA2_SLICE, LA2_SPLIT, LA2_PAIR, LA2_SILU).
#include "kernels/sm90/gather.cuh"
#include "kernels/sm90/launch_instance.h"
#include "kernels/sm90/one_pass.cuh"
#include "kernels/sm90/trilinear.cuh"

namespace la2::sm90 {
namespace {

using bf16 = __nv_bfloat16;  // the list's names
using fp16 = __half;

}  // namespace

cudaError_t LA2_INSTANCE_FUNCTION(LA2_INSTANCE_NAME)(const TrilinearParams& given, const TrilinearMaps& maps,
                                                     const LaunchOptions& options, cudaStream_t stream) {
  constexpr int kMostShared = 227 * 1024;  // of a block of compute capability 9.0
  using Cfg = Config<LA2_DTYPE, LA2_TILE_A, LA2_SLICE, LA2_SPLIT, LA2_PAIR, LA2_SILU>;
  TrilinearParams params = given;
  const int walked_jobs = Cfg::kBoth ? 1 : params.num_jobs;
  const int64_t blocks = blocks_of_items(params, options, Cfg::kSlice, walked_jobs);
  if (options.state_only) {
    using Gather = GatherConfig<LA2_DTYPE, LA2_TILE_A, LA2_SLICE, Cfg::kSplit, LA2_SILU>;
    static_assert(sizeof(GatherStorage<Gather>) <= kMostShared);
    if constexpr (!Cfg::kBoth && Cfg::kSplit == Cfg::kSplitsValues)
      return launch_kernel(la2_gather_sm90_kernel<Gather>, blocks, params.num_jobs, Gather::kThreads,
                           sizeof(GatherStorage<Gather>), options, stream, params, maps);
    return cudaErrorInvalidDeviceFunction;  // another instance serves it (split_of, without `both`)
  }
  static_assert(sizeof(SharedStorage<Cfg>) <= kMostShared);
  if (options.in_one_pass) {
    if constexpr (kHasOnePass<Cfg>) {
      static_assert(sizeof(OnePassStorage<Cfg>) <= kMostShared);
      return launch_kernel(la2_one_pass_sm90_kernel<Cfg>, blocks, 1, Cfg::kThreads, sizeof(OnePassStorage<Cfg>),
                           options, stream, params, maps);
    }
    return cudaErrorInvalidDeviceFunction;
  }
  return launch_kernel(la2_trilinear_sm90_kernel<Cfg>, blocks, walked_jobs, Cfg::kThreads, sizeof(SharedStorage<Cfg>),
                       options, stream, params, maps, options.reads_previous);
}

}  // namespace la2::sm90
