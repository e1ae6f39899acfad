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

DType kernel_dtype(const char* op, ScalarType t) {
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
      fail(op, ": q.dtype is ", dtype_name(t), ", expected float32, bfloat16, float16 or float64");
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
       q_fits ? device_text(q) + " as for q" : std::string(device_name(device)) + ", where the other inputs are");
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

// q, k and v against each other. `rank` is 4 ([B, H, N, D]) or 3 ([B, H, D]).
void check_qkv(const char* op, DeviceType device, const Tensor& q, const Tensor& k, const Tensor& v, int64_t rank) {
  const char* want = rank == 4 ? "[batch, heads, length, head_dim]" : "[rows, heads, head_dim]";
  check_rank(op, "q", q, rank, want);
  check_rank(op, "k", k, rank, want);
  check_rank(op, "v", v, rank, want);
  check_device(op, "q", q, device, q);
  check_device(op, "k", k, device, q);
  check_device(op, "v", v, device, q);
  kernel_dtype(op, q.scalar_type());
  check_dtype(op, "k", k, q.scalar_type(), " as for q");
  check_dtype(op, "v", v, q.scalar_type(), " as for q");
  for (int64_t i = 0; i + 1 < rank; ++i) {
    if (k.size(i) != q.size(i)) fail(op, ": k.shape[", i, "] is ", k.size(i), ", expected ", q.size(i), " as for q");
    if (v.size(i) != q.size(i)) fail(op, ": v.shape[", i, "] is ", v.size(i), ", expected ", q.size(i), " as for q");
  }
  if (k.size(rank - 1) != q.size(rank - 1))
    fail(op, ": k.shape[-1] is ", k.size(rank - 1), ", expected ", q.size(rank - 1), " as for q");
  check_head_dim(op, "q", q);
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

}  // namespace

Attention check_attention(const char* op, DeviceType device, const Tensor& q, const Tensor& k, const Tensor& v,
                          const OptTensor& slope, const OptTensor& initial_state, const OptTensor& cu_seqlens,
                          double scale) {
  check_qkv(op, device, q, k, v, 4);
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
    if (device == DeviceType::CPU) check_seq_offsets(op, "cu_seqlens", *args.cu_seqlens, args.sizes.length, true);
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

Decode check_decode(DeviceType device, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                    const OptTensor& slope, const OptTensor& state_indices, double scale) {
  const char* op = "la2::decode";
  check_qkv(op, device, q, k, v, 3);
  Decode args;
  DecodeParams& p = args.params;
  p.rows = q.size(0);
  p.heads = q.size(1);
  p.dim_k = q.size(2);
  p.dim_v = v.size(2);
  p.dtype = kernel_dtype(op, q.scalar_type());
  p.scale = scale;
  const ScalarType accumulation = p.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;

  check_device(op, "state", state, device, q);
  check_dtype(op, "state", state, accumulation, "");
  if (state.dim() != 4 || state.size(1) != p.heads || state.size(2) != p.dim_k || state.size(3) != p.dim_v)
    fail(op, ": state has shape ", shape_text(state), ", expected [slots, ", p.heads, ", ", p.dim_k, ", ", p.dim_v,
         "] (slots, heads, key dim, value dim)");
  for (int64_t i = 0; i < 4; ++i)
    if (state.stride(i) == 0 && state.size(i) > 1)
      fail(op, ": state.stride(", i, ") is 0, expected every element of an updated state to have its own memory");
  p.slots = state.size(0);

  if (state_indices) {
    const Tensor& indices = *state_indices;
    check_device(op, "state_indices", indices, device, q);
    if (!is_index(indices))
      fail(op, ": state_indices.dtype is ", dtype_name(indices.scalar_type()), ", expected int32 or int64");
    if (indices.dim() != 1 || indices.size(0) != p.rows)
      fail(op, ": state_indices has shape ", shape_text(indices), ", expected [", p.rows, "], one slot for each row");
    args.state_indices = indices.is_contiguous() ? indices : torch::stable::contiguous(indices);
  } else if (p.slots != p.rows) {
    fail(op, ": state.shape[0] is ", p.slots, ", expected ", p.rows,
         " (one state for each row; pass state_indices to use a larger pool)");
  }
  if (slope) {
    check_slope(op, device, *slope, q, p.rows, p.heads, accumulation);
    args.slope = slope;
  }

  args.q = readable_rows(q);
  args.k = readable_rows(k);
  args.v = readable_rows(v);
  args.state = state;
  p.q = {args.q.const_data_ptr(), args.q.stride(0), args.q.stride(1), 0};
  p.k = {args.k.const_data_ptr(), args.k.stride(0), args.k.stride(1), 0};
  p.v = {args.v.const_data_ptr(), args.v.stride(0), args.v.stride(1), 0};
  p.state = mutable_state(state);
  p.slope = slopes(args.slope);
  p.state_indices = args.state_indices ? args.state_indices->const_data_ptr() : nullptr;
  p.indices_are_int64 = args.state_indices && args.state_indices->scalar_type() == ScalarType::Long;
  return args;
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
