// decode, verify and commit, alike on every device but for `kRun`: what takes the checked arguments to the kernels.
#pragma once

#include "arguments.h"

namespace la2::ops {

using RunRecurrent = void (*)(const char* op, Recurrent& args);
// norm: behind it, on its outputs.
using RunGatedNorm = void (*)(const char* op, Recurrent& args, const GatedNormParams& norm);

template <RunRecurrent kRun, RunGatedNorm kRunGatedNorm, DeviceType kDevice>
struct RecurrentOps {
  static Tensor decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state, const OptTensor& slope,
                       const OptTensor& state_indices, double scale, int64_t silu) {
    const char* op = "la2::decode";
    Recurrent args = check_recurrent(op, kDevice, q, k, v, state, slope, state_indices, {}, false, scale);
    args.params.silu = check_silu(op, silu);
    const Tensor out = empty_recurrent_out(args, false);
    args.params.out = recurrent_out(out, false);
    kRun(op, args);
    return out;
  }

  static Tensor decode_gated_norm(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                                  const Tensor& gate, const Tensor& weight, const OptTensor& slope,
                                  const OptTensor& state_indices, double eps, double scale, int64_t silu) {
    const char* op = "la2::decode_gated_norm";
    Recurrent args = check_recurrent(op, kDevice, q, k, v, state, slope, state_indices, {}, false, scale);
    args.params.silu = check_silu(op, silu);
    GatedNorm norm = check_gated_norm(op, kDevice, args, gate, weight, eps);
    const Tensor out = empty_contiguous(args.k, {norm.params.rows, norm.params.width}, args.k.scalar_type());
    norm.params.x = out.mutable_data_ptr();
    args.params.out = {norm.params.x, norm.params.width, args.params.dim_v, 0};
    kRunGatedNorm(op, args, norm.params);
    return out;
  }

  static Tensor verify(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state, const OptTensor& slope,
                       const OptTensor& state_indices, double scale) {
    const char* op = "la2::verify";
    Recurrent args = check_recurrent(op, kDevice, q, k, v, state, slope, state_indices, {}, true, scale);
    args.params.writes_state = false;
    const Tensor out = empty_recurrent_out(args, true);
    args.params.out = recurrent_out(out, true);
    kRun(op, args);
    return out;
  }

  static void commit(const Tensor& k, const Tensor& v, const Tensor& state, const Tensor& num_accepted,
                     const OptTensor& slope, const OptTensor& state_indices) {
    const char* op = "la2::commit";
    Recurrent args = check_recurrent(op, kDevice, {}, k, v, state, slope, state_indices, num_accepted, true, 1.0);
    kRun(op, args);
  }
};

}  // namespace la2::ops
