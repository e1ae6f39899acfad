// The operators on CUDA: check -> unpack -> plan -> allocate -> launch -> raise.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <optional>

#include "../core/plan.h"
#include "../kernels/simt/extend.h"
#include "../kernels/simt/launch.h"
#include "../kernels/sm80/launch.h"
#include "../kernels/sm90/launch.h"
#include "arguments.h"
#include "check_values.h"
#include "direct.h"
#include "export.h"
#include "recurrent_ops.h"

// torch/csrc/inductor/aoti_torch/c/shim.h hides it where torch was built without CUDA.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace la2::ops {
namespace {

constexpr DeviceType kDevice = DeviceType::CUDA;

void check_cuda(const char* op, const char* what, cudaError_t error) {
  if (error != cudaSuccess)
    fail(op, ": ", what, " failed: ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")");
}

// Asked for once a thread: six calls of the driver would be a good part of a decode step.
const DeviceProps& props_of(int device) {
  thread_local int known = -1;
  thread_local DeviceProps props;
  if (known == device) return props;
  auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    cudaDeviceGetAttribute(&value, which, device);
    return value;
  };
  props.compute_capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  props.num_sms = attribute(cudaDevAttrMultiProcessorCount);
  props.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  props.shared_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  known = device;
  return props;
}
bool orders_kernels(const DeviceProps& props) { return props.compute_capability >= 90; }  // ptx/launch_order.cuh

// Makes the tensor's device current for torch and for this library's own CUDA runtime, and takes torch's stream.
class Device {
 public:
  Device(const char* op, const Tensor& t) : index_(t.get_device_index()) {
    int32_t current = -1;
    if (aoti_torch_get_current_device_index(&current) != 0 || current != index_) guard_.emplace(index_);
    check_cuda(op, "cudaSetDevice", cudaSetDevice(index_));
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(index_, &stream) != 0) fail(op, ": torch has no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  // Whether a call may read values that lie on the device: LA2_CHECK=1, and the stream is not captured into a graph,
  // where nothing has been computed yet and reading would end the capture.
  bool values_are_checked() const {
    if (!ops::values_are_checked()) return false;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(stream_, &status) == cudaSuccess && status == cudaStreamCaptureStatusNone;
  }

  const DeviceProps& props() const { return props_of(index_); }
  bool orders_kernels() const { return ops::orders_kernels(props()); }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  int index_;
  cudaStream_t stream_ = nullptr;
};

// What csrc/core/plan.h calls mappable, of one operand.
bool is_mappable(const Tensor& t) {
  constexpr int64_t kEndOfStrides = int64_t{1} << 40;  // bytes
  bool mappable = true;
  for (int64_t i = 0; i + 1 < t.dim(); ++i)
    mappable = mappable && (t.size(i) <= 1 || (t.stride(i) > 0 && t.stride(i) < kEndOfStrides / 2));
  return mappable;
}

bool are_mappable(const Attention& args) { return is_mappable(args.q) && is_mappable(args.k) && is_mappable(args.v); }

Plan plan_for(const Attention& args, bool backward, bool slope_grad, bool mappable, const Device& device,
              bool is_extend = false, bool silu = false) {
  const Sizes& s = args.sizes;
  Problem problem;
  problem.backward = backward;
  problem.dtype = args.dtype;
  problem.batch = s.batch;
  problem.heads = s.heads;
  problem.length = s.length;
  problem.dim_k = s.dim_k;
  problem.dim_v = s.dim_v;
  problem.num_seqs = s.num_seqs;
  problem.packed = args.cu_seqlens.has_value();
  problem.slope_grad = slope_grad;
  problem.is_extend = is_extend;
  problem.silu = silu;
  problem.mappable = mappable && are_mappable(args);
  const char* forced = std::getenv("LA2_PLAN");
  Plan plan;
  const Status status = recall_plan(problem, device.props(), forced ? forced : "", &plan);
  if (!status.is_ok()) fail(args.op, ": ", status.message());
  return plan;
}

// Launch `which` of the plan, on the jobs in params. `behind`: sm90, the launch before it was one of these.
void launch(const Attention& args, const Plan& plan, int which, const TrilinearParams& params, bool gradients,
            bool slope_grad, const Device& device, bool behind = false) {
  const Tile& tile = plan.tiles[which];
  const cudaStream_t stream = device.stream();
  cudaError_t error;
  if (plan.family == Family::kSm90) {
    sm90::LaunchOptions options;
    options.max_blocks = plan.max_blocks[which];
    // Behind the combine or the state pass, whose states it reads; behind another launch, of which it needs nothing and
    // which has waited for the combine pass. Behind the short requests of an extend, whose rows and slots are others.
    options.overlaps = params.is_cut || behind || params.units != nullptr;
    options.reads_previous = params.is_cut && !behind;
    const bool both = plan.is_fused && which == 0, silu = params.jobs[0].silu != 0;
    const bool is_dq = gradients && !params.jobs[0].reverse;
    const sm90::Split split = is_dq ? sm90::split_of_dq(tile) : sm90::split_of(gradients);
    error = sm90::launch_trilinear(params, {args.dtype, tile.tile_a, tile.slice, split, both, silu}, options, stream);
  } else if (plan.family == Family::kSm80) {
    const sm80::LaunchOptions options{false, device.orders_kernels() && params.is_cut && which == 0};
    error =
        sm80::launch_trilinear(params, {args.dtype, tile.tile_a, tile.slice, gradients, slope_grad}, options, stream);
  } else {
    error = simt::launch_trilinear(params, args.dtype, stream);
  }
  check_cuda(args.op, "launching the kernel", error);
}

// The launch of a cooperative plan: false where not all of its blocks can be resident after all (a stream that has a
// part of the multiprocessors), and nothing was done.
bool launch_in_one_pass(const Attention& args, const Plan& plan, TrilinearParams& params, const Device& device) {
  const Tile& tile = plan.tiles[0];
  cudaError_t error;
  if (plan.family == Family::kSm90) {
    params.local_floats = plan.state_floats[0];
    sm90::LaunchOptions options;
    options.in_one_pass = true;
    error = sm90::launch_trilinear(params, {args.dtype, tile.tile_a, tile.slice, sm90::split_of(false), false, false},
                                   options, device.stream());
  } else {
    sm80::LaunchOptions options;
    options.in_one_pass = true;
    error =
        sm80::launch_trilinear(params, {args.dtype, tile.tile_a, tile.slice, false, false}, options, device.stream());
  }
  if (error == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();
    return false;
  }
  check_cuda(args.op, "launching the kernel", error);
  return true;
}

// The state pass for the jobs of launch `which`.
void launch_states(const Attention& args, const Plan& plan, int which, const TrilinearParams& params, bool gradients,
                   cudaStream_t stream) {
  const Tile& tile = plan.state_tiles[which];
  cudaError_t error;
  if (plan.family == Family::kSm90) {
    sm90::LaunchOptions options;
    options.state_only = true;
    // Behind the short requests of an extend. (Behind its plan, which the snapshots' pass reads at once, it does not.)
    options.overlaps = params.units != nullptr && !params.states_alone;
    const bool silu = params.jobs[0].silu != 0;
    error = sm90::launch_trilinear(
        params, {args.dtype, tile.tile_a, tile.slice, sm90::split_of(gradients), false, silu}, options, stream);
  } else if (plan.family == Family::kSm80) {
    error =
        sm80::launch_trilinear(params, {args.dtype, tile.tile_a, tile.slice, gradients, false}, {true, false}, stream);
  } else {
    error = simt::launch_state_pass(params, args.dtype, stream);
  }
  check_cuda(args.op, "launching the state pass", error);
}

// Where sequences are cut: the states that enter each segment in the jobs of launch `which`, from the state pass and
// its combination.
void enter_segments(const Attention& args, const Plan& plan, int which, TrilinearParams& params, bool gradients,
                    const Device& device) {
  if (!params.is_cut) return;
  if (plan.family == Family::kSm90) params.local_floats = plan.state_floats[which];
  launch_states(args, plan, which, params, gradients, device.stream());
  if (params.sums_states) return;
  // Of two segments the second one is entered by what leaves the first.
  if (plan.family == Family::kSm90 && plan.num_segments == 2 && plan.num_pieces == 1) return;
  const bool overlaps = plan.family != Family::kSimt && device.orders_kernels();
  check_cuda(args.op, "launching the combine pass",
             simt::launch_combine(params, args.dtype == DType::kFloat64, overlaps, device.stream()));
}

TrilinearParams common_params(const Attention& args, const Plan& plan) {
  TrilinearParams params{};
  params.sizes = args.sizes;
  params.slope = slopes(args.slope);
  params.cu_seqlens = seq_offsets(args.cu_seqlens);
  set_segment_len(params, plan.segment_len);
  params.num_units = plan.num_units;
  params.is_cut = plan.num_segments > 1;
  params.num_pieces = plan.num_pieces;
  params.piece_chunks = static_cast<int32_t>(plan.piece_chunks);
  return params;
}

// A state [dim_a, dim_c] per unit, piece and head for the jobs of launch `which`: [num_pieces num_units, H, floats],
// and what spare_states says.
Tensor empty_local_states(const Attention& args, const Plan& plan, int which, int64_t dim_a, int64_t dim_c) {
  const int64_t units =
      plan.num_segments > 1 ? plan.num_units * plan.num_pieces + spare_states(bool(args.cu_seqlens), plan) : 0;
  const int64_t own = plan.state_floats[which];
  return empty_contiguous(args.q, {units, args.sizes.heads, own != 0 ? own : dim_a * dim_c}, args.accumulation);
}

MutableState local_state(const Tensor& t, int64_t dim_c) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), dim_c, 1};
}

State transposed(const State& s) { return {s.data, s.stride_s, s.stride_h, s.stride_e, s.stride_d}; }
MutableState transposed(const MutableState& s) { return {s.data, s.stride_s, s.stride_h, s.stride_e, s.stride_d}; }

// silu: bits of Silu, of operands that go through it first.
void run_forward(Attention& args, const Tensor& out, const Tensor* final_state, int32_t silu = 0) {
  const Device device(args.op, args.q);
  if (device.values_are_checked()) check_values(args);
  Plan plan = plan_for(args, false, false, true, device, false, silu != 0);
  if (silu != 0 && !plan.takes_silu) {
    const bool was_mappable = are_mappable(args);
    take_silu(args, silu);
    silu = 0;
    if (!was_mappable) plan = plan_for(args, false, false, true, device);
  }
  TrilinearParams params = common_params(args, plan);
  const Tensor local = empty_local_states(args, plan, 0, args.sizes.dim_k, args.sizes.dim_v);
  params.num_jobs = 1;
  TrilinearJob& job = params.jobs[0];  // out = T(q, k, v)
  job.a = rows(args.q);
  job.b = rows(args.k);
  job.c = rows(args.v);
  job.out = mutable_rows(out);
  job.dim_a = static_cast<int32_t>(args.sizes.dim_k);
  job.dim_c = static_cast<int32_t>(args.sizes.dim_v);
  job.silu = silu;
  job.inter = job.intra = args.scale;
  job.update = 1;
  job.initial = state(args.initial_state);
  if (final_state) job.final = mutable_state(*final_state);
  job.local = local_state(local, args.sizes.dim_v);
  if (plan.in_one_pass && launch_in_one_pass(args, plan, params, device)) return;
  enter_segments(args, plan, 0, params, false, device);
  launch(args, plan, 0, params, false, false, device);
}

Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& slope,
               const OptTensor& initial_state, const OptTensor& cu_seqlens, double scale) {
  Attention args = check_attention("la2::forward", kDevice, q, k, v, slope, initial_state, cu_seqlens, scale);
  Tensor out = empty_rows(q, args.sizes.dim_v);
  run_forward(args, out, nullptr);
  return out;
}

std::tuple<Tensor, Tensor> forward_with_state(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& slope,
                                              const OptTensor& initial_state, const OptTensor& cu_seqlens,
                                              double scale) {
  Attention args =
      check_attention("la2::forward_with_state", kDevice, q, k, v, slope, initial_state, cu_seqlens, scale);
  Tensor out = empty_rows(q, args.sizes.dim_v);
  Tensor final_state = empty_state(args);
  run_forward(args, out, &final_state);
  return {out, final_state};
}

std::tuple<Tensor, Tensor> forward_silu(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& slope,
                                        const OptTensor& initial_state, const OptTensor& cu_seqlens, double scale,
                                        int64_t silu, bool need_state) {
  Attention args = check_attention("la2::forward_silu", kDevice, q, k, v, slope, initial_state, cu_seqlens, scale);
  const int32_t bits = check_silu(args.op, silu);
  Tensor out = empty_rows(q, args.sizes.dim_v);
  Tensor final_state = need_state ? empty_state(args) : empty_contiguous(q, {0}, args.accumulation);
  run_forward(args, out, need_state ? &final_state : nullptr, bits);
  return {out, final_state};
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
  const bool wants_dslope = slope.has_value() && need_dslope;

  Tensor dq = empty_rows(q, s.dim_k), dk = empty_rows(k, s.dim_k), dv = empty_rows(v, s.dim_v);
  Tensor dinitial_state = initial_state ? empty_state(args) : empty_contiguous(q, {0}, args.accumulation);
  std::vector<int64_t> dslope_sizes{0};
  if (wants_dslope)
    dslope_sizes = slope->dim() == 1 ? std::vector<int64_t>{s.heads} : std::vector<int64_t>{s.num_seqs, s.heads};
  Tensor dslope = empty_contiguous(q, dslope_sizes, args.accumulation);

  const Device device(args.op, args.q);
  if (device.values_are_checked()) check_values(args);
  const Plan plan = plan_for(args, true, wants_dslope, is_mappable(grad_rows), device);
  TrilinearParams params = common_params(args, plan);
  const Tensor local_dq = empty_local_states(args, plan, 0, s.dim_v, s.dim_k);
  const Tensor local_dk = empty_local_states(args, plan, 0, s.dim_v, s.dim_k);
  const bool shares_states = plan.family != Family::kSm90 || plan.is_fused;  // dv with dk
  const Tensor local_dv =
      shares_states ? empty_contiguous(q, {0}, args.accumulation) : empty_local_states(args, plan, 1, s.dim_k, s.dim_v);
  const Tensor dots = empty_contiguous(q, {2, plan.dot_floats / 2}, args.accumulation);

  TrilinearJob dq_job{};  // dq = T(dout, v, k)
  dq_job.a = rows(grad_rows);
  dq_job.b = rows(args.v);
  dq_job.c = rows(args.k);
  dq_job.out = mutable_rows(dq);
  dq_job.dim_a = static_cast<int32_t>(s.dim_v);
  dq_job.dim_c = static_cast<int32_t>(s.dim_k);
  dq_job.inter = dq_job.intra = scale;
  dq_job.update = 1;
  dq_job.initial = transposed(state(args.initial_state));
  dq_job.local = local_state(local_dq, s.dim_k);

  TrilinearJob dk_job{};  // dk = T_rev(v, dout, q)
  dk_job.a = rows(args.v);
  dk_job.b = rows(grad_rows);
  dk_job.c = rows(args.q);
  dk_job.out = mutable_rows(dk);
  dk_job.dim_a = dq_job.dim_a;
  dk_job.dim_c = dq_job.dim_c;
  dk_job.reverse = true;
  dk_job.inter = 1;
  dk_job.intra = dk_job.update = scale;
  dk_job.initial = transposed(state(grad_state));
  dk_job.local = local_state(local_dk, s.dim_k);

  TrilinearJob dv_job = dk_job;  // dv = T_rev(k, q, dout), whose state is dk's transposed
  dv_job.a = rows(args.k);
  dv_job.b = rows(args.q);
  dv_job.c = rows(grad_rows);
  dv_job.out = mutable_rows(dv);
  dv_job.dim_a = dk_job.dim_c;
  dv_job.dim_c = dk_job.dim_a;
  dv_job.initial = state(grad_state);
  dv_job.local = shares_states ? transposed(dk_job.local) : local_state(local_dv, s.dim_v);
  // The gradient of the initial state is the last state of either.
  if (initial_state && plan.is_fused) dk_job.final = transposed(mutable_state(dinitial_state));
  if (initial_state && !plan.is_fused) dv_job.final = mutable_state(dinitial_state);

  if (wants_dslope) {
    char* const base = static_cast<char*>(dots.mutable_data_ptr());
    dq_job.x = rows(args.q);
    dq_job.dots = base;
    dk_job.x = rows(args.k);
    dk_job.dots = base + dots.stride(0) * static_cast<int64_t>(dots.element_size());
  }

  auto set_jobs = [&](std::initializer_list<const TrilinearJob*> jobs) {
    params.num_jobs = 0;
    for (const TrilinearJob* job : jobs) params.jobs[params.num_jobs++] = *job;
  };
  auto launch_jobs = [&](int which, std::initializer_list<const TrilinearJob*> jobs, bool behind = false) {
    set_jobs(jobs);
    launch(args, plan, which, params, true, wants_dslope && which == 0, device, behind);
  };
  set_jobs({&dq_job, &dk_job});
  enter_segments(args, plan, 0, params, true, device);
  if (plan.is_fused) {
    launch_jobs(0, {&dk_job, &dv_job});
    launch_jobs(1, {&dq_job}, true);
  } else if (plan.family == Family::kSm90) {
    launch_jobs(0, {&dq_job});
    launch_jobs(0, {&dk_job}, true);
    set_jobs({&dv_job});
    enter_segments(args, plan, 1, params, true, device);
    launch_jobs(1, {&dv_job}, !params.is_cut);
  } else if (plan.num_launches == 1) {
    launch_jobs(0, {&dq_job, &dk_job, &dv_job});
  } else {
    launch_jobs(0, {&dq_job, &dk_job});
    launch_jobs(1, {&dv_job});
  }

  if (wants_dslope) {
    simt::SlopeGradParams p{};
    p.sizes = s;
    p.cu_seqlens = params.cu_seqlens;
    p.chunk = plan.tiles[0].chunk;
    p.dots_q = dq_job.dots;
    p.dots_k = dk_job.dots;
    p.slices_q = p.slices_k = (s.dim_k + plan.tiles[0].slice - 1) / plan.tiles[0].slice;
    p.initial_state = state(args.initial_state);
    if (initial_state) p.grad_initial_state = state(dinitial_state);
    p.grad_slope = dslope.mutable_data_ptr();
    p.is_shared = slope->dim() == 1;
    p.is_double = args.dtype == DType::kFloat64;
    check_cuda(args.op, "launching the slope gradient", simt::launch_slope_grad(p, device.stream()));
  }
  return {dq, dk, dv, dslope, dinitial_state};
}

// The state pass of dq (reverse: of dk), whose operands are split, on whole sequences.
Tensor states(const Tensor& k, const Tensor& v, const OptTensor& slope, const OptTensor& cu_seqlens, bool reverse) {
  const Attention args = check_attention("la2::_states", kDevice, k, k, v, slope, std::nullopt, cu_seqlens, 1);
  const Sizes& s = args.sizes;
  Tensor result = empty_state(args);
  const Device device(args.op, args.k);
  // Rows before the first sequence and behind the last are nobody's here, so the offsets may begin and end anywhere.
  if (device.values_are_checked() && args.slope) check_slopes(args.op, *args.slope);
  const Plan plan = plan_for(args, true, false, true, device);
  TrilinearParams params = common_params(args, plan);
  constexpr int64_t kChunks = 64;  // of any kernel
  set_segment_len(params, (s.length / kChunks + 1) * kChunks);
  params.num_units = s.num_seqs;
  params.is_cut = false;
  params.num_pieces = 1;
  params.states_alone = true;
  params.num_jobs = 1;
  TrilinearJob& job = params.jobs[0];
  job.b = rows(args.v);
  job.c = rows(args.k);
  job.dim_a = static_cast<int32_t>(s.dim_v);
  job.dim_c = static_cast<int32_t>(s.dim_k);
  job.reverse = reverse;
  job.update = 1;
  job.final = transposed(mutable_state(result));
  launch_states(args, plan, 0, params, true, device.stream());
  return result;
}

// decode, verify and commit: the states of `args` go on by its tokens; `out` where it is wanted.
void run_recurrent(const char* op, Recurrent& args, const Device& device) {
  const RecurrentParams& p = args.params;
  if (device.values_are_checked()) check_values(op, args);
  if (p.writes_state) bump_version(op, args.state);
  check_cuda(op, "launching the kernel", simt::launch_recurrent(p, device.orders_kernels(), device.stream()));
}
void run_recurrent(const char* op, Recurrent& args) { run_recurrent(op, args, Device(op, args.k)); }

void run_gated_norm(const char* op, Recurrent& args, const GatedNormParams& norm) {
  const Device device(op, args.k);
  run_recurrent(op, args, device);
  check_cuda(op, "launching the norm", simt::launch_gated_norm(norm, device.orders_kernels(), device.stream()));
}

using OnPools = RecurrentOps<&run_recurrent, &run_gated_norm, kDevice>;

// ---- extend

// What the device alone knows is fetched, which waits for it, and checked as on the CPU.
void check_numbers(ExtendParams p, const OptTensor& slope, cudaStream_t stream) {
  std::vector<std::vector<char>> copies;
  auto fetch = [&](const void* from, int64_t bytes) -> const void* {
    if (from == nullptr) return nullptr;
    std::vector<char>& copy = copies.emplace_back(static_cast<size_t>(std::max<int64_t>(bytes, 1)));
    check_cuda("la2::extend", "reading what LA2_CHECK=1 checks",
               cudaMemcpyAsync(copy.data(), from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream));
    return copy.data();
  };
  auto fetch_indices = [&](Indices& indices, int64_t count) {
    indices.data = fetch(indices.data, count * (indices.is_int64 ? 8 : 4));
  };
  fetch_indices(p.cu_seqlens, p.requests + 1);
  fetch_indices(p.read_slots, p.requests);
  fetch_indices(p.write_slots, p.requests);
  fetch_indices(p.snapshot_offsets, p.requests + 1);
  fetch_indices(p.snapshot_tokens, p.snapshots);
  fetch_indices(p.snapshot_slots, p.snapshots);
  p.has_initial_state = static_cast<const bool*>(fetch(p.has_initial_state, p.requests));
  check_cuda("la2::extend", "reading what LA2_CHECK=1 checks", cudaStreamSynchronize(stream));
  check_extend_numbers(p);
  if (slope) check_slopes("la2::extend", *slope);
}

// int64 elements of device memory for the tables.
constexpr int64_t kUnitEntry = sizeof(UnitEntry) / sizeof(int64_t);
int64_t table_elements(const ExtendParams& p, const Plan& plan) {
  return 4 * p.requests + kUnitEntry * plan.num_units * (1 + plan.lanes) + (kUnitEntry + 2) * p.snapshots;
}

static_assert(kMostLanes <= simt::kMostLanes);

simt::ExtendTables extend_tables(const Tensor& memory, const ExtendParams& p, const Plan& plan) {
  int64_t* next = static_cast<int64_t*>(memory.mutable_data_ptr());
  auto take = [&](int64_t count) {
    int64_t* const taken = next;
    next += count;
    return taken;
  };
  simt::ExtendTables tables{};
  tables.units = reinterpret_cast<UnitEntry*>(take(kUnitEntry * plan.num_units));
  tables.lanes.count = plan.lanes;
  tables.lanes.item_tokens = plan.item_tokens;
  tables.lanes.walks = reinterpret_cast<UnitEntry*>(take(kUnitEntry * plan.num_units * plan.lanes));
  tables.snapshot_units = reinterpret_cast<UnitEntry*>(take(kUnitEntry * p.snapshots));
  tables.begins = take(p.requests);
  tables.lengths = take(p.requests);
  tables.read_slots = take(p.requests);
  tables.write_slots = take(p.requests);
  tables.snapshot_read_slots = take(p.snapshots);
  tables.snapshot_write_slots = take(p.snapshots);
  tables.num_units = plan.num_units;
  return tables;
}

State with_slots(const MutableState& s, const int64_t* slots) {
  return {s.data, s.stride_s, s.stride_h, s.stride_d, s.stride_e, slots, s.is_bf16};
}

Tensor extend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state, const Tensor& cu_seqlens,
              const OptTensor& slope, const OptTensor& read_slots, const OptTensor& write_slots,
              const OptTensor& has_initial_state, const OptTensor& snapshot_offsets, const OptTensor& snapshot_tokens,
              const OptTensor& snapshot_slots, double scale, int64_t silu) {
  Extend args = check_extend(kDevice, q, k, v, state, cu_seqlens, slope, read_slots, write_slots, has_initial_state,
                             snapshot_offsets, snapshot_tokens, snapshot_slots, scale, silu);
  ExtendParams& p = args.params;
  Attention& attention = args.attention;
  const char* op = attention.op;
  Tensor out = empty_contiguous(q, {p.tokens, p.heads, p.dim_v}, q.scalar_type());
  p.out = {out.mutable_data_ptr(), 0, out.stride(1), out.stride(0)};
  if (p.heads == 0) return out;

  const Device device(op, q);
  if (device.values_are_checked()) check_numbers(p, attention.slope, device.stream());
  bump_version(args.attention.op, args.state);
  // The trilinear kernels get the requests of two tokens or more. Many of a batch are decode rows: for the plan the
  // tokens are those of a few longer ones.
  constexpr int64_t kLikelyTokens = 512;
  const int64_t most_requests = std::min(p.requests, p.tokens / 2);
  attention.sizes.num_seqs = std::min(most_requests, std::max<int64_t>(1, p.tokens / kLikelyTokens));
  Plan plan = plan_for(attention, false, false, true, device, true, p.silu != 0);
  if (p.silu != 0 && !plan.takes_silu) {
    const bool was_mappable = are_mappable(attention);
    take_silu(args);
    if (!was_mappable) plan = plan_for(attention, false, false, true, device, true);
  }
  attention.sizes.num_seqs = most_requests;
  plan.num_units = most_requests + p.tokens / plan.segment_len;
  const bool is_cut = plan.num_segments > 1, is_sm90 = plan.family == Family::kSm90;
  if (is_sm90 && plan.max_blocks[0] == 0) {
    // How many units there are the host does not know: blocks that take turns at them make the absent ones cheap,
    // several to an SM even out unlike lengths.
    constexpr int64_t kBlocksOfSm = 8;
    plan.max_blocks[0] = kBlocksOfSm * device.props().num_sms;
  }

  const Tensor tables_memory = empty_contiguous(q, {table_elements(p, plan)}, ScalarType::Long);
  simt::ExtendTables tables = extend_tables(tables_memory, p, plan);
  // On Hopper requests of one segment, which come last, have no part in the passes before the main one: a longer one
  // has at most two segments for each segment_len tokens.
  const int64_t all_units = plan.num_units;
  if (is_sm90 && is_cut) plan.num_units = std::min(all_units, 2 * p.tokens / plan.segment_len);
  tables.long_units = plan.num_units;
  tables.long_len = 2 * p.tokens / std::max<int64_t>(p.requests, 1);
  if (is_cut) tables.cutting = {plan.segment_len, plan.cuts_if_it_gains, plan.pass_tokens};
  // Without a combine pass in between, which would have the multiprocessors, blocks of the main one begin beside those
  // of the state pass.
  const int64_t most_segments = (p.tokens + plan.segment_len - 1) / plan.segment_len;  // of one request
  const bool sums_states = is_sm90 && is_cut && plan.lanes > 0 && plan.num_pieces == 1 && p.silu == 0 &&
                           sm90_sums_states(plan.tiles[0], most_segments);
  if (sums_states) {
    const Tile& of_pass = plan.state_tiles[0];
    tables.lanes.blocks = static_cast<int>(plan.max_blocks[0] / plan.lanes);
    tables.lanes.pass_blocks = static_cast<int>(p.heads * ((p.dim_v + of_pass.slice - 1) / of_pass.slice));
    tables.lanes.num_sms = static_cast<int>(device.props().num_sms);
  }
  check_cuda(op, "launching the plan", simt::launch_extend_plan(p, tables, device.stream()));

  TrilinearParams params = common_params(attention, plan);  // num_units of the passes before the main one
  params.units = tables.units;
  params.num_jobs = 1;
  TrilinearJob& job = params.jobs[0];  // out = T(q, k, v)
  job.a = p.q;
  job.b = p.k;
  job.c = p.v;
  job.out = p.out;
  job.silu = p.silu;
  job.dim_a = static_cast<int32_t>(p.dim_k);
  job.dim_c = static_cast<int32_t>(p.dim_v);
  job.inter = job.intra = scale;
  job.update = 1;

  // Before anything is written: a request's own slot may be the one that it reads.
  if (p.snapshots > 0) {
    TrilinearParams snapshots = params;
    snapshots.units = tables.snapshot_units;
    snapshots.num_units = p.snapshots;
    snapshots.is_cut = false;
    snapshots.states_alone = true;
    snapshots.jobs[0].initial = with_slots(p.state, tables.snapshot_read_slots);
    snapshots.jobs[0].final = p.state;
    snapshots.jobs[0].final.slots = tables.snapshot_write_slots;
    launch_states(attention, plan, 0, snapshots, false, device.stream());
  }

  check_cuda(op, "launching the short requests", simt::launch_extend_rows(p, tables, is_sm90, device.stream()));
  if (most_requests == 0) return out;
  job.initial = with_slots(p.state, tables.read_slots);
  job.final = p.state;
  job.final.slots = tables.write_slots;
  const Tensor local = empty_local_states(attention, plan, 0, p.dim_k, p.dim_v);
  job.local = local_state(local, p.dim_v);
  params.sums_states = sums_states;
  enter_segments(attention, plan, 0, params, false, device);
  params.num_units = all_units;
  if (plan.lanes > 0) {
    params.units = tables.lanes.walks;
    params.num_units *= plan.lanes;
  }
  launch(attention, plan, 0, params, false, false, device);
  return out;
}

}  // namespace

// Asked for once: with one GPU in sight none has to be made current, which would be a twentieth of a direct call.
static bool has_one_gpu() {
  static const bool has_one = [] {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess && count == 1;
  }();
  return has_one;
}

// See direct.h.
LA2_EXPORT bool la2_decode_is_plain_cuda(const RecurrentParams* params, size_t bytes, int32_t device) {
  if (bytes != sizeof(*params) || values_are_checked()) return false;
  if (has_one_gpu()) return true;
  int32_t current = -1;
  return aoti_torch_get_current_device_index(&current) == 0 && current == device;
}
LA2_EXPORT bool la2_decode_direct_cuda(const RecurrentParams* params, int32_t device, void* stream) {
  if (!has_one_gpu() && cudaSetDevice(device) != cudaSuccess) return false;
  const bool overlaps = orders_kernels(props_of(device));
  return simt::launch_recurrent(*params, overlaps, static_cast<cudaStream_t>(stream)) == cudaSuccess;
}

STABLE_TORCH_LIBRARY_IMPL(la2, CUDA, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("forward_with_state", TORCH_BOX(&forward_with_state));
  m.impl("forward_silu", TORCH_BOX(&forward_silu));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("_states", TORCH_BOX(&states));
  m.impl("decode", TORCH_BOX(&OnPools::decode));
  m.impl("decode_gated_norm", TORCH_BOX(&OnPools::decode_gated_norm));
  m.impl("verify", TORCH_BOX(&OnPools::verify));
  m.impl("commit", TORCH_BOX(&OnPools::commit));
  m.impl("extend", TORCH_BOX(&extend));
}

}  // namespace la2::ops
