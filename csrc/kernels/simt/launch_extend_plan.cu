#include "extend_plan.cuh"

namespace la2::simt {

cudaError_t launch_extend_plan(const ExtendParams& params, const ExtendTables& tables, cudaStream_t stream) {
  // Requests, snapshots and segments are counted in 32 bits.
  if (params.requests > INT32_MAX || params.snapshots > INT32_MAX || tables.num_units > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  la2_extend_plan_simt_kernel<<<1, kPlanThreads, 0, stream>>>(params, tables);
  return cudaGetLastError();
}

}  // namespace la2::simt
