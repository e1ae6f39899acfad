// Every operator's schema, in one place. csrc/ops/{cpu,cuda}_ops.cpp implement them; fake kernels, autograd and
// vmap are registered by python/lightning_attn2_ext/_ops.py, _pool_ops.py and _vmap.py.
#include "stable.h"

// Shapes: q, k [B, H, N, D]; v, out [B, H, N, E]; slope [H] or [num_seqs, H]; states [num_seqs, H, D, E];
// cu_seqlens [num_seqs + 1]. decode: q, k [rows, H, D]; v, out [rows, H, E]; state [slots, H, D, E].
STABLE_TORCH_LIBRARY(la2, m) {
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor? slope=None, *, Tensor? initial_state=None, "
      "Tensor? cu_seqlens=None, float scale=1.0) -> Tensor");
  m.def(
      "forward_with_state(Tensor q, Tensor k, Tensor v, Tensor? slope=None, *, Tensor? initial_state=None, "
      "Tensor? cu_seqlens=None, float scale=1.0) -> (Tensor out, Tensor final_state)");
  // forward_with_state on SiLU of the operands that `silu` names by its bits: 1 q, 2 k, 4 v. So do those of decode and
  // extend. Without need_state final_state has no elements.
  m.def(
      "forward_silu(Tensor q, Tensor k, Tensor v, Tensor? slope=None, *, Tensor? initial_state=None, "
      "Tensor? cu_seqlens=None, float scale=1.0, int silu=7, bool need_state=True) -> "
      "(Tensor out, Tensor final_state)");
  m.def(
      "backward(Tensor grad_out, Tensor? grad_final_state, Tensor q, Tensor k, Tensor v, Tensor? slope=None, *, "
      "Tensor? initial_state=None, Tensor? cu_seqlens=None, float scale=1.0, bool need_dslope=True) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dslope, Tensor dinitial_state)");
  // The states of sequences alone, from zero [num_seqs, H, D, E]: the sum of lambda^e k_i v_i^T, e the steps to the
  // sequence's end, as forward leaves it; reverse: those from before its start. CUDA alone, of use to context
  // parallelism.
  m.def("_states(Tensor k, Tensor v, Tensor? slope=None, *, Tensor? cu_seqlens=None, bool reverse=False) -> Tensor");
  m.def(
      "decode(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor? slope=None, *, Tensor? state_indices=None, "
      "float scale=1.0, int silu=0) -> Tensor");
  // sigmoid(gate) RMSNorm(out) of decode's out, a row's heads beside each other: gate and the result [rows, H E],
  // weight [H E]. One operator, since its second kernel begins before decode is done, which no other may come between.
  m.def(
      "decode_gated_norm(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor gate, Tensor weight, "
      "Tensor? slope=None, *, Tensor? state_indices=None, float eps=1e-6, float scale=1.0, int silu=0) -> Tensor");
  // q, k [rows, T, H, D]; v, out [rows, T, H, E]; num_accepted [rows].
  m.def(
      "verify(Tensor q, Tensor k, Tensor v, Tensor state, Tensor? slope=None, *, Tensor? state_indices=None, "
      "float scale=1.0) -> Tensor");
  m.def(
      "commit(Tensor k, Tensor v, Tensor(a!) state, Tensor num_accepted, Tensor? slope=None, *, "
      "Tensor? state_indices=None) -> ()");
  // q, k [tokens, H, D]; v, out [tokens, H, E]; state [slots, H, D, E]; cu_seqlens, snapshot_offsets [R + 1]; slots and
  // has_initial_state [R]; slope [H] or [R, H].
  m.def(
      "extend(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor cu_seqlens, Tensor? slope=None, *, "
      "Tensor? read_slots=None, Tensor? write_slots=None, Tensor? has_initial_state=None, "
      "Tensor? snapshot_offsets=None, Tensor? snapshot_tokens=None, Tensor? snapshot_slots=None, float scale=1.0, "
      "int silu=0) -> Tensor");
}
