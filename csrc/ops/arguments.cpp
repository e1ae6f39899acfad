#include "arguments.h"

#include "check_values.h"

namespace la2::ops {
namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kHeadDimStep = 8;

const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(t);
  }
}

std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

const char* device_name(DeviceType t) { return t == DeviceType::CPU ? "cpu" : "cuda"; }

DType kernel_dtype(const char* op, ScalarType t, const char* name = "q") {
  switch (t) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      fail(op, ": ", name, ".dtype is ", dtype_name(t), ", expected float32, bfloat16, float16 or float64");
  }
}

std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "another kind of device:") + std::to_string(static_cast<int>(t.get_device_index()));
}

// Every tensor is where q is, and q where the operator runs.
void check_device(const char* op, const char* name, const Tensor& t, DeviceType device, const Tensor& q) {
  const bool same_kind = device == DeviceType::CPU ? t.is_cpu() : t.is_cuda();
  if (same_kind && (device == DeviceType::CPU || t.get_device_index() == q.get_device_index())) return;
  const bool q_fits = device == DeviceType::CPU ? q.is_cpu() : q.is_cuda();
  fail(op, ": ", name, " is on ", device_text(t), ", expected ",
       q_fits ? device_text(q) : std::string(device_name(device)), ", where the other inputs are");
}

void check_rank(const char* op, const char* name, const Tensor& t, int64_t rank, const char* want) {
  if (t.dim() != rank) fail(op, ": ", name, " has shape ", shape_text(t), ", expected ", rank, " dimensions ", want);
}

void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType want, const char* why) {
  if (t.scalar_type() != want)
    fail(op, ": ", name, ".dtype is ", dtype_name(t.scalar_type()), ", expected ", dtype_name(want), why);
}

void check_head_dim(const char* op, const char* name, const Tensor& t) {
  const int64_t dim = t.size(t.dim() - 1);
  if (dim <= 0 || dim % kHeadDimStep != 0 || dim > kMaxHeadDim)
    fail(op, ": ", name, ".shape[-1] is ", dim, ", expected a multiple of ", kHeadDimStep, " up to ", kMaxHeadDim);
}

// Whether the 16-byte copies of the tensor-core kernels can read the rows: pointer and strides in units of 16 bytes.
bool rows_are_aligned(const Tensor& t) {
  const int64_t unit = 16 / static_cast<int64_t>(t.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) aligned = aligned && (t.size(i) <= 1 || t.stride(i) % unit == 0);
  return aligned;
}

// One rule everywhere: rows are read with unit last stride, on CUDA also 16-byte aligned if their elements have two
// bytes; anything else is copied once.
Tensor readable_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  const bool unit = t.stride(last) == 1 || t.size(last) <= 1;
  if (unit && (!t.is_cuda() || t.element_size() != 2 || t.numel() == 0 || rows_are_aligned(t))) return t;
  const std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  Tensor copy = empty_contiguous(t, sizes, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// q, k and v against each other; of commit, which has no q, k is in its place, called k.
void check_qkv(const char* op, DeviceType device, const Tensor& q, const Tensor& k, const Tensor& v, int64_t rank,
               const char* want, const char* name = "q") {
  check_rank(op, name, q, rank, want);
  check_rank(op, "k", k, rank, want);
  check_rank(op, "v", v, rank, want);
  check_device(op, name, q, device, q);
  check_device(op, "k", k, device, q);
  check_device(op, "v", v, device, q);
  kernel_dtype(op, q.scalar_type(), name);
  const std::string as_for = std::string(" as for ") + name;
  check_dtype(op, "k", k, q.scalar_type(), as_for.c_str());
  check_dtype(op, "v", v, q.scalar_type(), as_for.c_str());
  for (int64_t i = 0; i + 1 < rank; ++i) {
    if (k.size(i) != q.size(i)) fail(op, ": k.shape[", i, "] is ", k.size(i), ", expected ", q.size(i), as_for);
    if (v.size(i) != q.size(i)) fail(op, ": v.shape[", i, "] is ", v.size(i), ", expected ", q.size(i), as_for);
  }
  if (k.size(rank - 1) != q.size(rank - 1))
    fail(op, ": k.shape[-1] is ", k.size(rank - 1), ", expected ", q.size(rank - 1), as_for);
  check_head_dim(op, name, q);
  check_head_dim(op, "k", k);
  check_head_dim(op, "v", v);
}

void check_slope(const char* op, DeviceType device, const Tensor& slope, const Tensor& q, int64_t num_seqs,
                 int64_t heads, ScalarType accumulation) {
  check_device(op, "slope", slope, device, q);
  check_dtype(op, "slope", slope, accumulation, accumulation == ScalarType::Double ? " for float64 inputs" : "");
  const bool shared = slope.dim() == 1 && slope.size(0) == heads;
  const bool own = slope.dim() == 2 && slope.size(0) == num_seqs && slope.size(1) == heads;
  if (!shared && !own)
    fail(op, ": slope has shape ", shape_text(slope), ", expected [", heads, "] or [", num_seqs, ", ", heads,
         "] (heads, or sequences by heads)");
}

void check_state_like(const char* op, const char* name, const Tensor& t, const Attention& args) {
  const Sizes& s = args.sizes;
  if (t.dim() != 4 || t.size(0) != s.num_seqs || t.size(1) != s.heads || t.size(2) != s.dim_k || t.size(3) != s.dim_v)
    fail(op, ": ", name, " has shape ", shape_text(t), ", expected [", s.num_seqs, ", ", s.heads, ", ", s.dim_k, ", ",
         s.dim_v, "] (sequences, heads, key dim, value dim)");
  check_dtype(op, name, t, args.accumulation, "");
}

bool is_index(const Tensor& t) { return t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long; }

// A contiguous int32 or int64 [size]; size -1: any. `what` follows the wanted size in the complaint.
OptTensor check_indices(const char* op, const char* name, const OptTensor& t, DeviceType device, const Tensor& q,
                        int64_t size, const char* what) {
  if (!t) return {};
  check_device(op, name, *t, device, q);
  if (!is_index(*t)) fail(op, ": ", name, ".dtype is ", dtype_name(t->scalar_type()), ", expected int32 or int64");
  if (t->dim() != 1 || (size >= 0 && t->size(0) != size))
    fail(op, ": ", name, " has shape ", shape_text(*t), ", expected [", size < 0 ? "" : std::to_string(size), what);
  return t->is_contiguous() ? *t : torch::stable::contiguous(*t);
}

Indices indices(const OptTensor& t) {
  if (!t) return {nullptr, false};
  return {t->const_data_ptr(), t->scalar_type() == ScalarType::Long};
}

// A pool of states, bfloat16 or of the accumulation dtype.
MutableState check_pool(const char* op, DeviceType device, const Tensor& state, const Tensor& q, int64_t heads,
                        int64_t dim_k, int64_t dim_v, ScalarType accumulation) {
  check_device(op, "state", state, device, q);
  const bool is_bf16 = accumulation == ScalarType::Float && state.scalar_type() == ScalarType::BFloat16;
  if (!is_bf16 && state.scalar_type() != accumulation)
    fail(op, ": state.dtype is ", dtype_name(state.scalar_type()), ", expected ",
         accumulation == ScalarType::Double ? "float64 for float64 inputs" : "float32 or bfloat16");
  if (state.dim() != 4 || state.size(1) != heads || state.size(2) != dim_k || state.size(3) != dim_v)
    fail(op, ": state has shape ", shape_text(state), ", expected [slots, ", heads, ", ", dim_k, ", ", dim_v,
         "] (slots, heads, key dim, value dim)");
  for (int64_t i = 0; i < 4; ++i)
    if (state.stride(i) == 0 && state.size(i) > 1)
      fail(op, ": state.stride(", i, ") is 0, expected every element of an updated state to have its own memory");
  MutableState pool = mutable_state(state);
  pool.is_bf16 = is_bf16;
  return pool;
}

// [tokens, H, dim] as the rows of one batch row.
Rows token_rows(const Tensor& t) { return {t.const_data_ptr(), 0, t.stride(1), t.stride(0)}; }
void set_token_rows(Extend& args) {
  args.params.q = token_rows(args.attention.q);
  args.params.k = token_rows(args.attention.k);
  args.params.v = token_rows(args.attention.v);
}

}  // namespace

Attention check_attention(const char* op, DeviceType device, const Tensor& q, const Tensor& k, const Tensor& v,
                          const OptTensor& slope, const OptTensor& initial_state, const OptTensor& cu_seqlens,
                          double scale) {
  check_qkv(op, device, q, k, v, 4, "[batch, heads, length, head_dim]");
  Attention args;
  args.op = op;
  args.scale = scale;
  args.dtype = kernel_dtype(op, q.scalar_type());
  args.accumulation = args.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  args.sizes = {q.size(0), q.size(1), q.size(2), q.size(3), v.size(3), q.size(0)};
  args.q = readable_rows(q);
  args.k = readable_rows(k);
  args.v = readable_rows(v);

  if (cu_seqlens) {
    const Tensor& offsets = *cu_seqlens;
    check_device(op, "cu_seqlens", offsets, device, q);
    if (!is_index(offsets))
      fail(op, ": cu_seqlens.dtype is ", dtype_name(offsets.scalar_type()), ", expected int32 or int64");
    if (offsets.dim() != 1 || offsets.size(0) < 1)
      fail(op, ": cu_seqlens has shape ", shape_text(offsets), ", expected [number of sequences + 1]");
    if (q.size(0) != 1)
      fail(op, ": q.shape[0] is ", q.size(0), ", expected 1 with cu_seqlens (packed sequences share one batch row)");
    args.sizes.num_seqs = offsets.size(0) - 1;
    args.cu_seqlens = offsets.is_contiguous() ? offsets : torch::stable::contiguous(offsets);
    // On a GPU the values stay on the device; the kernels clamp them to [0, length], and LA2_CHECK=1 looks at them.
    if (device == DeviceType::CPU) check_seq_offsets(op, "cu_seqlens", *args.cu_seqlens, args.sizes.length);
  }
  if (slope) {
    check_slope(op, device, *slope, q, args.sizes.num_seqs, args.sizes.heads, args.accumulation);
    args.slope = slope;
  }
  if (initial_state) {
    check_device(op, "initial_state", *initial_state, device, q);
    check_state_like(op, "initial_state", *initial_state, args);
    args.initial_state = initial_state;
  }
  return args;
}

Tensor check_grad_out(const Attention& args, const Tensor& grad_out) {
  const char* op = args.op;
  check_rank(op, "grad_out", grad_out, 4, "[batch, heads, length, head_dim]");
  check_device(op, "grad_out", grad_out, args.q.is_cuda() ? DeviceType::CUDA : DeviceType::CPU, args.q);
  check_dtype(op, "grad_out", grad_out, args.v.scalar_type(), " as for v");
  for (int64_t i = 0; i < 4; ++i)
    if (grad_out.size(i) != args.v.size(i))
      fail(op, ": grad_out.shape[", i, "] is ", grad_out.size(i), ", expected ", args.v.size(i), " as for v");
  return readable_rows(grad_out);
}

OptTensor check_grad_final_state(const Attention& args, const OptTensor& grad_final_state) {
  if (!grad_final_state) return {};
  check_device(args.op, "grad_final_state", *grad_final_state, args.q.is_cuda() ? DeviceType::CUDA : DeviceType::CPU,
               args.q);
  check_state_like(args.op, "grad_final_state", *grad_final_state, args);
  return grad_final_state;
}

int32_t check_silu(const char* op, int64_t silu) {
  if (silu < 0 || silu > (kSiluQ | kSiluK | kSiluV))
    fail(op, ": silu is ", silu, ", expected the sum of 1 (q), 2 (k) and 4 (v) that go through SiLU, 0 to 7");
  return static_cast<int32_t>(silu);
}

// [B, H, N, dim] in the memory format that it has, [rows, H, dim] contiguous.
static Tensor silu(const Tensor& t) {
  const int64_t dim = t.size(t.dim() - 1);
  const Tensor out =
      t.dim() == 4 ? empty_rows(t, dim) : empty_contiguous(t, {t.size(0), t.size(1), dim}, t.scalar_type());
  silu_out(t, out);
  return out;
}

void take_silu(Attention& args, int32_t silu) {
  if (silu & kSiluQ) args.q = ops::silu(args.q);
  if (silu & kSiluK) args.k = ops::silu(args.k);
  if (silu & kSiluV) args.v = ops::silu(args.v);
}

Recurrent check_recurrent(const char* op, DeviceType device, const OptTensor& given_q, const Tensor& k, const Tensor& v,
                          const Tensor& state, const OptTensor& slope, const OptTensor& state_indices,
                          const OptTensor& num_accepted, bool has_tokens, double scale) {
  const Tensor& q = given_q ? *given_q : k;
  check_qkv(op, device, q, k, v, has_tokens ? 4 : 3,
            has_tokens ? "[rows, tokens, heads, head_dim]" : "[rows, heads, head_dim]", given_q ? "q" : "k");
  const int64_t h = has_tokens ? 2 : 1;  // the dim of heads
  Recurrent args;
  RecurrentParams& p = args.params;
  p.rows = k.size(0);
  p.tokens = has_tokens ? k.size(1) : 1;
  p.heads = k.size(h);
  p.dim_k = k.size(h + 1);
  p.dim_v = v.size(h + 1);
  p.dtype = kernel_dtype(op, k.scalar_type());
  p.scale = scale;
  p.out = {};
  p.writes_state = true;
  p.silu = 0;
  if (p.tokens < 1 || p.tokens > kMaxRecurrentTokens)
    fail(op, ": k.shape[1] is ", p.tokens, ", expected 1 to ", kMaxRecurrentTokens, " tokens");
  const ScalarType accumulation = p.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  p.state = check_pool(op, device, state, q, p.heads, p.dim_k, p.dim_v, accumulation);
  p.slots = state.size(0);
  args.state = state;

  const char* per_row = "], one for each row";
  args.state_indices = check_indices(op, "state_indices", state_indices, device, q, p.rows, per_row);
  args.num_accepted = check_indices(op, "num_accepted", num_accepted, device, q, p.rows, per_row);
  if (!state_indices && p.slots != p.rows)
    fail(op, ": state.shape[0] is ", p.slots, ", expected ", p.rows,
         " (one state for each row; pass state_indices to use a larger pool)");
  if (slope) {
    check_slope(op, device, *slope, q, p.rows, p.heads, accumulation);
    args.slope = slope;
  }

  args.k = readable_rows(k);
  args.q = given_q ? readable_rows(q) : args.k;
  args.v = readable_rows(v);
  auto view = [&](const Tensor& t) {
    return Rows{t.const_data_ptr(), t.stride(0), t.stride(h), has_tokens ? t.stride(1) : 0};
  };
  p.q = given_q ? view(args.q) : Rows{};
  p.k = view(args.k);
  p.v = view(args.v);
  p.slope = slopes(args.slope);
  p.state_indices = indices(args.state_indices).data;
  p.indices_are_int64 = indices(args.state_indices).is_int64;
  p.num_accepted = indices(args.num_accepted);
  return args;
}

void take_silu(Recurrent& args) {
  RecurrentParams& p = args.params;
  auto take = [](Tensor& t, Rows& rows) {
    t = ops::silu(t);
    rows = {t.const_data_ptr(), t.stride(0), t.stride(1), 0};
  };
  if (p.silu & kSiluQ) take(args.q, p.q);
  if (p.silu & kSiluK) take(args.k, p.k);
  if (p.silu & kSiluV) take(args.v, p.v);
  p.silu = 0;
}

Tensor empty_recurrent_out(const Recurrent& args, bool has_tokens) {
  const RecurrentParams& p = args.params;
  if (has_tokens) return empty_contiguous(args.k, {p.rows, p.tokens, p.heads, p.dim_v}, args.k.scalar_type());
  return empty_contiguous(args.k, {p.rows, p.heads, p.dim_v}, args.k.scalar_type());
}
MutableRows recurrent_out(const Tensor& out, bool has_tokens) {
  return {out.mutable_data_ptr(), out.stride(0), out.stride(has_tokens ? 2 : 1), has_tokens ? out.stride(1) : 0};
}

GatedNorm check_gated_norm(const char* op, DeviceType device, const Recurrent& args, const Tensor& gate,
                           const Tensor& weight, double eps) {
  const RecurrentParams& p = args.params;
  const int64_t width = p.heads * p.dim_v;
  auto check = [&](const char* name, const Tensor& t) {
    check_device(op, name, t, device, args.k);
    check_dtype(op, name, t, args.k.scalar_type(), " as for q");
  };
  check("gate", gate);
  check("weight", weight);
  if (gate.dim() != 2 || gate.size(0) != p.rows || gate.size(1) != width)
    fail(op, ": gate has shape ", shape_text(gate), ", expected [", p.rows, ", ", width,
         "] (rows, heads by value dim)");
  if (weight.dim() != 1 || weight.size(0) != width)
    fail(op, ": weight has shape ", shape_text(weight), ", expected [", width, "] (heads by value dim)");
  // Else a row of padding, which is zero, would be divided by zero.
  constexpr double kLeastEps = 1.1754943508222875e-38;
  if (!(eps >= kLeastEps)) fail(op, ": eps is ", eps, ", expected at least ", kLeastEps, ", the smallest float32");
  GatedNorm norm{readable_rows(gate), readable_rows(weight), {}};
  norm.params = {
      p.rows, width, p.dtype, nullptr, norm.gate.const_data_ptr(), norm.gate.stride(0), norm.weight.const_data_ptr(),
      eps};
  return norm;
}

Extend check_extend(DeviceType device, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                    const Tensor& cu_seqlens, const OptTensor& slope, const OptTensor& read_slots,
                    const OptTensor& write_slots, const OptTensor& has_initial_state, const OptTensor& snapshot_offsets,
                    const OptTensor& snapshot_tokens, const OptTensor& snapshot_slots, double scale, int64_t silu) {
  const char* op = "la2::extend";
  check_qkv(op, device, q, k, v, 3, "[tokens, heads, head_dim]");
  Extend args;
  Attention& a = args.attention;
  ExtendParams& p = args.params;
  a.op = op;
  a.scale = p.scale = scale;
  p.silu = check_silu(op, silu);
  a.dtype = p.dtype = kernel_dtype(op, q.scalar_type());
  a.accumulation = a.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  a.q = readable_rows(q);
  a.k = readable_rows(k);
  a.v = readable_rows(v);

  a.cu_seqlens = check_indices(op, "cu_seqlens", cu_seqlens, device, q, -1, "number of requests + 1]");
  if (a.cu_seqlens->size(0) < 1)
    fail(op, ": cu_seqlens has shape ", shape_text(cu_seqlens), ", expected [number of requests + 1]");
  p.tokens = q.size(0);
  p.requests = cu_seqlens.size(0) - 1;
  p.heads = q.size(1);
  p.dim_k = q.size(2);
  p.dim_v = v.size(2);
  a.sizes = {1, p.heads, p.tokens, p.dim_k, p.dim_v, p.requests};

  p.state = check_pool(op, device, state, q, p.heads, p.dim_k, p.dim_v, a.accumulation);
  p.slots = state.size(0);
  args.state = state;

  const char* per_request = "], one for each request";
  args.read_slots = check_indices(op, "read_slots", read_slots, device, q, p.requests, per_request);
  args.write_slots = check_indices(op, "write_slots", write_slots, device, q, p.requests, per_request);
  if (!read_slots && p.slots < p.requests)
    fail(op, ": state.shape[0] is ", p.slots, ", expected at least ", p.requests,
         " (one state for each request; pass read_slots where they are elsewhere)");
  if (has_initial_state) {
    check_device(op, "has_initial_state", *has_initial_state, device, q);
    check_dtype(op, "has_initial_state", *has_initial_state, ScalarType::Bool, "");
    if (has_initial_state->dim() != 1 || has_initial_state->size(0) != p.requests)
      fail(op, ": has_initial_state has shape ", shape_text(*has_initial_state), ", expected ", per_request);
    args.has_initial_state =
        has_initial_state->is_contiguous() ? *has_initial_state : torch::stable::contiguous(*has_initial_state);
  }
  const int given = snapshot_offsets.has_value() + snapshot_tokens.has_value() + snapshot_slots.has_value();
  if (given != 0 && given != 3)
    fail(op, ": ",
         !snapshot_offsets  ? "snapshot_offsets"
         : !snapshot_tokens ? "snapshot_tokens"
                            : "snapshot_slots",
         " is None, expected snapshot_offsets, snapshot_tokens and snapshot_slots together");
  const char* ends = "], one for each request and one more";
  args.snapshot_offsets = check_indices(op, "snapshot_offsets", snapshot_offsets, device, q, p.requests + 1, ends);
  args.snapshot_tokens = check_indices(op, "snapshot_tokens", snapshot_tokens, device, q, -1, "number of snapshots]");
  p.snapshots = args.snapshot_tokens ? args.snapshot_tokens->size(0) : 0;
  const char* per_snapshot = "] as snapshot_tokens";
  args.snapshot_slots = check_indices(op, "snapshot_slots", snapshot_slots, device, q, p.snapshots, per_snapshot);
  if (slope) {
    check_slope(op, device, *slope, q, p.requests, p.heads, a.accumulation);
    a.slope = slope;
  }

  set_token_rows(args);
  p.slope = slopes(a.slope);
  p.cu_seqlens = indices(a.cu_seqlens);
  p.read_slots = indices(args.read_slots);
  p.write_slots = indices(args.write_slots);
  p.has_initial_state =
      args.has_initial_state ? static_cast<const bool*>(args.has_initial_state->const_data_ptr()) : nullptr;
  p.snapshot_offsets = indices(args.snapshot_offsets);
  p.snapshot_tokens = indices(args.snapshot_tokens);
  p.snapshot_slots = indices(args.snapshot_slots);
  return args;
}

void take_silu(Extend& args) {
  take_silu(args.attention, args.params.silu);
  args.params.silu = 0;
  set_token_rows(args);
}

void check_extend_numbers(const ExtendParams& p) {
  const char* op = "la2::extend";
  auto at = [](const Indices& indices, int64_t i) -> int64_t {
    return indices.is_int64 ? static_cast<const int64_t*>(indices.data)[i]
                            : static_cast<const int32_t*>(indices.data)[i];
  };
  auto check_ascending = [&](const char* name, const Indices& offsets, int64_t most, const char* what) {
    if (at(offsets, 0) != 0) fail(op, ": ", name, "[0] is ", at(offsets, 0), ", expected 0");
    for (int64_t r = 0; r < p.requests; ++r)
      if (at(offsets, r + 1) < at(offsets, r))
        fail(op, ": ", name, "[", r + 1, "] is ", at(offsets, r + 1), ", expected at least ", name, "[", r,
             "] = ", at(offsets, r));
    if (at(offsets, p.requests) > most)
      fail(op, ": ", name, "[-1] is ", at(offsets, p.requests), ", expected at most the number of ", what, ", ", most);
  };
  const Indices& write_slots = p.write_slots.data != nullptr ? p.write_slots : p.read_slots;
  const char* const write_name = p.write_slots.data != nullptr ? "write_slots" : "read_slots";
  auto slot_at = [&](const char* name, const Indices& slots, int64_t i) {
    const int64_t slot = slots.data != nullptr ? at(slots, i) : i;
    if (slot >= p.slots)
      fail(op, ": ", name, "[", i, "] is ", slot, ", expected less than the ", p.slots, " slots of state");
    return slot;
  };
  // Who writes a slot: nobody (-1), request i, snapshot i - requests.
  std::vector<int64_t> writers(static_cast<size_t>(p.slots), -1);
  auto text_of = [&](int64_t writer) {
    const bool is_snapshot = writer >= p.requests;
    return std::string(is_snapshot ? "snapshot_slots" : write_name) + '[' +
           std::to_string(is_snapshot ? writer - p.requests : writer) + ']';
  };
  auto note_writer = [&](int64_t slot, int64_t writer) {
    if (slot < 0) return;
    int64_t& noted = writers[static_cast<size_t>(slot)];
    if (noted >= 0) fail(op, ": ", text_of(writer), " is ", slot, ", expected another slot than ", text_of(noted));
    noted = writer;
  };

  check_ascending("cu_seqlens", p.cu_seqlens, p.tokens, "tokens");
  for (int64_t r = 0; r < p.requests; ++r) note_writer(slot_at(write_name, write_slots, r), r);
  if (p.snapshot_offsets.data != nullptr) {
    check_ascending("snapshot_offsets", p.snapshot_offsets, p.snapshots, "snapshots");
    for (int64_t r = 0; r < p.requests; ++r) {
      const int64_t length = at(p.cu_seqlens, r + 1) - at(p.cu_seqlens, r);
      for (int64_t m = at(p.snapshot_offsets, r); m < at(p.snapshot_offsets, r + 1); ++m) {
        const int64_t count = at(p.snapshot_tokens, m);
        if (count < 0 || count > length)
          fail(op, ": snapshot_tokens[", m, "] is ", count, ", expected 0 to ", length, ", the tokens of request ", r);
        note_writer(slot_at("snapshot_slots", p.snapshot_slots, m), p.requests + m);
      }
    }
  }
  for (int64_t r = 0; r < p.requests; ++r) {
    const int64_t slot = slot_at("read_slots", p.read_slots, r);
    if (slot < 0 || (p.has_initial_state != nullptr && !p.has_initial_state[r])) continue;
    const int64_t writer = writers[static_cast<size_t>(slot)];
    if (writer >= 0 && writer != r)
      fail(op, ": read_slots[", r, "] is ", slot, ", expected a slot that no other writes, as ", text_of(writer),
           " does");
  }
}

Rows rows(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

MutableRows mutable_rows(const Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

State state(const OptTensor& t) {
  if (!t) return {nullptr, 0, 0, 0, 0};
  return {t->const_data_ptr(), t->stride(0), t->stride(1), t->stride(2), t->stride(3)};
}

MutableState mutable_state(const Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

Slopes slopes(const OptTensor& t) {
  if (!t) return {nullptr, 0, 0};
  if (t->dim() == 1) return {t->const_data_ptr(), 0, t->stride(0)};
  return {t->const_data_ptr(), t->stride(0), t->stride(1)};
}

SeqOffsets seq_offsets(const OptTensor& t) {
  if (!t) return {nullptr, false};
  return {t->const_data_ptr(), t->scalar_type() == ScalarType::Long};
}

Tensor empty_rows(const Tensor& like, int64_t dim) {
  const int64_t b = like.size(0), h = like.size(1), n = like.size(2);
  const int64_t h1 = h > 1 ? h : 1, n1 = n > 1 ? n : 1;  // torch's strides of empty tensors
  const bool heads_inside = like.stride(1) < like.stride(2);
  const std::vector<int64_t> strides = heads_inside ? std::vector<int64_t>{n1 * h1 * dim, dim, h1 * dim, 1}
                                                    : std::vector<int64_t>{h1 * n1 * dim, n1 * dim, dim, 1};
  return empty_strided(like, {b, h, n, dim}, strides, like.scalar_type());
}

Tensor empty_state(const Attention& args) {
  const Sizes& s = args.sizes;
  return empty_contiguous(args.q, {s.num_seqs, s.heads, s.dim_k, s.dim_v}, args.accumulation);
}

ForwardParams forward_params(const Attention& args, const Tensor& out) {
  ForwardParams p{};
  p.sizes = args.sizes;
  p.dtype = args.dtype;
  p.q = rows(args.q);
  p.k = rows(args.k);
  p.v = rows(args.v);
  p.out = mutable_rows(out);
  p.slope = slopes(args.slope);
  p.initial_state = state(args.initial_state);
  p.cu_seqlens = seq_offsets(args.cu_seqlens);
  p.scale = args.scale;
  return p;
}

}  // namespace la2::ops
