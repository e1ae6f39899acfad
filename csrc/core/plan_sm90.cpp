// The Hopper family's planner: csrc/kernels/sm90.
#include <cmath>
#include <vector>

#include "plan_parts.h"

namespace la2 {
namespace {

constexpr int kChunk = 64;

// Microseconds a chunk of one block takes on its SM while others idle, on one H200 (`bench calibrate`). Not measured
// but set between what is: the gradients of tile 128 and of tile 64 in slices of 128 (in slices of 64 the wait for dk
// and dv is in it), the split state pass of tile 128, slice 64, and the state passes of tile 192. Out of tiles 64 and
// 128 in slices of 64 is fitted to uncut forwards; gradients of tiles 192 and 256, and out and the split state pass of
// 256, to 19 calls of those dims (csrc/kernels/DESIGN.md, "The planner against the clock").
struct Sm90Cost {
  int tile_a, slice;
  double out, gradient, state_only, state_only_split;
};
constexpr Sm90Cost kTrilinear[] = {
    {64, 64, 0.62, 1.12, 0.43, 0.46},   {64, 128, 1.13, 1.30, 0.54, 0.70}, {128, 64, 0.86, 1.30, 0.51, 0.60},
    {128, 128, 1.38, 1.60, 0.64, 0.97}, {192, 64, 1.20, 1.55, 0.60, 1.09}, {256, 64, 1.40, 2.15, 0.69, 1.25},
};
// A gradient in slices of 128 is dq; what dk and dv take longer there, and dq less in tiles 192 and 256, for the second
// half of the weighted c (core/tile.h, sm90_has_dq).
constexpr double kValues128 = 1.18, kDqOfWideTiles = 0.9;
// With SiLU, which takes longer than all else: by 1,024 elements of a, b and c of a chunk, in slices of 64 and of 128,
// and of b and c in the state pass. From D = E = 128: (1,64,16384) 536 us in slices of 64, 436 in two segments and
// slices of 128, (4,32,4096) 185; other tiles were not timed.
constexpr double kSiluUs64 = 0.09, kSiluUs128 = 0.10, kSiluStateUs = 0.12;
constexpr double kPair64 = 1.47, kPair128 = 3.19;  // dk and dv; one dim of 64 and one of 128: in between
constexpr double kBusy = 0.15;                     // slower by this where every SM is at work: shared L2, lower clocks
constexpr double kGBs = 3800;                      // 0.89 of what a copy moves
// From here to kBytesInL2 fitted to what csrc/kernels/DESIGN.md lists ("The planner against the clock"; `bench plans`
// measures it), kBytesInL2 chosen.
constexpr double kFirstUs = 6.4;      // launch, first copies, last stores
constexpr double kStatePassUs = 6.9;  // the same of the passes before
constexpr double kCombineUs = 4.5, kCombineGBs = 2500;
constexpr double kTurnUs = 8.0;       // from one item of a block to its next
constexpr double kDqUs = 1.0;         // of dq beside dk and dv, where a quarter of the SMs or more is left
constexpr double kDqBehindUs = 12.0;  // of dq on the SMs of dk and dv, behind them
constexpr double kBeside = 1.13;      // dk and dv while dq is computed on other SMs
constexpr double kOneWaitUs = 4.4;    // in one pass: blocks wait for each other
constexpr double kAddUs = 0.06;       // and add up what each segment before gathered, 32 KB;
constexpr double kAddBusyUs = 0.3;    // longer where every SM does
constexpr double kTogetherUs = 6.0;   // or wait twice, of more segments than kMostRowsAdded allows
constexpr double kSegmentUs = 0.08;   // and walk what each segment gathered
constexpr double kBytesInL2 = 40e6;   // of b and c, which the main pass then finds there
// Packed, what an item costs a block beside its chunks, forward and in extend (which brings states in and out), by
// slice: fitted to 28 plans (csrc/kernels/DESIGN.md, "extend"). Gradients were not measured.
constexpr double kPackedItemUs64 = 2.0, kPackedItemUs128 = 8.0, kExtendItemUs64 = 6.0, kExtendItemUs128 = 14.0;
constexpr double kExtendPassesUs = 10.2;  // the passes before the main one, in extend
constexpr int kBytes = 2;
constexpr int64_t kMostTurns = 1000;  // blocks of a launch for each that is resident

// This family has a tile of 192 besides.
int tile_for(int64_t dim_a) { return dim_a > 128 && dim_a <= 192 ? 192 : tile_a_for(dim_a); }

const Sm90Cost* find(int tile_a, int slice) {
  for (const Sm90Cost& cost : kTrilinear)
    if (cost.tile_a == tile_a && cost.slice == slice) return &cost;
  return nullptr;
}

double dq_us(const Sm90Cost& cost) { return cost.gradient * (cost.tile_a > 128 ? kDqOfWideTiles : 1.0); }
// Of dk or dv, each alone.
double dk_us(const Sm90Cost& cost) { return cost.gradient * (cost.slice == 128 ? kValues128 : 1.0); }

double out_us(const Problem& p, const Sm90Cost& cost) {
  const double elements = kChunk * (2 * cost.tile_a + cost.slice) / 1024.0;
  return p.silu ? std::max(cost.out, (cost.slice == 64 ? kSiluUs64 : kSiluUs128) * elements) : cost.out;
}
double state_us(const Problem& p, const Sm90Cost& cost) {
  const double elements = kChunk * (cost.tile_a + cost.slice) / 1024.0;
  return p.silu ? std::max(cost.state_only, kSiluStateUs * elements) : cost.state_only;
}

// Where dq, dk and dv go alone: 128 columns, if that is wanted, Da is at most 128, so that the state fits, and no slice
// would be half empty. ((4,32,4096), E = 192, D = 128: dv in three slices of 64 or two of 128, the whole backward
// 764 and 816 us; E = 256: 969 and 934.)
int slice_of_gradients(int wanted, int64_t dim_a, int64_t dim_c) {
  return wanted == 128 && tile_for(dim_a) <= 128 && ceil_div(dim_c, 64) % 2 == 0 ? 128 : 64;
}

// Of a launch of a job; an SM holds one block at a time.
int64_t most_blocks(const Problem& p, const DeviceProps& device, const Forced& forced) {
  if (forced.blocks != 0) return std::min(forced.blocks, kMostTurns) * device.num_sms;
  return p.packed ? 0 : device.num_sms;
}

// Of the state pass's chunks, the share that decay leaves something of: not known to the host, 1 without decay, little
// with the slopes of most heads. Where all blocks walk at once, time is the flattest head's (kLongestWindow), and bytes
// are those of a mean window, 24 chunks (16 slopes from 2^-0.5 to 2^-8).
constexpr double kWindowShare = 0.35;
constexpr int64_t kMeanWindow = 24;

// Forward, segments are gathered in pieces, so that the flattest head, whose window is the longest, is shared out among
// SMs that others have left. Neither short nor many: each is a state more to write and to read, which without decay is
// all that there is to it. Packed calls were not measured. Not in extend, whose table of units has none.
constexpr int64_t kPieceChunks = 16, kMostPieces = 4;

void set_pieces(const Problem& p, const Forced& forced, Plan* plan) {
  const bool is_worth_it = !p.backward && (!p.packed || p.num_seqs == 1);
  if (p.is_extend || (forced.pieces == 0 && !is_worth_it)) return;
  const int64_t chunks = plan->segment_len / kChunk;
  const int64_t wanted = forced.pieces != 0 ? forced.pieces : std::min(kMostPieces, chunks / kPieceChunks);
  cut_into_pieces(wanted, plan);
}

// Gradients gained nothing by them (csrc/kernels/DESIGN.md) but of two long segments, whose states are added up
// quickly. Of a plan that is chosen: its time was fitted without.
constexpr int64_t kGradientPieceChunks = 32, kMostGradientPieces = 2;

void set_pieces_of_gradients(const Problem& p, const Forced& forced, Plan* plan) {
  if (!plan->is_fused || plan->num_segments != 2 || forced.pieces != 0 || (p.packed && p.num_seqs != 1)) return;
  cut_into_pieces(std::min(kMostGradientPieces, plan->segment_len / kChunk / kGradientPieceChunks), plan);
  plan->local_states *= plan->num_pieces;
}

// What blocks walk.
struct Walk {
  int64_t units;     // times heads
  int64_t chunks;    // of the longest item
  double all;        // chunks of all units times heads
  double cut_share;  // of tokens in segments that have a next one
  bool is_packed;
};

// `num_long` sequences of `longest` tokens, and what is left of the tokens in all others.
Walk walk_of(const Problem& p, const Plan& plan, int64_t longest, int64_t num_long) {
  const int64_t tokens = std::max<int64_t>(p.length, 1), num_seqs = std::max<int64_t>(p.num_seqs, 1);
  const int64_t walked = std::min(plan.segment_len, longest);
  Walk walk;
  walk.is_packed = p.packed && num_seqs > 1;  // one packed sequence is as good as a dense one
  walk.units = (p.packed ? num_seqs - num_long + num_long * ceil_div(longest, walked) : plan.num_units) * p.heads;
  walk.chunks = ceil_div(walked, kChunk);
  walk.all = walk.is_packed ? static_cast<double>((tokens / kChunk + num_seqs) * p.heads)
                            : static_cast<double>(walk.units * walk.chunks);
  const double in_long = p.packed ? static_cast<double>(num_long * longest) / static_cast<double>(tokens) : 1.0;
  walk.cut_share = (1.0 - static_cast<double>(walked) / static_cast<double>(longest)) * std::min(in_long, 1.0);
  return walk;
}

// The cases that count alike in a plan's time. Packed, lengths are known to the device alone: they may be equal, or one
// sequence may have half of all tokens.
std::vector<Walk> walks_of(const Problem& p, const Plan& plan) {
  const int64_t tokens = std::max<int64_t>(p.length, 1), num_seqs = std::max<int64_t>(p.num_seqs, 1);
  if (!p.packed) return {walk_of(p, plan, tokens, num_seqs)};
  std::vector<Walk> walks = {walk_of(p, plan, ceil_div(tokens, num_seqs), num_seqs)};
  if (num_seqs > 2) walks.push_back(walk_of(p, plan, ceil_div(tokens, 2), 1));
  return walks;
}

// Of one item of a packed call, on its SM.
double packed_item_us(const Problem& p, int slice) {
  if (p.backward) return 0;
  if (p.is_extend) return slice == 64 ? kExtendItemUs64 : kExtendItemUs128;
  return slice == 64 ? kPackedItemUs64 : kPackedItemUs128;
}

// What an extend's device needs to know of the plan. Lanes where they leave few SMs out; with 72 heads in slices of 128
// there would be one, and 60 of 132 SMs idle.
constexpr double kLeastInLanes = 0.9;

void set_lanes(const Problem& p, const DeviceProps& device, const Forced& forced, Plan* plan) {
  if (forced.blocks != 0) return;
  const Tile& tile = plan->tiles[0];
  const double us_of_token = out_us(p, *find(tile.tile_a, tile.slice)) * (1 + kBusy) / kChunk;
  const int64_t blocks = ceil_div(p.dim_v, tile.slice) * std::max<int64_t>(p.heads, 1);
  const int64_t lanes = std::min<int64_t>(device.num_sms / blocks, kMostLanes);
  const bool is_full = static_cast<double>(lanes * blocks) >= kLeastInLanes * static_cast<double>(device.num_sms);
  if (is_full) {
    plan->lanes = static_cast<int>(lanes);
    plan->max_blocks[0] = lanes * blocks;
  }
  plan->item_tokens = std::max<int64_t>(1, std::llround(packed_item_us(p, tile.slice) / us_of_token));
  plan->pass_tokens = std::llround(kExtendPassesUs / us_of_token);
  plan->cuts_if_it_gains = plan->num_segments > 1 && plan->lanes > 0 && forced.segments == 0 && forced.segment_len == 0;
}

// A launch of `width` blocks for each unit and head, which moves `bytes`. item_us: packed_item_us of the main pass.
double launch_us(const DeviceProps& device, const Walk& walk, int64_t width, double share, double chunk_us,
                 double bytes, double item_us = 0) {
  const double resident = static_cast<double>(device.num_sms);
  const double items = static_cast<double>(walk.units * width) * share;
  const double chunks = static_cast<double>(walk.chunks);
  const double steps = walk.is_packed ? walk.all * static_cast<double>(width) * share / resident + chunks / 2
                                      : std::ceil(items / resident) * chunks;
  const double busy = std::min(1.0, items / resident);
  const double walking = std::max(steps, chunks) * chunk_us * (1 + kBusy * busy), copying = bytes / (kGBs * 1e3);
  const double turns = walk.is_packed ? item_us * items / resident : kTurnUs * (std::ceil(items / resident) - 1);
  // Not quite the longer of the two: where they are alike, each waits for the other now and then.
  return std::pow(std::pow(walking + std::max(turns, 0.0), 8) + std::pow(copying, 8), 1.0 / 8);
}

// Segments to consider, forward also as many as one pass has room for.
std::vector<int64_t> counts_with_one_pass(const Problem& p, const DeviceProps& device, const Forced& forced) {
  std::vector<int64_t> counts = counts_of_segments(p, forced);
  if (p.backward || forced.segments > 0) return counts;
  const int64_t items = std::max<int64_t>(1, p.heads * ceil_div(p.dim_v, 64) * (p.packed ? 1 : p.num_seqs));
  const int64_t room = std::min(kMaxSegments, device.num_sms / items), chunks = p.length / kChunk;
  for (const int64_t n : {room, room / 2, chunks, chunks / 2, chunks / 4})
    if (n > 1 && n <= room && n <= chunks) counts.push_back(n);
  std::sort(counts.begin(), counts.end());
  return counts;
}

// The mean of us(walk).
template <class Us>
double mean_us(const std::vector<Walk>& walks, const Us& us) {
  double sum = 0;
  for (const Walk& walk : walks) sum += us(walk);
  return sum / static_cast<double>(walks.size());
}

// The time of the candidate in one pass; 0 where it does not serve: every block has one item and is resident.
double one_pass_us(const Problem& p, const DeviceProps& device, const Plan& plan, const std::vector<Walk>& walks) {
  const Tile& tile = plan.tiles[0];
  const int64_t slices = ceil_div(p.dim_v, tile.slice);
  const bool is_resident = plan.num_units * p.heads * slices <= device.num_sms;
  if (p.backward || p.is_extend || p.silu || tile.slice != 64 || tile.tile_a > 128 || !is_resident) return 0;
  const Sm90Cost& cost = *find(tile.tile_a, tile.slice);
  // The bytes of k and v, and of q and out.
  const double half =
      static_cast<double>(p.batch * p.heads * p.length) * kBytes * static_cast<double>(p.dim_k + p.dim_v);
  const double segments = static_cast<double>(plan.num_segments);
  const double busy = static_cast<double>(plan.num_units * p.heads * slices) / device.num_sms;
  const double exchange = plan.num_segments * tile.tile_a <= kMostRowsAdded
                              ? kOneWaitUs + (kAddUs + kAddBusyUs * busy) * segments * tile.tile_a / 128
                              : kTogetherUs + kSegmentUs * segments + combine_us(p, plan, kCombineGBs);
  return kFirstUs + exchange + mean_us(walks, [&](const Walk& walk) {
           return launch_us(device, walk, slices, 1, cost.state_only, half) +
                  launch_us(device, walk, slices, 1, cost.out, half < kBytesInL2 ? half : 2 * half);
         });
}

}  // namespace

Status plan_sm90(const Problem& p, const DeviceProps& device, const Forced& forced, Plan* plan) {
  if (!forced.family.empty() && forced.family != "sm90") return Status::error("another family is wanted");
  if (device.compute_capability != 90)
    return Status::error("LA2_PLAN: family sm90 runs on compute capability 9.0 alone, the GPU has " +
                         std::to_string(device.compute_capability / 10) + "." +
                         std::to_string(device.compute_capability % 10));
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16)
    return Status::error("LA2_PLAN: family sm90 has kernels for bf16 and fp16 alone");
  if (p.slope_grad) return Status::error("LA2_PLAN: family sm90 has no slope gradient, expected sm80");
  if (p.silu && !sm90_takes_silu({tile_for(p.dim_k)}))
    return Status::error("no kernel of family sm90 takes SiLU of head dims above 192");

  if (!p.mappable) return Status::error("LA2_PLAN: family sm90 takes no operand with a stride of 0 or 2^40 bytes");

  const double rows = static_cast<double>(p.batch * p.heads * p.length) * kBytes;
  const bool is_fused = p.backward && p.dim_k <= 128 && p.dim_v <= 128;
  const bool wide_k = p.dim_k > 64, wide_v = p.dim_v > 64;
  const double pair_us = wide_k && wide_v ? kPair128 : wide_k || wide_v ? (kPair64 + kPair128) / 2 : kPair64;
  bool found = false;
  for (const int slice : {128, 64}) {
    if (forced.slice != 0 && forced.slice != slice) continue;
    for (const int64_t segments : counts_with_one_pass(p, device, forced)) {
      Plan candidate;
      candidate.family = Family::kSm90;
      const int64_t segment_len = forced.segment_len != 0 ? forced.segment_len : segment_len_of(p, segments);
      const bool cut = cut_into_segments(p, segment_len, &candidate);
      const std::vector<Walk> walks = walks_of(p, candidate);
      double us = kFirstUs;
      auto add = [&](int launch, int64_t dim_a, int64_t dim_c, int wanted_slice, int jobs, auto chunk_us) -> bool {
        const Sm90Cost* cost = find(tile_for(dim_a), wanted_slice);
        if (cost == nullptr) return false;
        const int64_t slices = ceil_div(dim_c, wanted_slice);
        candidate.tiles[launch] = {cost->tile_a, wanted_slice, kChunk};
        candidate.max_blocks[launch] = most_blocks(p, device, forced);
        candidate.num_launches = launch + 1;
        const double bytes = rows * jobs * 2 * static_cast<double>(dim_a + dim_c);
        us += mean_us(walks, [&](const Walk& walk) {
          return launch_us(device, walk, slices * jobs, 1, chunk_us(*cost), bytes, packed_item_us(p, wanted_slice));
        });
        return true;
      };
      if (!p.backward) {
        if (slice == 128 && p.dim_v <= 64) continue;
        if (!add(0, p.dim_k, p.dim_v, slice, 1, [&](const Sm90Cost& cost) { return out_us(p, cost); })) continue;
      } else if (is_fused) {
        if (slice == 128 && p.dim_k <= 64) continue;
        candidate.is_fused = true;
        candidate.tiles[0] = {tile_for(p.dim_v), tile_for(p.dim_k), kChunk};  // of dk
        candidate.max_blocks[0] = most_blocks(p, device, forced);
        const double before = us;
        if (!add(1, p.dim_v, p.dim_k, slice, 1, dq_us)) continue;
        const double of_dq = us - before,
                     of_pair = mean_us(walks, [&](const Walk& walk) {
                       return launch_us(device, walk, 1, 1, pair_us, rows * 3 * static_cast<double>(p.dim_k + p.dim_v));
                     });
        const int64_t blocks = candidate.num_units * p.heads * (1 + ceil_div(p.dim_k, slice));
        us = before + (4 * blocks <= 3 * device.num_sms ? kDqUs + std::max(of_dq, of_pair * kBeside)
                                                        : kDqBehindUs + of_dq + of_pair);
      } else {
        const int slice_k = slice_of_gradients(slice, p.dim_v, p.dim_k);
        const int slice_v = slice_of_gradients(slice, p.dim_k, p.dim_v);
        if (slice == 128 && slice_k == 64 && slice_v == 64) continue;
        auto mean_of_both = [](const Sm90Cost& cost) { return (dq_us(cost) + dk_us(cost)) / 2; };
        if (!add(0, p.dim_v, p.dim_k, slice_k, 2, mean_of_both) || !add(1, p.dim_k, p.dim_v, slice_v, 1, dk_us))
          continue;
        us += kDqUs;
      }
      if (p.is_extend) set_lanes(p, device, forced, &candidate);
      auto choose_state_tile = [&](int launch, int64_t dim_a, int64_t dim_c) {
        const int tile_a = tile_for(dim_a), slice_c = dim_c <= 64 || tile_a > 128 ? 64 : 128;
        candidate.state_tiles[launch] = {tile_a, slice_c, kChunk};
      };
      // Also where nothing is cut: for snapshots and la2::_states.
      if (p.backward)
        choose_state_tile(0, p.dim_v, p.dim_k);
      else
        choose_state_tile(0, p.dim_k, p.dim_v);
      if (cut) {
        set_pieces(p, forced, &candidate);
        const bool combines = candidate.num_segments > 2 || candidate.num_pieces > 1;
        us += kStatePassUs + (combines ? kCombineUs : 0);
        auto add_states = [&](int launch, int64_t dim_a, int64_t dim_c, int jobs) {
          choose_state_tile(launch, dim_a, dim_c);
          const Tile& tile = candidate.state_tiles[launch];
          const int64_t slices = ceil_div(dim_c, tile.slice);
          candidate.state_floats[launch] = tile.tile_a * ceil_div(dim_c, 64) * 64;
          const Sm90Cost& cost = *find(tile.tile_a, tile.slice);
          us += mean_us(walks, [&](const Walk& walk) {
            if (walk.cut_share == 0) return 0.0;
            const bool at_once = walk.units * slices * jobs <= device.num_sms;
            Walk window = walk;
            if (at_once) window.chunks = std::min(walk.chunks, kLongestWindow / kChunk);
            if (candidate.num_pieces > 1) window.chunks = std::min(window.chunks, candidate.piece_chunks);
            const double share = static_cast<double>(kMeanWindow) / static_cast<double>(walk.chunks);
            const double bytes = rows * jobs * walk.cut_share * static_cast<double>(dim_a + dim_c);
            return (at_once ? 1.0 : kWindowShare) * launch_us(device, window, slices * jobs, walk.cut_share,
                                                              p.backward ? cost.state_only_split : state_us(p, cost),
                                                              at_once ? bytes * std::min(1.0, share) : bytes);
          });
        };
        if (!p.backward) {
          add_states(0, p.dim_k, p.dim_v, 1);
        } else {
          add_states(0, p.dim_v, p.dim_k, 2);
        }
        if (p.backward && !is_fused) {  // dv's state is dk's transposed, which this family's order does not give
          add_states(1, p.dim_k, p.dim_v, 1);
          candidate.local_states += candidate.num_units;
        }
        if (combines) us += combine_us(p, candidate, kCombineGBs);
        const double together = one_pass_us(p, device, candidate, walks);
        if (together == 0 && forced.passes == 1) continue;
        candidate.in_one_pass = together != 0 && forced.passes != 3 && (together < us || forced.passes == 1);
        if (candidate.in_one_pass) {
          us = together;
          candidate.max_blocks[0] = 0;
          candidate.num_pieces = 1;
        }
        candidate.local_states *= candidate.num_pieces;
      } else if (forced.passes == 1) {
        continue;
      }
      candidate.predicted_us = us;
      const bool more_segments = candidate.num_segments > plan->num_segments;
      if (found && us >= plan->predicted_us * (more_segments ? kWorthwhile : 1.0)) continue;
      found = true;
      *plan = candidate;
    }
  }
  if (!found)
    return Status::error("no kernel of family sm90 fits: head dims " + std::to_string(p.dim_k) + " and " +
                         std::to_string(p.dim_v) + " with slice " + std::to_string(forced.slice) +
                         (forced.passes == 1 ? ", cut so that all blocks are resident" : ""));
  set_pieces_of_gradients(p, forced, plan);
  return Status::ok();
}

}  // namespace la2
