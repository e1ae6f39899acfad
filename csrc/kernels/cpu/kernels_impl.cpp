// The kernels of one instruction set. The build compiles this file once for each, with its flags and
//   LA2_CPU_TABLE  the table to define, e.g. kernels_avx2      LA2_CPU_NAME  its name, "avx2"
//   LA2_VEC_BYTES  the vector width, 16, 32 or 64
// Everything but the table has internal linkage and no C++ standard header comes in: an inline function that
// two instruction sets share would be merged by the linker, and could be the one this machine cannot run.
#include "backward.h"
#include "extend.h"
#include "forward.h"
#include "gated_norm.h"
#include "recurrent.h"

namespace la2::cpu {
namespace {

// Calls run(storage type) for the dtype.
template <class Run>
bool with_storage(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(Float32{});
    case DType::kBFloat16:
      return run(BFloat16{});
    case DType::kFloat16:
      return run(Float16{});
    case DType::kFloat64:
      return run(Float64{});
  }
  return false;
}

bool forward_any(const ForwardParams& p, const Parallel& parallel) {
  return with_storage(p.dtype, [&](auto s) { return forward<decltype(s)>(p, parallel); });
}
bool backward_any(const BackwardParams& p, const Parallel& parallel) {
  return with_storage(p.dtype, [&](auto s) { return backward<decltype(s)>(p, parallel); });
}
bool recurrent_any(const RecurrentParams& p, const Parallel& parallel) {
  return with_storage(p.dtype, [&](auto s) { return recurrent<decltype(s)>(p, parallel); });
}
bool extend_any(const ExtendParams& p, const Parallel& parallel) {
  return with_storage(p.dtype, [&](auto s) { return extend<decltype(s)>(p, parallel); });
}
bool gated_norm_any(const GatedNormParams& p, const Parallel& parallel) {
  return with_storage(p.dtype, [&](auto s) { return gated_norm<decltype(s)>(p, parallel); });
}

}  // namespace

extern const Kernels LA2_CPU_TABLE;
const Kernels LA2_CPU_TABLE = {forward_any, backward_any, recurrent_any, extend_any, gated_norm_any, LA2_CPU_NAME};

}  // namespace la2::cpu
