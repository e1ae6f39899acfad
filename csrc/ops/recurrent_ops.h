// decode, verify and commit, alike on every device but for `kRun`: what takes the checked arguments to the kernels.
// `out` is nullptr where there are no outputs.
#pragma once

#include "arguments.h"

namespace la2::ops {

using RunRecurrent = void (*)(const char* op, Recurrent& args, const Tensor* out, bool has_tokens);

template <RunRecurrent kRun, DeviceType kDevice>
struct RecurrentOps {
  static Tensor decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state, const OptTensor& slope,
                       const OptTensor& state_indices, double scale, int64_t silu) {
    const char* op = "la2::decode";
    Recurrent args = check_recurrent(op, kDevice, q, k, v, state, slope, state_indices, {}, false, scale);
    args.params.silu = check_silu(op, silu);
    const Tensor out = empty_recurrent_out(args, false);
    kRun(op, args, &out, false);
    return out;
  }

  static Tensor verify(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state, const OptTensor& slope,
                       const OptTensor& state_indices, double scale) {
    const char* op = "la2::verify";
    Recurrent args = check_recurrent(op, kDevice, q, k, v, state, slope, state_indices, {}, true, scale);
    args.params.writes_state = false;
    const Tensor out = empty_recurrent_out(args, true);
    kRun(op, args, &out, true);
    return out;
  }

  static void commit(const Tensor& k, const Tensor& v, const Tensor& state, const Tensor& num_accepted,
                     const OptTensor& slope, const OptTensor& state_indices) {
    const char* op = "la2::commit";
    Recurrent args = check_recurrent(op, kDevice, {}, k, v, state, slope, state_indices, num_accepted, true, 1.0);
    kRun(op, args, nullptr, true);
  }
};

}  // namespace la2::ops
