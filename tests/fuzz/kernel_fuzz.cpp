// The CPU kernels on parameters as csrc/ops unpacks them: any sizes, strides, layouts of states, offsets, indices.
// Every tensor lies in a block of exactly its extent, so that the address sanitizer sees one element too far; results
// start full of a pattern, of which an element that belongs to them keeps nothing and an element between them keeps
// all.
#include <algorithm>
#include <memory>
#include <numeric>

#include "fuzz.h"
#include "kernels/cpu/kernels.h"

namespace la2::cpu {
extern const Kernels kernels_baseline;
}

namespace {

using namespace la2;
using fuzz::Bytes;
using fuzz::check;

constexpr uint8_t kPattern = 0xfd;  // as any of the four dtypes a large negative number, which no result here is

int64_t bytes_of(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }
DType accumulation(DType t) { return t == DType::kFloat64 ? t : DType::kFloat32; }

// Strides of a dense tensor in an order of its dims, with gaps; the last `fixed` dims stay innermost.
std::vector<int64_t> strides(Bytes& in, const std::vector<int64_t>& sizes, int fixed) {
  std::vector<size_t> order(sizes.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  const size_t movable = order.size() - static_cast<size_t>(fixed);
  for (size_t i = 1; i < movable; ++i)
    std::swap(order[i], order[static_cast<size_t>(in.below(static_cast<int64_t>(i) + 1))]);
  std::vector<int64_t> result(sizes.size());
  int64_t stride = 1;
  for (size_t i = order.size(); i-- > 0;) {
    result[order[i]] = stride;
    stride *= std::max<int64_t>(sizes[order[i]], 1);
    if (in.below(4) == 0) stride += in.below(9) * (in.flag() ? 1 : 8);
  }
  return result;
}

// A tensor in a block of its own.
class Block {
 public:
  Block(Bytes& in, DType dtype, std::vector<int64_t> sizes, int fixed, bool is_result, bool may_expand = false)
      : sizes_(std::move(sizes)), strides_(strides(in, sizes_, fixed)), width_(bytes_of(dtype)) {
    if (may_expand && in.below(8) == 0) strides_[static_cast<size_t>(in.below(3))] = 0;
    int64_t extent = 1;
    for (size_t i = 0; i < sizes_.size(); ++i) {
      if (sizes_[i] == 0) extent = 0;
      if (extent > 0) extent += (sizes_[i] - 1) * strides_[i];
    }
#ifdef LA2_FUZZ_SHORT  // the fuzzer's own test: it must see this
    if (!is_result && extent > 1) --extent;
#endif
    bytes_ = extent * width_;
    data_.reset(new uint8_t[static_cast<size_t>(bytes_)]);
    if (is_result) {
      std::memset(data_.get(), kPattern, static_cast<size_t>(bytes_));
      return;
    }
    const uint32_t seed = in.byte();
    for (int64_t i = 0; i < extent; ++i) put(dtype, i, static_cast<float>((i * 37 + seed) % 17 - 8) / 8);
  }

  void* data() { return data_.get(); }
  int64_t stride(size_t i) const { return strides_[i]; }
  Rows rows() { return {data(), strides_[0], strides_[1], strides_.size() == 4 ? strides_[2] : 0}; }
  MutableRows mutable_rows() { return {data(), strides_[0], strides_[1], strides_.size() == 4 ? strides_[2] : 0}; }
  State state() { return {data(), strides_[0], strides_[1], strides_[2], strides_[3]}; }
  MutableState mutable_state() { return {data(), strides_[0], strides_[1], strides_[2], strides_[3]}; }

  void check_written() const {
    std::vector<bool> belongs(static_cast<size_t>(bytes_ / width_), false);
    mark(belongs, 0, 0);
    for (size_t i = 0; i < belongs.size(); ++i) {
      bool kept = true;
      for (int64_t b = 0; b < width_; ++b)
        kept = kept && data_[i * static_cast<size_t>(width_) + static_cast<size_t>(b)] == kPattern;
      if (belongs[i])
        check(!kept, "every element of a result is written");
      else
        check(kept, "nothing between the elements of a result is written");
    }
  }

  std::vector<uint8_t> contents() const { return {data_.get(), data_.get() + bytes_}; }

  // Nothing has changed but at these first indices.
  void check_kept(const std::vector<uint8_t>& before, const std::vector<int64_t>& written) const {
    std::vector<bool> may_change(static_cast<size_t>(bytes_ / width_), false);
    for (const int64_t i : written) mark(may_change, 1, i * strides_[0]);
    for (size_t i = 0; i < before.size(); ++i)
      check(may_change[i / static_cast<size_t>(width_)] || data_[i] == before[i],
            "nothing but what was named is written");
  }

 private:
  void mark(std::vector<bool>& belongs, size_t dim, int64_t at) const {
    if (dim == sizes_.size()) {
      belongs[static_cast<size_t>(at)] = true;
      return;
    }
    for (int64_t i = 0; i < sizes_[dim]; ++i) mark(belongs, dim + 1, at + i * strides_[dim]);
  }

  void put(DType dtype, int64_t i, float value) {
    uint8_t* at = data_.get() + i * width_;
    if (dtype == DType::kFloat64) {
      const double wide = value;
      std::memcpy(at, &wide, 8);
    } else if (dtype == DType::kFloat32) {
      std::memcpy(at, &value, 4);
    } else {  // eighths up to 1 are exact in both
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      uint16_t half = static_cast<uint16_t>(bits >> 16);
      if (dtype == DType::kFloat16)
        half = value == 0 ? 0
                          : static_cast<uint16_t>((bits >> 16 & 0x8000) | (((bits >> 23 & 255) - 112) << 10) |
                                                  (bits >> 13 & 1023));
      std::memcpy(at, &half, 2);
    }
  }

  std::vector<int64_t> sizes_, strides_;
  int64_t width_, bytes_ = 0;
  std::unique_ptr<uint8_t[]> data_;
};

int64_t dim(Bytes& in) { return 8 * (1 + in.below(in.below(8) ? 5 : 32)); }

cpu::Parallel threads(Bytes& in) {
  // In turn, but cut as for so many.
  auto run = [](int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
    for (int64_t i = 0; i < count; ++i) body(context, i, i + 1);
  };
  return {run, 1 + static_cast<int>(in.below(5))};
}

// Numbers of a type that the kernels read by a flag, in a block of exactly their size.
struct Integers {
  Integers(const std::vector<int64_t>& values, bool is_int64) : is_int64(is_int64) {
    const size_t width = is_int64 ? 8 : 4;
    data.reset(new uint8_t[values.size() * width]);
    for (size_t i = 0; i < values.size(); ++i) {
      const int32_t narrow = static_cast<int32_t>(values[i]);
      std::memcpy(data.get() + i * width, is_int64 ? static_cast<const void*>(&values[i]) : &narrow, width);
    }
  }
  std::unique_ptr<uint8_t[]> data;
  bool is_int64;
};

struct SlopeBlock {
  SlopeBlock(Bytes& in, DType acc, int64_t seqs, int64_t heads) {
    is_absent = in.below(4) == 0;
    const bool is_shared = in.flag();
    constexpr double kValues[] = {0, 1e-6, 0.03, 0.5, 7.9, 50, 1e4, 1e30};
    const int64_t count = is_shared ? heads : seqs * heads, width = bytes_of(acc);
    data.reset(new uint8_t[static_cast<size_t>(count * width)]);
    for (int64_t i = 0; i < count; ++i) {
      const double wide = kValues[in.below(8)];
      const float narrow = static_cast<float>(wide);
      std::memcpy(data.get() + i * width, width == 8 ? static_cast<const void*>(&wide) : &narrow,
                  static_cast<size_t>(width));
    }
    slopes = {is_absent ? nullptr : data.get(), is_shared ? 0 : heads, 1};
  }
  std::unique_ptr<uint8_t[]> data;
  bool is_absent;
  Slopes slopes;
};

// decode (one token, outputs and states), verify (outputs alone) or commit (states alone), pools of either dtype.
void recurrent(Bytes& in, DType dtype, double scale) {
  RecurrentParams p{};
  p.dtype = dtype;
  const int64_t kind = in.below(3);
  const bool has_out = kind != 2;
  p.rows = in.below(5), p.heads = in.below(4), p.dim_k = dim(in), p.dim_v = dim(in);
  p.tokens = kind == 0 ? 1 : 1 + in.below(kMaxRecurrentTokens);
  p.slots = p.rows + in.below(3);
  p.scale = scale;
  p.writes_state = kind != 1;
  const bool is_bf16 = dtype != DType::kFloat64 && in.flag();
  const std::vector<int64_t> keys{p.rows, p.heads, p.tokens, p.dim_k}, values{p.rows, p.heads, p.tokens, p.dim_v};
  Block q(in, dtype, keys, 1, false), k(in, dtype, keys, 1, false), v(in, dtype, values, 1, false),
      out(in, dtype, values, 1, true),
      state(in, is_bf16 ? DType::kBFloat16 : accumulation(dtype), {p.slots, p.heads, p.dim_k, p.dim_v}, 0, false);
  SlopeBlock slope(in, accumulation(dtype), p.rows, p.heads);
  std::vector<int64_t> indices, counts;
  for (int64_t i = 0; i < p.rows; ++i) indices.push_back(in.below(4) ? i + (p.slots - p.rows) : -1 - in.below(100));
  for (int64_t i = 0; i < p.rows; ++i) counts.push_back(in.below(p.tokens + 4) - 1);  // out of range too
  const Integers slots(indices, in.flag()), accepted(counts, in.flag());
  const bool has_indices = p.slots != p.rows || in.flag();
  if (has_out) p.q = q.rows(), p.out = out.mutable_rows();
  p.k = k.rows(), p.v = v.rows(), p.state = state.mutable_state();
  p.state.is_bf16 = is_bf16;
  p.slope = slope.slopes;
  p.state_indices = has_indices ? slots.data.get() : nullptr;
  p.indices_are_int64 = slots.is_int64;
  if (kind == 2) p.num_accepted = {accepted.data.get(), accepted.is_int64};
  check(cpu::kernels_baseline.recurrent(p, threads(in)), "memory for the scratch");
  if (has_out) out.check_written();
}

// Requests of any length, from slot to slot, with snapshots; padding, rows behind the last request, pools of either
// dtype.
void extend(Bytes& in, DType dtype, double scale) {
  ExtendParams p{};
  p.dtype = dtype, p.scale = scale;
  p.requests = in.below(5), p.heads = in.below(4), p.dim_k = dim(in), p.dim_v = dim(in);
  std::vector<int64_t> ends{0}, snapshot_ends{0}, snapshot_tokens;
  for (int64_t r = 0; r < p.requests; ++r) {
    const int64_t length = in.below(3) ? in.below(in.flag() ? 3 : 70) : 0, count = in.below(4) ? 0 : in.below(3);
    ends.push_back(ends.back() + length);
    snapshot_ends.push_back(snapshot_ends.back() + count);
    for (int64_t m = 0; m < count; ++m) snapshot_tokens.push_back(in.below(length + 1));
  }
  p.tokens = ends.back() + in.below(4);
  p.snapshots = static_cast<int64_t>(snapshot_tokens.size());
  p.slots = 2 * p.requests + p.snapshots + in.below(3);
  // All slots in some order: those that are written, those of snapshots, those that are read from elsewhere.
  std::vector<int64_t> order(static_cast<size_t>(p.slots));
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = 1; i < order.size(); ++i)
    std::swap(order[i], order[static_cast<size_t>(in.below(static_cast<int64_t>(i) + 1))]);
  const bool has_writes = in.flag();
  std::vector<int64_t> reads, writes, snapshots, written;
  const std::unique_ptr<bool[]> known(new bool[static_cast<size_t>(p.requests)]);
  for (int64_t r = 0; r < p.requests; ++r) {
    const int64_t own = in.below(5) ? order[static_cast<size_t>(r)] : -1;
    const int64_t other = order[static_cast<size_t>(p.requests + p.snapshots + in.below(p.requests))];
    writes.push_back(own);
    reads.push_back(!has_writes || in.flag() ? own : in.below(5) ? other : -1);
    known[static_cast<size_t>(r)] = in.below(4) != 0;
    if (own >= 0) written.push_back(own);
  }
  for (int64_t m = 0; m < p.snapshots; ++m) {
    snapshots.push_back(in.below(5) ? order[static_cast<size_t>(p.requests + m)] : -1);
    if (snapshots.back() >= 0) written.push_back(snapshots.back());
  }
  const bool is_bf16 = dtype != DType::kFloat64 && in.flag();
  const std::vector<int64_t> keys{p.tokens, p.heads, p.dim_k}, values{p.tokens, p.heads, p.dim_v};
  Block q(in, dtype, keys, 1, false), k(in, dtype, keys, 1, false), v(in, dtype, values, 1, false),
      out(in, dtype, values, 1, true),
      state(in, is_bf16 ? DType::kBFloat16 : accumulation(dtype), {p.slots, p.heads, p.dim_k, p.dim_v}, 0, false);
  SlopeBlock slope(in, accumulation(dtype), p.requests, p.heads);
  const Integers cu(ends, in.flag()), read_slots(reads, in.flag()), write_slots(writes, in.flag()),
      offsets(snapshot_ends, in.flag()), tokens(snapshot_tokens, in.flag()), slots(snapshots, in.flag());
  auto rows = [](Block& b) { return Rows{b.data(), 0, b.stride(1), b.stride(0)}; };
  p.q = rows(q), p.k = rows(k), p.v = rows(v), p.out = {out.data(), 0, out.stride(1), out.stride(0)};
  p.state = state.mutable_state();
  p.state.is_bf16 = is_bf16;
  p.slope = slope.slopes;
  p.cu_seqlens = {cu.data.get(), cu.is_int64};
  p.read_slots = {read_slots.data.get(), read_slots.is_int64};
  if (has_writes) p.write_slots = {write_slots.data.get(), write_slots.is_int64};
  if (in.flag()) p.has_initial_state = known.get();
  if (p.snapshots > 0) {
    p.snapshot_offsets = {offsets.data.get(), offsets.is_int64};
    p.snapshot_tokens = {tokens.data.get(), tokens.is_int64};
    p.snapshot_slots = {slots.data.get(), slots.is_int64};
  }
  const std::vector<uint8_t> before = state.contents();
  check(cpu::kernels_baseline.extend(p, threads(in)), "memory for the scratch");
  if (p.heads > 0) out.check_written();
  state.check_kept(before, written);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  const DType dtype = static_cast<DType>(in.below(4)), acc = accumulation(dtype);
  const double scale = in.flag() ? 1.0 : -0.7;
  const int64_t kind = in.below(4);
  if (kind >= 2) {
    if (kind == 2)
      recurrent(in, dtype, scale);
    else
      extend(in, dtype, scale);
    return 0;
  }
  const bool packed = in.flag();
  std::vector<int64_t> ends{0};
  if (packed)
    for (int64_t i = in.below(5); i > 0; --i) ends.push_back(ends.back() + (in.below(3) ? in.below(70) : 0));
  Sizes s{};
  s.batch = packed ? 1 : in.below(3);
  s.heads = in.below(4);
  s.length = packed ? ends.back() : in.below(140);
  s.dim_k = dim(in), s.dim_v = dim(in);
  s.num_seqs = packed ? static_cast<int64_t>(ends.size()) - 1 : s.batch;
  const Integers offsets(ends, in.flag());
  const std::vector<int64_t> keys{s.batch, s.heads, s.length, s.dim_k}, values{s.batch, s.heads, s.length, s.dim_v};
  const std::vector<int64_t> states{s.num_seqs, s.heads, s.dim_k, s.dim_v};
  Block q(in, dtype, keys, 1, false, true), k(in, dtype, keys, 1, false, true), v(in, dtype, values, 1, false, true);
  Block initial(in, acc, states, 0, false, true);
  SlopeBlock slope(in, acc, s.num_seqs, s.heads);
  const bool has_initial = in.flag(), has_final = in.flag();
  const SeqOffsets cu{packed ? offsets.data.get() : nullptr, offsets.is_int64};
  const State initial_state = has_initial ? initial.state() : State{nullptr, 0, 0, 0, 0};
  if (kind == 0) {
    Block out(in, dtype, values, 1, true), final_state(in, acc, states, 0, true);
    ForwardParams p{};
    p.sizes = s, p.dtype = dtype, p.scale = scale;
    p.q = q.rows(), p.k = k.rows(), p.v = v.rows(), p.out = out.mutable_rows();
    p.slope = slope.slopes, p.initial_state = initial_state, p.cu_seqlens = cu;
    if (has_final) p.final_state = final_state.mutable_state();
    check(cpu::kernels_baseline.forward(p, threads(in)), "memory for the scratch");
    out.check_written();
    if (has_final) final_state.check_written();
    return 0;
  }
  Block grad_out(in, dtype, values, 1, false, true), grad_final(in, acc, states, 0, false, true);
  Block dq(in, dtype, keys, 1, true), dk(in, dtype, keys, 1, true), dv(in, dtype, values, 1, true);
  Block dinitial(in, acc, states, 0, true);
  const bool wants_slope = in.flag();
  const int64_t slope_bytes = s.num_seqs * s.heads * bytes_of(acc);
  const std::unique_ptr<uint8_t[]> dslope(new uint8_t[static_cast<size_t>(slope_bytes)]);
  BackwardParams p{};
  p.sizes = s, p.dtype = dtype, p.scale = scale;
  p.grad_out = grad_out.rows(), p.q = q.rows(), p.k = k.rows(), p.v = v.rows();
  if (has_final) p.grad_final_state = grad_final.state();
  p.slope = slope.slopes, p.initial_state = initial_state, p.cu_seqlens = cu;
  p.grad_q = dq.mutable_rows(), p.grad_k = dk.mutable_rows(), p.grad_v = dv.mutable_rows();
  if (has_initial) p.grad_initial_state = dinitial.mutable_state();
  if (wants_slope) p.grad_slope = dslope.get();
  check(cpu::kernels_baseline.backward(p, threads(in)), "memory for the scratch");
  dq.check_written(), dk.check_written(), dv.check_written();
  if (has_initial) dinitial.check_written();
  return 0;
}

LA2_FUZZ_MAIN(128)
