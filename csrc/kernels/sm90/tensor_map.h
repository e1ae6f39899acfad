// Tensor maps of the copy engine for [B, H, N, dim] operands of any strides.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../params.h"

namespace la2::sm90 {

// Boxes of `box_rows` tokens and 64 columns, swizzled by 128 bytes; what a box has beyond the tensor reads as zero and
// is not written. `rows` may be a MutableRows as well. B, H and N are at least 1.
template <class AnyRows>
cudaError_t make_tensor_map(CUtensorMap* map, const AnyRows& rows, const Sizes& sizes, DType dtype, int64_t dim,
                            int box_rows);

}  // namespace la2::sm90
