// Any problem, any device, any LA2_PLAN, any text: a plan that holds what csrc/core/plan.h says of it, or a sentence.
#include "core/plan.h"
#include "fuzz.h"

namespace {

using namespace la2;
using fuzz::Bytes;
using fuzz::check;

constexpr const char* kWords[] = {
    "family=",  "slice=",  "segments=",   "blocks=", "simt", "sm80", "sm90",
    "64",       "128",     "1",           "2",       ",",    "=",    "9223372036854775807",
    "backward", "dslope",  "packed=",     "bf16",    "fp32", "fp64", "sm_90x132",
    "-1",       "0",       "4096",        "x",       "sm_",  "7",    "1,8,4096,128,128,",
    "passes=",  "pieces=", "segment_len="};

std::string text(Bytes& in) {
  std::string s;
  for (int64_t n = in.below(16); n > 0; --n) {
    const uint8_t which = in.byte();
    if (which < 224)
      s += kWords[which % (sizeof kWords / sizeof *kWords)];
    else
      s += static_cast<char>(in.byte());
  }
  return s;
}

std::string plan_text(Bytes& in) {
  if (in.flag()) return text(in);
  std::string s;
  for (int64_t n = in.below(4); n > 0; --n) {
    constexpr const char* kParts[] = {"family=simt", "family=sm80", "family=sm90", "slice=64",      "slice=128",
                                      "blocks=1",    "blocks=2",    "segments=2",  "segments=1",    "segments=7",
                                      "passes=1",    "passes=3",    "pieces=3",    "segment_len=96"};
    const uint8_t which = in.byte() % 16;
    s += (s.empty() ? "" : ",") + (which < 14 ? std::string(kParts[which]) : "segments=" + std::to_string(in.size()));
  }
  return s;
}

int64_t dim(Bytes& in) { return in.below(8) ? 8 * (1 + in.below(32)) : in.size(); }

Problem problem(Bytes& in) {
  Problem p;
  p.backward = in.flag();
  p.dtype = static_cast<DType>(in.below(4));
  p.batch = in.size();
  p.heads = in.size();
  p.length = in.size();
  p.dim_k = dim(in);
  p.dim_v = dim(in);
  p.packed = in.flag();
  p.num_seqs = p.packed || in.below(16) == 0 ? in.size() : p.batch;
  if (p.packed) p.batch = 1;
  p.slope_grad = p.backward && in.flag();
  p.mappable = in.below(8) != 0;
  p.is_extend = p.packed && !p.backward && in.below(8) == 0;
  p.silu = !p.backward && in.below(8) == 0;
  return p;
}

DeviceProps device(Bytes& in) {
  constexpr int kCapabilities[] = {70, 75, 80, 86, 87, 89, 90, 90, 90, 100, 103, 120};
  DeviceProps d;
  d.compute_capability = kCapabilities[in.below(12)];
  d.num_sms = static_cast<int>(in.below(16) ? 1 + in.below(200) : in.below(1 << 16));
  d.shared_per_sm = (in.below(16) ? 100 + in.below(200) : in.below(300)) * 1024;
  d.shared_per_block = d.shared_per_sm - 1024;
  return d;
}

void check_plan(const Problem& p, const DeviceProps& d, const Plan& plan) {
  check(plan.num_launches == 1 || (plan.num_launches == 2 && p.backward), "one launch, or two of a backward");
  for (int i = 0; i < plan.num_launches; ++i) {
    const Tile& t = plan.tiles[i];
    check(t.chunk > 0 && 64 % t.chunk == 0 && t.slice > 0 && t.tile_a > 0, "tiles are tiles");
    check(t.tile_a >= std::min(p.dim_k, p.dim_v), "tiles hold a contracted dim");
    if (plan.family == Family::kSm80)
      check(sm80_shared_bytes(t, p.slope_grad) <= d.shared_per_block, "the block fits into shared memory");
    check(plan.max_blocks[i] >= 0, "blocks are a count");
  }
  check(plan.family != Family::kSm90 || (d.compute_capability == 90 && p.mappable && !p.slope_grad),
        "sm90 where it may");
  if (plan.takes_silu)
    check(p.silu && plan.family == Family::kSm90 && sm90_takes_silu(plan.tiles[0]), "SiLU where it may");
  if (plan.in_one_pass) {
    check(plan.family != Family::kSimt && !p.backward && !p.is_extend && !plan.takes_silu, "one pass where it may");
    const int64_t slices = p.dim_v / plan.tiles[0].slice + (p.dim_v % plan.tiles[0].slice != 0);
    check(plan.num_segments > 1, "one pass of segments");
    check(plan.num_units * p.heads * slices <= d.num_sms, "every block of one pass is resident");
  }
  check(plan.segment_len > 0 && plan.segment_len % 64 == 0, "segments are whole chunks");
  const int64_t segments = p.length / plan.segment_len + (p.length % plan.segment_len != 0);
  check(plan.num_segments == std::max<int64_t>(segments, 1), "segments cover the longest sequence");
  if (!p.packed) check(plan.num_units == p.num_seqs * std::max<int64_t>(segments, 1), "units are all segments");
  if (p.packed && p.num_seqs > 0)
    check(plan.num_units >= p.num_seqs && plan.num_units >= segments, "units bound segments");
  check((plan.local_states > 0) == (plan.num_segments > 1 && plan.num_units > 0), "states where sequences are cut");
  const int64_t states = plan.num_units * plan.num_pieces * (p.backward ? 2 : 1);
  check(plan.num_pieces >= 1 && (plan.num_pieces == 1 || plan.local_states >= states), "a state for each piece");
  const int64_t chunks = plan.segment_len / 64, before = (plan.num_pieces - 1) * plan.piece_chunks;
  check(plan.num_pieces == 1 || (before < chunks && chunks <= before + plan.piece_chunks), "pieces cover a segment");
  check(plan.num_pieces == 1 ||
            (plan.family != Family::kSimt && !plan.in_one_pass && !p.is_extend && plan.num_segments > 1),
        "pieces where they may");
  check(plan.local_states >= 0 && plan.dot_floats >= 0 && plan.state_floats[0] >= 0, "workspaces are sizes");
  check(plan.predicted_us >= 0, "a time");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  Problem p;
  DeviceProps d;
  bool has_both = false;
  if (in.below(4) == 0) {
    const std::string what = text(in), where = text(in);
    const Status a = parse_problem(what, &p), b = parse_device(where, &d);
    check(a.is_ok() || a.message().size() > 10, "a problem or a sentence");
    check(b.is_ok() || b.message().size() > 10, "a device or a sentence");
    has_both = a.is_ok() && b.is_ok();
  } else {
    p = problem(in);
    d = device(in);
    has_both = true;
  }
  if (!has_both) return 0;
  const std::string forced = plan_text(in);
  Plan plan, again;
  const Status status = make_plan(p, d, forced, &plan);
  if (!status.is_ok()) {
    check(status.message().size() > 10, "a plan or a sentence");
    return 0;
  }
  check_plan(p, d, plan);
  check(make_plan(p, d, forced, &again).is_ok(), "the same again");
  check(describe(p, d, plan) == describe(p, d, again), "the same problem, the same plan");
  return 0;
}

LA2_FUZZ_MAIN(96)
