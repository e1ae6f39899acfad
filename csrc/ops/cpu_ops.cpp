// The operators on the CPU: check -> unpack -> allocate -> run.
#include "../kernels/cpu/kernels.h"
#include "arguments.h"
#include "check_values.h"
#include "direct.h"
#include "export.h"
#include "recurrent_ops.h"

namespace la2::ops {
namespace {

constexpr DeviceType kDevice = DeviceType::CPU;

cpu::Parallel torch_threads() {
  auto run = [](int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return {run, static_cast<int>(torch::stable::get_num_threads())};
}

// The kernels take their scratch memory before they write anything.
void check_memory(const char* op, bool had_memory) {
  if (!had_memory) fail(op, ": out of memory for the scratch space of the CPU kernels");
}

Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& slope,
               const OptTensor& initial_state, const OptTensor& cu_seqlens, double scale) {
  const Attention args = check_attention("la2::forward", kDevice, q, k, v, slope, initial_state, cu_seqlens, scale);
  if (values_are_checked()) check_values(args);
  Tensor out = empty_rows(q, args.sizes.dim_v);
  check_memory(args.op, cpu::kernels().forward(forward_params(args, out), torch_threads()));
  return out;
}

// out: empty_rows of the caller's q. Without need_state the state has no elements.
std::tuple<Tensor, Tensor> run_forward_with_state(const Attention& args, const Tensor& out, bool need_state = true) {
  Tensor final_state = need_state ? empty_state(args) : empty_contiguous(args.q, {0}, args.accumulation);
  ForwardParams params = forward_params(args, out);
  if (need_state) params.final_state = mutable_state(final_state);
  check_memory(args.op, cpu::kernels().forward(params, torch_threads()));
  return {out, final_state};
}

std::tuple<Tensor, Tensor> forward_with_state(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& slope,
                                              const OptTensor& initial_state, const OptTensor& cu_seqlens,
                                              double scale) {
  const Attention args =
      check_attention("la2::forward_with_state", kDevice, q, k, v, slope, initial_state, cu_seqlens, scale);
  if (values_are_checked()) check_values(args);
  return run_forward_with_state(args, empty_rows(q, args.sizes.dim_v));
}

std::tuple<Tensor, Tensor> forward_silu(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& slope,
                                        const OptTensor& initial_state, const OptTensor& cu_seqlens, double scale,
                                        int64_t silu, bool need_state) {
  Attention args = check_attention("la2::forward_silu", kDevice, q, k, v, slope, initial_state, cu_seqlens, scale);
  const int32_t bits = check_silu(args.op, silu);
  if (values_are_checked()) check_values(args);
  const Tensor out = empty_rows(q, args.sizes.dim_v);
  take_silu(args, bits);
  return run_forward_with_state(args, out, need_state);
}

// The kernels give one slope gradient per sequence and head; a slope shared by all sequences gets their sum.
template <class T>
void sum_over_sequences(const Tensor& per_sequence, const Tensor& dslope, const Sizes& sizes) {
  const T* in = static_cast<const T*>(per_sequence.const_data_ptr());
  T* out = static_cast<T*>(dslope.mutable_data_ptr());
  for (int64_t h = 0; h < sizes.heads; ++h) {
    double sum = 0;
    for (int64_t i = 0; i < sizes.num_seqs; ++i) sum += in[i * sizes.heads + h];
    out[h] = static_cast<T>(sum);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const OptTensor& grad_final_state,
                                                            const Tensor& q, const Tensor& k, const Tensor& v,
                                                            const OptTensor& slope, const OptTensor& initial_state,
                                                            const OptTensor& cu_seqlens, double scale,
                                                            bool need_dslope) {
  const Attention args = check_attention("la2::backward", kDevice, q, k, v, slope, initial_state, cu_seqlens, scale);
  const Sizes& s = args.sizes;
  const Tensor grad_rows = check_grad_out(args, grad_out);
  const OptTensor grad_state = check_grad_final_state(args, grad_final_state);
  if (values_are_checked()) check_values(args);

  Tensor dq = empty_rows(q, s.dim_k), dk = empty_rows(k, s.dim_k), dv = empty_rows(v, s.dim_v);
  Tensor dinitial_state = initial_state ? empty_state(args) : empty_contiguous(q, {0}, args.accumulation);
  const bool wants_dslope = slope.has_value() && need_dslope;
  Tensor per_sequence = empty_contiguous(
      q, wants_dslope ? std::vector<int64_t>{s.num_seqs, s.heads} : std::vector<int64_t>{0}, args.accumulation);

  BackwardParams p{};
  p.sizes = s;
  p.dtype = args.dtype;
  p.grad_out = rows(grad_rows);
  p.grad_final_state = state(grad_state);
  p.q = rows(args.q);
  p.k = rows(args.k);
  p.v = rows(args.v);
  p.slope = slopes(args.slope);
  p.initial_state = state(args.initial_state);
  p.cu_seqlens = seq_offsets(args.cu_seqlens);
  p.scale = scale;
  p.grad_q = mutable_rows(dq);
  p.grad_k = mutable_rows(dk);
  p.grad_v = mutable_rows(dv);
  if (initial_state) p.grad_initial_state = mutable_state(dinitial_state);
  if (wants_dslope) p.grad_slope = per_sequence.mutable_data_ptr();
  check_memory(args.op, cpu::kernels().backward(p, torch_threads()));

  Tensor dslope = per_sequence;
  if (wants_dslope && slope->dim() == 1) {
    dslope = empty_contiguous(q, {s.heads}, args.accumulation);
    if (args.accumulation == ScalarType::Double)
      sum_over_sequences<double>(per_sequence, dslope, s);
    else
      sum_over_sequences<float>(per_sequence, dslope, s);
  }
  return {dq, dk, dv, dslope, dinitial_state};
}

// decode, verify and commit: the states of `args` go on by its tokens.
void run_recurrent(const char* op, Recurrent& args) {
  RecurrentParams& p = args.params;
  if (args.state_indices) check_slots(op, "state_indices", *args.state_indices, p.slots, false);
  if (values_are_checked()) check_values(op, args);
  if (p.writes_state) bump_version(op, args.state);
  take_silu(args);
  check_memory(op, cpu::kernels().recurrent(p, torch_threads()));
}

void run_gated_norm(const char* op, Recurrent& args, const GatedNormParams& norm) {
  run_recurrent(op, args);
  check_memory(op, cpu::kernels().gated_norm(norm, torch_threads()));
}

using OnPools = RecurrentOps<&run_recurrent, &run_gated_norm, kDevice>;

Tensor extend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state, const Tensor& cu_seqlens,
              const OptTensor& slope, const OptTensor& read_slots, const OptTensor& write_slots,
              const OptTensor& has_initial_state, const OptTensor& snapshot_offsets, const OptTensor& snapshot_tokens,
              const OptTensor& snapshot_slots, double scale, int64_t silu) {
  Extend args = check_extend(kDevice, q, k, v, state, cu_seqlens, slope, read_slots, write_slots, has_initial_state,
                             snapshot_offsets, snapshot_tokens, snapshot_slots, scale, silu);
  ExtendParams& p = args.params;
  check_extend_numbers(p);
  if (values_are_checked() && args.attention.slope) check_slopes(args.attention.op, *args.attention.slope);
  Tensor out = empty_contiguous(q, {p.tokens, p.heads, p.dim_v}, q.scalar_type());
  p.out = {out.mutable_data_ptr(), 0, out.stride(1), out.stride(0)};
  bump_version(args.attention.op, args.state);
  take_silu(args);
  check_memory(args.attention.op, cpu::kernels().extend(p, torch_threads()));
  return out;
}

}  // namespace

// See direct.h.
LA2_EXPORT bool la2_decode_is_plain_cpu(const RecurrentParams* params, size_t bytes, int32_t) {
  const RecurrentParams& p = *params;
  if (bytes != sizeof(p) || values_are_checked() || p.silu != 0) return false;
  const auto* slots32 = static_cast<const int32_t*>(p.state_indices);
  const auto* slots64 = static_cast<const int64_t*>(p.state_indices);
  for (int64_t i = 0; slots32 != nullptr && i < p.rows; ++i)
    if ((p.indices_are_int64 ? slots64[i] : slots32[i]) >= p.slots) return false;
  return true;
}
LA2_EXPORT bool la2_decode_direct_cpu(const RecurrentParams* params, int32_t, void*) {
  return cpu::kernels().recurrent(*params, torch_threads());
}

STABLE_TORCH_LIBRARY_IMPL(la2, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("forward_with_state", TORCH_BOX(&forward_with_state));
  m.impl("forward_silu", TORCH_BOX(&forward_silu));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("decode", TORCH_BOX(&OnPools::decode));
  m.impl("decode_gated_norm", TORCH_BOX(&OnPools::decode_gated_norm));
  m.impl("verify", TORCH_BOX(&OnPools::verify));
  m.impl("commit", TORCH_BOX(&OnPools::commit));
  m.impl("extend", TORCH_BOX(&extend));
}

}  // namespace la2::ops
