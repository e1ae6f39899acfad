// What a kernel is asked to do: plain structs of raw pointers, sizes and strides. No torch, no CUDA, no
// standard library: every kernel family (cpu, simt, sm80, sm90) takes exactly these.
//
// Letters, the same as in triton_ref/README.md: B batch, H heads, N length, D = dim_k key dim, E = dim_v
// value dim, s slope, lambda = exp(-s), S state [D, E]. All strides are 64-bit and count elements.
#pragma once

#include <stdint.h>

#include "../core/dtype.h"

namespace la2 {

// A [B, H, N, dim] tensor whose last stride is 1. Packed: B is 1 and N the total number of tokens.
struct Rows {
  const void* data;
  int64_t stride_b, stride_h, stride_n;
};
struct MutableRows {
  void* data;
  int64_t stride_b, stride_h, stride_n;
};

// A [num_seqs, H, D, E] state in the accumulation dtype (float64 for float64 inputs, else float32), any
// strides, so that a transposed (VK) pool needs no copy. data == nullptr: absent.
// A pool [slots, H, D, E] of them: sequence i uses slots[i]; a negative one reads as zero and is not written.
// is_bf16 (of float32 states alone): in memory as bfloat16, rounded once when it is written.
struct State {
  const void* data;
  int64_t stride_s, stride_h, stride_d, stride_e;
  const int64_t* slots = nullptr;
  bool is_bf16 = false;
};
struct MutableState {
  void* data;
  int64_t stride_s, stride_h, stride_d, stride_e;
  const int64_t* slots = nullptr;
  bool is_bf16 = false;
};

// Slopes s >= 0, [num_seqs, H] in the accumulation dtype; stride_s == 0 for a shared [H] slope.
// data == nullptr: s = 0 everywhere (plain linear attention).
struct Slopes {
  const void* data;
  int64_t stride_s, stride_h;
};

// Sequence i is rows [cu_seqlens[i], cu_seqlens[i + 1]) of batch row 0. data == nullptr: dense, sequence
// i is the N rows of batch row i.
struct SeqOffsets {
  const void* data;  // [num_seqs + 1]
  bool is_int64;
};

struct Sizes {
  int64_t batch, heads, length;  // B, H, N
  int64_t dim_k, dim_v;          // D, E
  int64_t num_seqs;              // number of states: B when dense
};

// S_t = lambda S_{t-1} + k_t v_t^T,  o_t = scale q_t^T S_t.
struct ForwardParams {
  Sizes sizes;
  DType dtype;
  Rows q, k;        // [B, H, N, D]
  Rows v;           // [B, H, N, E]
  MutableRows out;  // [B, H, N, E]
  Slopes slope;
  State initial_state;       // S_{-1}; absent: zero
  MutableState final_state;  // S_{N-1}; absent: not wanted. An empty sequence copies its initial state.
  SeqOffsets cu_seqlens;
  double scale;
};

// Gradients of <grad_out, out> + <grad_final_state, S_{N-1}>.
struct BackwardParams {
  Sizes sizes;
  DType dtype;
  Rows grad_out;           // [B, H, N, E]
  State grad_final_state;  // absent: zero
  Rows q, k;               // [B, H, N, D]
  Rows v;                  // [B, H, N, E]
  Slopes slope;
  State initial_state;
  SeqOffsets cu_seqlens;
  double scale;
  MutableRows grad_q, grad_k;       // [B, H, N, D]
  MutableRows grad_v;               // [B, H, N, E]
  MutableState grad_initial_state;  // absent: not wanted. Empty sequence: a copy of grad_final_state (or 0).
  void* grad_slope;                 // [num_seqs, H] contiguous, accumulation dtype; nullptr: not wanted
};

// Operands that go through SiLU, x / (1 + e^-x), before anything else is done with them: bits. What comes of it is
// rounded to the operand's dtype.
enum Silu : int32_t { kSiluQ = 1, kSiluK = 2, kSiluV = 4 };

// int32 or int64 numbers; data == nullptr: not given.
struct Indices {
  const void* data;
  bool is_int64;
};

// Up to 16 tokens a row against a pool of states, one after the other. Row i uses slot state_indices[i]; a negative
// slot is padding (state untouched, output rows zero). No indices: row i uses slot i. decode: one token; verify:
// several, the states stay as they are; commit: the first num_accepted[i] of several, no outputs (none accepted:
// nothing is written).
constexpr int kMaxRecurrentTokens = 16;
struct RecurrentParams {
  int64_t rows, tokens, heads, dim_k, dim_v, slots;
  DType dtype;
  Rows q, k;           // [rows, T, H, D]: stride_b is the row's stride; q.data == nullptr: no outputs
  Rows v;              // [rows, T, H, E]
  MutableRows out;     // [rows, T, H, E]
  MutableState state;  // [slots, H, D, E], accumulation dtype or bfloat16
  bool writes_state;
  Slopes slope;               // [H] or [rows, H]
  const void* state_indices;  // [rows] or nullptr
  bool indices_are_int64;
  Indices num_accepted;  // [rows], clamped to 0 .. T; not given: T
  double scale;
  int32_t silu;  // of one token: bits of Silu
};

// x = sigmoid(gate) x / sqrt(mean(x^2) + eps) weight, row by row, in place; float32 arithmetic (float64 for float64),
// one rounding. Widths are multiples of 8; of 16-bit elements every row begins at a multiple of 16 bytes.
struct GatedNormParams {
  int64_t rows, width;
  DType dtype;
  void* x;           // [rows, width] contiguous
  const void* gate;  // [rows, width]
  int64_t gate_stride;
  const void* weight;  // [width]
  double eps;
};

// Packed new tokens of many requests against a pool of states. Request r is tokens [cu_seqlens[r], cu_seqlens[r + 1]),
// from slot read_slots[r] (not given: r; zero where has_initial_state[r] is false) to write_slots[r] (not given:
// read_slots[r]). A slot outside [0, slots) reads as zero and is not written; where both are, the request is padding
// and its output rows are zero, as are those behind the last request. Snapshots snapshot_offsets[r], ... ,
// snapshot_offsets[r + 1] - 1 of request r: the state behind its first snapshot_tokens[m] tokens to snapshot_slots[m].
struct ExtendParams {
  int64_t tokens, requests, heads, dim_k, dim_v, slots, snapshots;
  DType dtype;
  Rows q, k;           // [tokens, H, D]: stride_n is the token stride, stride_b unused
  Rows v;              // [tokens, H, E]
  MutableRows out;     // [tokens, H, E]
  MutableState state;  // [slots, H, D, E], accumulation dtype or bfloat16
  Slopes slope;        // [H] or [requests, H]
  Indices cu_seqlens;  // [requests + 1]
  Indices read_slots, write_slots;
  const bool* has_initial_state;
  Indices snapshot_offsets;                 // [requests + 1]
  Indices snapshot_tokens, snapshot_slots;  // [snapshots]
  double scale;
  int32_t silu;  // bits of Silu
};

}  // namespace la2
