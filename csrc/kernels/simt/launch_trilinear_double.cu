#include "launch_trilinear.cuh"

namespace la2::simt {

template cudaError_t launch_typed<double, false>(const TrilinearParams&, cudaStream_t);
template cudaError_t launch_typed<double, true>(const TrilinearParams&, cudaStream_t);

}  // namespace la2::simt
