// Everything the op libraries take from libtorch, through its stable ABI only: headers of
// torch/csrc/stable and the C shims behind them.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if !defined(TORCH_TARGET_VERSION)
#error "define TORCH_TARGET_VERSION: a shim newer than the oldest supported torch must not compile"
#endif

namespace la2::ops {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// Errors leave as std::runtime_error holding one sentence; torch turns it into a RuntimeError. (The macro of
// the stable headers would put a function name, file and line in front of it.)
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

// torch 2.13 and later; a null pointer in those before.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

// What an allocation failed of is lost in the C shim; _ops.py makes torch's own error of this sentence.
[[noreturn]] inline void fail_out_of_memory(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  double bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  for (const int64_t size : sizes) bytes *= static_cast<double>(size);
  std::ostringstream sentence;
  sentence.precision(0);
  sentence << "la2: out of memory: " << std::fixed << bytes << " bytes on "
           << (like.is_cpu() ? "cpu" : "cuda:" + std::to_string(static_cast<int>(like.get_device_index())));
  if (torch_exception_get_what_without_backtrace != nullptr)
    sentence << ": " << torch_exception_get_what_without_backtrace();
  throw std::runtime_error(sentence.str());
}

// An uninitialised tensor on `like`'s device. (0.5 us; new_empty costs 2.)
inline Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
                               like.is_cpu() ? -1 : like.get_device_index(), &handle) != TORCH_SUCCESS)
    fail_out_of_memory(like, sizes, dtype);
  return Tensor(handle);
}

inline Tensor empty_contiguous(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
  return empty_strided(like, sizes, strides, dtype);
}

// out = SiLU of t, by torch's kernel.
inline void silu_out(const Tensor& t, const Tensor& out) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(t), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::silu", "out", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // frees the handle
}

// Tells autograd that a state changes: a graph that has saved it may then not run backward. The stable ABI has no call
// for that, so the version counter of an operator that changes nothing is used, the exchange of a dimension with itself
// (0.4 us; a kernel for ADInplaceOrView would have to be written in Python and cost ten times that). Not below a guard
// that leaves ADInplaceOrView out.
inline void bump_version(const char* op, const Tensor& state) {
  using torch::stable::detail::from;
  const int64_t last = state.dim() - 1;
  StableIValue stack[] = {from(state), from(last), from(last)};
  if (torch_call_dispatcher("aten::transpose_", "", stack, TORCH_ABI_VERSION) != TORCH_SUCCESS)
    fail(op,
         ": state cannot be updated in place, expected a tensor that can (one that was made under "
         "torch.inference_mode() can there alone)");
  torch::stable::detail::to<Tensor>(stack[0]);  // frees the handle
}

}  // namespace la2::ops
