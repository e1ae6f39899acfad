// Element types of q, k, v and the results.
#pragma once

#include <stdint.h>

namespace la2 {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

}  // namespace la2
