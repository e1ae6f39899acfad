// One instance of the sm90 trilinear kernel: a translation unit of its own, written by CMake (LA2_INSTANCE_NAME, and
// the arguments of Config as LA2_DTYPE, LA2_TILE_A, LA2_SLICE, LA2_SPLIT, LA2_PAIR).
#include "kernels/sm90/launch_instance.h"
#include "kernels/sm90/trilinear.cuh"

namespace la2::sm90 {
namespace {

using bf16 = __nv_bfloat16;  // the list's names
using fp16 = __half;

}  // namespace

cudaError_t LA2_INSTANCE_FUNCTION(LA2_INSTANCE_NAME)(const TrilinearParams& params, const TrilinearMaps& maps,
                                                     const LaunchOptions& options, cudaStream_t stream) {
  using Cfg = Config<LA2_DTYPE, LA2_TILE_A, LA2_SLICE, LA2_SPLIT, LA2_PAIR>;
  static_assert(sizeof(SharedStorage<Cfg>) <= 227 * 1024, "a block of compute capability 9.0 has no more");
  return launch_kernel(la2_trilinear_sm90_kernel<Cfg>, blocks_of_items(params, options, Cfg::kSlice),
                       Cfg::kBoth ? 1 : params.num_jobs, Cfg::kThreads, sizeof(SharedStorage<Cfg>), options, stream,
                       params, maps, options.state_only, options.reads_previous);
}

}  // namespace la2::sm90
