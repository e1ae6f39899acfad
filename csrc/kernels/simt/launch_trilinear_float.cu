#include "launch_trilinear.cuh"

namespace la2::simt {

template cudaError_t launch_typed<float, false>(const TrilinearParams&, cudaStream_t);
template cudaError_t launch_typed<float, true>(const TrilinearParams&, cudaStream_t);

}  // namespace la2::simt
