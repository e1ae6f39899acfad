// One instance of the sm90 kernel for dk and dv: a translation unit of its own, written by CMake (LA2_INSTANCE_NAME,
// and the arguments of KeyValueConfig as LA2_DTYPE, LA2_TILE).
#include "kernels/sm90/key_value_gradients.cuh"
#include "kernels/sm90/launch_instance.h"

namespace la2::sm90 {
namespace {

using bf16 = __nv_bfloat16;  // the list's names
using fp16 = __half;

}  // namespace

cudaError_t LA2_INSTANCE_FUNCTION(LA2_INSTANCE_NAME)(const TrilinearParams& params, const TrilinearMaps& maps,
                                                     const LaunchOptions& options, cudaStream_t stream) {
  using Cfg = KeyValueConfig<LA2_DTYPE, LA2_TILE>;
  static_assert(sizeof(KeyValueStorage<Cfg>) <= 227 * 1024, "a block of compute capability 9.0 has no more");
  TrilinearParams one = params;
  one.num_jobs = 1;  // the blocks of one job do both
  return launch_kernel(la2_key_value_gradients_sm90_kernel<Cfg>, blocks_of_items(one, options, 2 * Cfg::kTile), 1,
                       Cfg::kThreads, sizeof(KeyValueStorage<Cfg>), options, stream, params, maps);
}

}  // namespace la2::sm90
