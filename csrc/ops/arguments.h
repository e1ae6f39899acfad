// Checked arguments of the operators, in the form the kernels take them: check -> unpack. Shared by the CPU
// and the CUDA library. Every complaint is one sentence: operator, argument, got, wanted.
#pragma once

#include "../kernels/params.h"
#include "stable.h"

namespace la2::ops {

// Arguments of forward, forward_with_state and backward. Rows the kernels cannot read as they are were copied.
struct Attention {
  const char* op;           // "la2::forward"
  Tensor q, k;              // [B, H, N, D]
  Tensor v;                 // [B, H, N, E]
  OptTensor slope;          // [H] or [num_seqs, H], accumulation dtype
  OptTensor initial_state;  // [num_seqs, H, D, E], accumulation dtype
  OptTensor cu_seqlens;     // [num_seqs + 1] int32 or int64
  double scale;

  Sizes sizes;
  DType dtype;
  ScalarType accumulation;  // float64 for float64 inputs, else float32
};

Attention check_attention(const char* op, DeviceType device, const Tensor& q, const Tensor& k, const Tensor& v,
                          const OptTensor& slope, const OptTensor& initial_state, const OptTensor& cu_seqlens,
                          double scale);

// Bits of Silu (kernels/params.h).
int32_t check_silu(const char* op, int64_t silu);
// What the kernels do not do themselves: SiLU of the operands that `silu` names, as tensors.
void take_silu(Attention& args, int32_t silu);

// The gradients handed to backward, checked against the arguments of the forward.
Tensor check_grad_out(const Attention& args, const Tensor& grad_out);
OptTensor check_grad_final_state(const Attention& args, const OptTensor& grad_final_state);

// Arguments of decode (has_tokens: false), verify and commit (no q).
struct Recurrent {
  Tensor q, k;                            // [rows, H, D] or [rows, T, H, D]; without q: q is k
  Tensor v;                               // [rows, H, E] or [rows, T, H, E]
  Tensor state;                           // [slots, H, D, E]
  OptTensor slope;                        // [H] or [rows, H]
  OptTensor state_indices, num_accepted;  // [rows] int32 or int64
  RecurrentParams params;                 // everything but `out`
};

Recurrent check_recurrent(const char* op, DeviceType device, const OptTensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& state, const OptTensor& slope, const OptTensor& state_indices,
                          const OptTensor& num_accepted, bool has_tokens, double scale);
// As above, of one token.
void take_silu(Recurrent& args);

// [rows, H, E] or [rows, T, H, E], and where the kernels write it.
Tensor empty_recurrent_out(const Recurrent& args, bool has_tokens);
MutableRows recurrent_out(const Tensor& out, bool has_tokens);

// Arguments of the norm behind decode.
struct GatedNorm {
  Tensor gate, weight;     // [rows, H E], [H E]
  GatedNormParams params;  // everything but `x`
};

GatedNorm check_gated_norm(const char* op, DeviceType device, const Recurrent& args, const Tensor& gate,
                           const Tensor& weight, double eps);

// What la2::extend is asked to do. The tensors are here to outlive the call.
struct Extend {
  Attention attention;  // q, k [tokens, H, D], v [tokens, H, E]; no initial state; batch 1, length `tokens`
  Tensor state;         // [slots, H, D, E], updated in place
  OptTensor read_slots, write_slots, has_initial_state, snapshot_offsets, snapshot_tokens, snapshot_slots;
  ExtendParams params;  // everything but `out`
};

Extend check_extend(DeviceType device, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                    const Tensor& cu_seqlens, const OptTensor& slope, const OptTensor& read_slots,
                    const OptTensor& write_slots, const OptTensor& has_initial_state, const OptTensor& snapshot_offsets,
                    const OptTensor& snapshot_tokens, const OptTensor& snapshot_slots, double scale, int64_t silu);
// As above.
void take_silu(Extend& args);

// The numbers behind cu_seqlens, slots and snapshots, which the host can read: they are in range and in order, and no
// two requests or snapshots write the same slot.
void check_extend_numbers(const ExtendParams& params);

// Views of tensors as the kernels see them.
Rows rows(const Tensor& t);
MutableRows mutable_rows(const Tensor& t);
State state(const OptTensor& t);
MutableState mutable_state(const Tensor& t);
Slopes slopes(const OptTensor& t);
SeqOffsets seq_offsets(const OptTensor& t);

// A [B, H, N, dim] result in the memory format of `like`: [B, N, H, dim] storage when a step along H is
// shorter than a step along N, [B, H, N, dim] storage otherwise.
Tensor empty_rows(const Tensor& like, int64_t dim);
Tensor empty_state(const Attention& args);

ForwardParams forward_params(const Attention& args, const Tensor& out);

}  // namespace la2::ops
