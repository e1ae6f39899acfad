#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <vector>

#include "plan_parts.h"

namespace la2 {
namespace {

constexpr int64_t kMaxHeadDim = 256;

// More than any memory holds, and so little that no product of sizes in a planner leaves 64 bits.
constexpr double kMaxRows = 0x1p48, kMaxStates = 0x1p40;

// What one chunk of one block takes, in microseconds on one H200 at 1.98 GHz (csrc/kernels/DESIGN.md has the runs):
// alone on its SM, and per block where blocks share it. Other GPUs rank the plans alike.
struct ChunkCost {
  double alone, shared;
};
struct TileCost {
  Tile tile;
  int blocks_per_sm;  // by registers
  ChunkCost main, state_only;
  // Beside out: gradients, whose operands are split; dq and dk with the slope gradient's sums, and dv beside them in
  // the same kernel (0: as those).
  double split = 1, with_dots = 1, beside_dots = 0;
};

// sm80: chunks of 64 tokens, 32 where Da is 256 (two stages within 99 KB).
constexpr TileCost kSm80Tiles[] = {
    {{64, 64, 64}, 2, {2.25, 1.53}, {0.85, 0.65}, 1.18, 1.18},
    {{64, 128, 64}, 1, {2.75, 2.75}, {1.20, 1.20}, 1.18, 1.18},
    {{128, 64, 64}, 2, {2.88, 2.12}, {1.20, 0.87}, 1.18, 1.96, 1.18},
    {{128, 128, 64}, 1, {2.35, 2.35}, {1.20, 1.20}, 1.40, 3.40, 2.00},
    {{256, 64, 32}, 2, {2.23, 1.60}, {1.30, 0.75}, 1.18, 1.18},
};
constexpr double kSplitStateCost = 1.22;
// simt: bound by fp32 and fp64 arithmetic.
constexpr TileCost kSimtTiles[] = {
    {{64, 64, 32}, 3, {4.5, 3.3}, {2.0, 1.4}},
    {{128, 64, 32}, 3, {7.7, 5.5}, {3.5, 2.5}},
    {{256, 64, 32}, 2, {14.5, 11.1}, {7.0, 5.0}},
};
constexpr TileCost kSimtDoubleTiles[] = {
    {{64, 32, 32}, 3, {8.0, 5.0}, {4.0, 2.6}},
    {{128, 32, 32}, 3, {14.0, 10.0}, {6.0, 4.4}},
    {{256, 32, 32}, 2, {26.0, 18.0}, {12.0, 9.0}},
};
constexpr double kLaunchUs = 4.5;     // one kernel on the stream
constexpr double kNextBlockUs = 2.0;  // a block that starts where another one has ended
// What a forward of two roles (sm80/two_roles.cuh) takes beyond its chunks: 64 and 128 tokens of up to 32 heads
// took 7.2 to 7.9 and 9.7 us, 64 tokens of 256 heads 14.3.
constexpr double kTwoRolesUs = 1.0;
// The state pass and the combine pass, before their work: where kernels overlap (compute capability 9.0 and later), and
// where they do not, which was not measured.
constexpr double kCutOverlappedUs = 6.0, kCutUs = 12.0, kCombineGBs = 1500;
constexpr double kOnePassUs = 13.0;  // the same where all passes are one kernel
// The same of gradients of tiles of 128, so much more, and of what pieces add: fitted to 96 plans
// (csrc/kernels/DESIGN.md, "Backward in pieces").
constexpr double kCutGradientsUs = 1.2, kCombineGradientsGBs = 2500, kPiecesGBs = 4000;
// A window's tokens at a slope of 1 (simt/units.cuh, window_chunks), the octaves that the usual slopes span, 2^-8 to 1,
// and their weight beside no decay at all.
constexpr double kWindowOfOne = 27.7, kOctaves = 8, kUsual = 0.75;
constexpr int64_t kMostPieces = 8, kLeastPieceChunks = 4;
constexpr double kWorthwhileCutAgain = 0.99;  // kWorthwhile of gradients without slopes' that are cut in any case

struct Job {
  int64_t dim_a, dim_c;
};

struct Candidate {
  Plan plan;
  double us = 0;
};

template <size_t n>
const TileCost* find_among(const TileCost (&tiles)[n], int tile_a, int slice) {
  for (const TileCost& t : tiles)
    if (t.tile.tile_a == tile_a && t.tile.slice == slice) return &t;
  return nullptr;
}

const TileCost* find_tile(DType dtype, int tile_a, int slice) {
  if (dtype == DType::kFloat32) return find_among(kSimtTiles, tile_a, slice);
  if (dtype == DType::kFloat64) return find_among(kSimtDoubleTiles, tile_a, slice);
  return find_among(kSm80Tiles, tile_a, slice);
}

Family family_for(DType dtype) {
  return dtype == DType::kBFloat16 || dtype == DType::kFloat16 ? Family::kSm80 : Family::kSimt;
}

// The simt blocks stay within what every GPU grants.
int64_t shared_bytes(Family family, const Tile& tile, bool slope_grad) {
  return family == Family::kSm80 ? sm80_shared_bytes(tile, slope_grad) : 48 * 1024;
}

// Blocks that an SM has room for.
int64_t fitting_blocks(const TileCost& cost, const DeviceProps& device, bool slope_grad, Family family) {
  const int64_t bytes = shared_bytes(family, cost.tile, slope_grad) + 1024;
  return std::max<int64_t>(1, std::min<int64_t>(cost.blocks_per_sm, device.shared_per_sm / bytes));
}

// Blocks that walk so many tokens each.
struct Walk {
  int64_t blocks = 0, tokens = 0;
};

// What `whole` takes and, started behind it, `rest`, whose walks are no longer, beside the launch itself.
double walking_us(const TileCost& cost, const ChunkCost& chunk, const Walk& whole, const Walk& rest,
                  const DeviceProps& device, bool slope_grad, Family family) {
  const int64_t blocks = whole.blocks + rest.blocks;
  if (blocks == 0 || whole.tokens == 0) return 0;
  const int64_t resident =
      std::min(fitting_blocks(cost, device, slope_grad, family), ceil_div(blocks, device.num_sms)) * device.num_sms;
  const double per_chunk = std::max(chunk.alone, static_cast<double>(resident / device.num_sms) * chunk.shared);
  auto walk_us = [&](int64_t tokens) { return static_cast<double>(ceil_div(tokens, cost.tile.chunk)) * per_chunk; };
  auto turns_us = [&](int64_t turns, int64_t tokens) {
    return turns == 0 ? 0 : static_cast<double>(turns) * (walk_us(tokens) + kNextBlockUs) - kNextBlockUs;
  };
  // The last wave's walks, and beside them those of the rest, one behind another.
  const int64_t waves = ceil_div(whole.blocks, resident), beside = waves * resident - whole.blocks;
  if (rest.blocks == 0) return turns_us(waves, whole.tokens);
  const double rest_us = turns_us(ceil_div(rest.blocks, std::max<int64_t>(beside, 1)), rest.tokens);
  const double behind_us =
      turns_us(waves, whole.tokens) + kNextBlockUs + turns_us(ceil_div(rest.blocks, resident), rest.tokens);
  if (beside == 0) return behind_us;
  const double before_us = waves == 1 ? 0 : turns_us(waves - 1, whole.tokens) + kNextBlockUs;
  return std::min(behind_us, before_us + std::max(walk_us(whole.tokens), rest_us));
}

const char* dtype_text(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "fp32";
    case DType::kBFloat16:
      return "bf16";
    case DType::kFloat16:
      return "fp16";
    default:
      return "fp64";
  }
}

const char* family_text(Family family) {
  return family == Family::kSimt ? "simt" : family == Family::kSm80 ? "sm80" : "sm90";
}

Status parse_number(const std::string& key, const std::string& text, int64_t* value) {
  char* end = nullptr;
  *value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != 0 || *value <= 0)
    return Status::error(key + " is '" + text + "', expected a positive whole number");
  return Status::ok();
}

Status parse_forced(const std::string& text, Forced* forced) {
  std::istringstream fields(text);
  std::string field;
  while (std::getline(fields, field, ',')) {
    const size_t equals = field.find('=');
    const std::string key = field.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : field.substr(equals + 1);
    if (key == "family") {
      if (value != "simt" && value != "sm80" && value != "sm90")
        return Status::error("LA2_PLAN: family is '" + value + "', expected simt, sm80 or sm90");
      forced->family = value;
    } else if (key == "slice") {
      if (Status s = parse_number("LA2_PLAN: slice", value, &forced->slice); !s.is_ok()) return s;
    } else if (key == "segments") {
      if (Status s = parse_number("LA2_PLAN: segments", value, &forced->segments); !s.is_ok()) return s;
    } else if (key == "segment_len") {
      if (Status s = parse_number("LA2_PLAN: segment_len", value, &forced->segment_len); !s.is_ok()) return s;
    } else if (key == "blocks") {
      if (Status s = parse_number("LA2_PLAN: blocks", value, &forced->blocks); !s.is_ok()) return s;
    } else if (key == "passes") {
      if (Status s = parse_number("LA2_PLAN: passes", value, &forced->passes); !s.is_ok()) return s;
      if (forced->passes != 1 && forced->passes != 3)
        return Status::error("LA2_PLAN: passes is '" + value + "', expected 1 or 3");
    } else if (key == "pieces") {
      if (Status s = parse_number("LA2_PLAN: pieces", value, &forced->pieces); !s.is_ok()) return s;
    } else {
      return Status::error("LA2_PLAN: unknown key '" + key +
                           "', expected family, slice, segments, segment_len, blocks, passes or pieces");
    }
  }
  if (forced->segments != 0 && forced->segment_len != 0)
    return Status::error("LA2_PLAN: segments and segment_len both say how sequences are cut, expected one of them");
  return Status::ok();
}

Status check_dim(const char* name, int64_t dim) {
  if (dim > 0 && dim <= kMaxHeadDim && dim % 8 == 0) return Status::ok();
  return Status::error(std::string(name) + " is " + std::to_string(dim) + ", expected a multiple of 8 up to 256");
}

double at_least_one(int64_t n) { return static_cast<double>(std::max<int64_t>(n, 1)); }

Status check_sizes(const Problem& p) {
  if (p.batch < 0 || p.heads < 0 || p.length < 0 || p.num_seqs < 0)
    return Status::error("batch, heads, length and num_seqs are expected to be at least 0");
  if (at_least_one(p.batch) * at_least_one(p.heads) * at_least_one(p.length) > kMaxRows)
    return Status::error("batch times heads times length is more than 2^48, expected what memory can hold");
  if (at_least_one(p.num_seqs) * at_least_one(p.heads) > kMaxStates)
    return Status::error("num_seqs times heads is more than 2^40, expected what memory can hold");
  return Status::ok();
}

// Whether all passes can be one kernel: each block has one item, and all are resident.
bool has_one_pass(const Problem& p, const DeviceProps& device, Family family, const Plan& plan) {
  const Tile& tile = plan.tiles[0];
  return family == Family::kSm80 && !p.backward && !p.is_extend && sm80_has_one_pass(tile) &&
         plan.num_units * p.heads * ceil_div(p.dim_v, tile.slice) <= device.num_sms;
}

// Segments to consider, forward also as many as one pass has room for.
std::vector<int64_t> counts_with_one_pass(const Problem& p, const DeviceProps& device, const Forced& forced) {
  std::vector<int64_t> counts = counts_of_segments(p, forced);
  if (p.backward || forced.segments > 0) return counts;
  const int64_t items = std::max<int64_t>(1, p.heads * ceil_div(p.dim_v, 128) * (p.packed ? 1 : p.num_seqs));
  const int64_t room = std::min(kMaxSegments, device.num_sms / items), most = p.length / kSegmentStep;
  for (const int64_t n : {room, room / 2})
    if (n > 1 && n <= most) counts.push_back(n);
  std::sort(counts.begin(), counts.end());
  return counts;
}

// Of so many heads, whose slopes are 2^-8, 2^(-8 + 8 / heads), .., the share whose window is longer than that.
double share_beyond(double tokens, int64_t heads) {
  const double octaves = std::min(std::log2(std::max(tokens / kWindowOfOne, 1.0)), kOctaves);
  const double count = static_cast<double>(std::max<int64_t>(heads, 1));
  return 1 - std::floor(count * octaves / kOctaves) / count;
}

// Pieces that are gathered of a segment where slopes are the usual ones.
double usual_pieces(const Plan& plan, int64_t heads) {
  double pieces = 1;
  for (int piece = 1; piece < plan.num_pieces; ++piece)
    pieces += share_beyond(static_cast<double>(piece * plan.piece_chunks * kSegmentStep), heads);
  return pieces;
}

// The host does not know the slopes: without decay every piece is gathered, with the usual ones few are. The mean.
double expected(double without_decay, double usual) { return (1 - kUsual) * without_decay + kUsual * usual; }

// Pieces of a segment besides the one that every segment has.
double more_pieces(const Plan& plan, int64_t heads) { return expected(plan.num_pieces, usual_pieces(plan, heads)) - 1; }

// The state pass, of so many segments.
double gathering_us(const Problem& p, const TileCost& cost, const Walk& segments, const Plan& plan,
                    const DeviceProps& device, Family family) {
  const ChunkCost& chunk = cost.state_only;
  if (family == Family::kSimt) return walking_us(cost, chunk, segments, {}, device, false, family);
  Walk pieces = segments;
  pieces.blocks *= plan.num_pieces;
  pieces.tokens = std::min(segments.tokens, kLongestWindow);
  if (plan.num_pieces == 1) return walking_us(cost, chunk, pieces, {}, device, false, family);
  pieces.tokens = std::min(pieces.tokens, plan.piece_chunks * kSegmentStep);
  Walk usual = pieces;
  usual.blocks = std::llround(static_cast<double>(segments.blocks) * usual_pieces(plan, p.heads));
  return expected(walking_us(cost, chunk, pieces, {}, device, false, family),
                  walking_us(cost, chunk, usual, {}, device, false, family));
}

// Whether the costs of cutting are those that were fitted with pieces: of gradients of tiles of 128.
bool is_fitted(const Problem& p, const TileCost& tile) {
  return p.backward && family_for(p.dtype) == Family::kSm80 && tile.tile.tile_a == 128;
}

// The length of a segment, and how many pieces its state is gathered in.
struct Cut {
  int64_t segment_len, pieces;
};

// Cuts to consider. Backward also segments of which a sequence's last one is short, so that SMs which so many whole
// ones leave idle walk several of those one behind another; and pieces. Forwards, which have one pass, gained nothing
// by them (csrc/kernels/DESIGN.md), and packed calls were not measured.
std::vector<Cut> cuts_to_consider(const Problem& p, const DeviceProps& device, Family family, const Forced& forced,
                                  const TileCost& tile, const std::vector<Job>& jobs) {
  const bool has_pieces = family == Family::kSm80 && !p.is_extend;
  const bool is_free = has_pieces && p.backward && sm80_is_ahead(tile.tile, false) && (!p.packed || p.num_seqs == 1);
  std::vector<Cut> cuts;
  auto consider = [&](int64_t segment_len) {
    if (has_pieces && forced.pieces != 0) {
      cuts.push_back({segment_len, forced.pieces});
      return;
    }
    const int64_t most = is_free ? std::min(kMostPieces, segment_len / (kLeastPieceChunks * kSegmentStep)) : 1;
    for (int64_t pieces = 1; pieces <= std::max<int64_t>(most, 1); pieces += pieces < 4 ? 1 : 4)
      cuts.push_back({segment_len, pieces});
  };
  if (forced.segment_len != 0) {
    consider(forced.segment_len);
    return cuts;
  }
  int64_t width = 0;
  for (const Job& job : jobs) width += p.heads * ceil_div(job.dim_c, tile.tile.slice);
  width *= p.num_seqs;
  const int64_t resident = fitting_blocks(tile, device, p.slope_grad, family) * device.num_sms;
  for (const int64_t segments : counts_with_one_pass(p, device, forced)) {
    consider(segment_len_of(p, segments));
    if (!is_free || !sm80_is_ahead(tile.tile, p.slope_grad) || forced.segments != 0 || width == 0) continue;
    const int64_t beside = ceil_div(segments * width, resident) * resident - segments * width;
    if (beside == 0 || beside >= width) continue;
    const int64_t turns = ceil_div(width, beside);
    const int64_t tokens = std::max<int64_t>(p.length, 1);
    consider(ceil_div(ceil_div(tokens * turns, segments * turns + 1), kSegmentStep) * kSegmentStep);
  }
  return cuts;
}

// The plan with these tiles, cut so, and its predicted time.
Candidate evaluate(const Problem& p, const DeviceProps& device, Family family, const Forced& forced,
                   const std::vector<const TileCost*>& tiles, const std::vector<std::vector<Job>>& launches,
                   const Cut& wanted) {
  Candidate candidate;
  Plan& plan = candidate.plan;
  plan.family = family;
  plan.num_launches = static_cast<int>(launches.size());
  for (size_t i = 0; i < tiles.size(); ++i) plan.tiles[i] = tiles[i]->tile;
  plan.state_tiles[0] = plan.tiles[0];
  const bool cut = cut_into_segments(p, wanted.segment_len, &plan);
  if (cut && wanted.pieces > 1) cut_into_pieces(wanted.pieces, &plan);
  if (p.slope_grad) {
    const int64_t slots = p.batch * p.length / plan.tiles[0].chunk + p.num_seqs;
    plan.dot_floats = 2 * slots * p.heads * ceil_div(p.dim_k, plan.tiles[0].slice) * 3;
  }

  const int64_t tokens = std::max<int64_t>(p.length, 1), walked = std::min(plan.segment_len, tokens);
  const int64_t units = busy_units(p, plan), last_len = tokens - (plan.num_segments - 1) * plan.segment_len;
  const bool is_split = p.backward && family == Family::kSm80;
  const bool fitted = is_fitted(p, *tiles[0]);
  // A sequence's last segment: its state nobody needs, and it may be short. (In costs that were fitted without it,
  // those of gradients alone; packed, nobody knows.)
  const int64_t last_ones = fitted && (!p.packed || p.num_seqs == 1) ? p.num_seqs : 0;
  double us = 0;
  for (size_t i = 0; i < launches.size(); ++i) {
    const bool has_rest = last_ones > 0 && cut && last_len < walked && sm80_is_ahead(tiles[i]->tile, p.slope_grad);
    Walk whole{0, walked}, rest{0, last_len};
    int64_t gathered = 0;
    const double beside_out = !is_split ? 1.0 : p.slope_grad ? tiles[i]->with_dots : tiles[i]->split;
    const bool has_quick_dv = p.slope_grad && launches[i].size() == 3 && tiles[i]->beside_dots > 0;
    if (has_quick_dv)  // behind dq and dk
      rest.tokens = std::llround(static_cast<double>(walked) * tiles[i]->beside_dots / tiles[i]->with_dots);
    for (size_t j = 0; j < launches[i].size(); ++j) {
      const int64_t width = p.heads * ceil_div(launches[i][j].dim_c, tiles[i]->tile.slice);
      const int64_t of_rest = has_rest ? last_ones : has_quick_dv && j == 2 ? units : 0;
      whole.blocks += (units - of_rest) * width;
      rest.blocks += of_rest * width;
      if (j < 2) gathered += (units - last_ones) * width;  // dv shares dk's
    }
    us += kLaunchUs + beside_out * walking_us(*tiles[i], tiles[i]->main, whole, rest, device, p.slope_grad, family);
    if (family == Family::kSm80 && !p.backward && sm80_is_ahead(tiles[i]->tile, false)) us += kTwoRolesUs;
    if (cut && i == 0)
      us += gathering_us(p, *tiles[i], {gathered, walked}, plan, device, family) * (is_split ? kSplitStateCost : 1.0);
  }
  const bool overlaps = device.compute_capability >= 90 && family != Family::kSimt;
  const double combine = combine_us(p, plan, fitted ? kCombineGradientsGBs : kCombineGBs);
  const double between = (overlaps ? kCutOverlappedUs : kCutUs) + (fitted ? kCutGradientsUs : 0) + combine +
                         more_pieces(plan, p.heads) * combine_us(p, plan, kPiecesGBs);
  plan.in_one_pass = cut && forced.passes != 3 && has_one_pass(p, device, family, plan) &&
                     (kOnePassUs < between || forced.passes == 1);
  if (plan.in_one_pass)
    plan.state_floats[0] = ceil_div(p.dim_v, plan.tiles[0].slice) * plan.tiles[0].slice * plan.tiles[0].tile_a;
  if (cut) us += plan.in_one_pass ? kOnePassUs : between;
  if (plan.in_one_pass) {
    plan.num_pieces = 1;
    plan.piece_chunks = 0;
  }
  plan.local_states *= plan.num_pieces;
  plan.predicted_us = us;
  candidate.us = us;
  return candidate;
}

// The plan of the families that are not bound to one GPU.
Status plan_portable(const Problem& p, const DeviceProps& device, const Forced& forced, Plan* plan) {
  const Family family = family_for(p.dtype);
  if (!forced.family.empty() && forced.family != family_text(family))
    return Status::error("LA2_PLAN: family " + forced.family + " has no kernels for " + dtype_text(p.dtype) +
                         ", expected " + family_text(family));

  // Jobs by launch (csrc/kernels/trilinear.h).
  std::vector<std::vector<Job>> launches;
  const Job out_or_dv{p.dim_k, p.dim_v}, dq_or_dk{p.dim_v, p.dim_k};
  if (!p.backward) {
    launches = {{out_or_dv}};
  } else if (tile_a_for(p.dim_k) == tile_a_for(p.dim_v)) {
    launches = {{dq_or_dk, dq_or_dk, out_or_dv}};
  } else {
    launches = {{dq_or_dk, dq_or_dk}, {out_or_dv}};
  }

  // Every pair of slices, every cut, the best prediction.
  const int64_t slices[] = {32, 64, 128};
  bool found = false;
  double best = 0;
  for (const int64_t slice0 : slices) {
    for (const int64_t slice1 : slices) {
      std::vector<const TileCost*> tiles;
      bool fits = true;
      for (size_t i = 0; i < launches.size(); ++i) {
        const int64_t slice = i == 0 ? slice0 : slice1;
        const TileCost* tile = find_tile(p.dtype, tile_a_for(launches[i][0].dim_a), static_cast<int>(slice));
        fits = fits && tile != nullptr && shared_bytes(family, tile->tile, p.slope_grad) <= device.shared_per_block;
        fits = fits && (forced.slice == 0 || forced.slice == slice);
        tiles.push_back(tile);
      }
      if (!fits || (launches.size() == 1 && slice1 != slice0)) continue;
      for (const Cut& cut : cuts_to_consider(p, device, family, forced, *tiles[0], launches[0])) {
        const Candidate candidate = evaluate(p, device, family, forced, tiles, launches, cut);
        if (forced.passes == 1 && !candidate.plan.in_one_pass) continue;
        // More segments or pieces only for a gain beyond the model's precision.
        const bool is_cut_again = is_fitted(p, *tiles[0]) && !p.slope_grad && plan->num_segments > 1;
        const bool is_more =
            candidate.plan.num_segments > plan->num_segments || candidate.plan.num_pieces > plan->num_pieces;
        if (found && candidate.us >= best * (!is_more ? 1.0 : is_cut_again ? kWorthwhileCutAgain : kWorthwhile))
          continue;
        found = true;
        best = candidate.us;
        *plan = candidate.plan;
      }
    }
  }
  if (!found) {
    std::ostringstream text;
    text << "no kernel of family " << family_text(family) << " fits: head dims " << p.dim_k << " and " << p.dim_v
         << " in " << device.shared_per_block << " bytes of shared memory";
    if (forced.slice > 0) text << " with slice " << forced.slice;
    if (forced.passes == 1) text << ", cut so that all blocks are resident";
    return Status::error(text.str());
  }
  return Status::ok();
}

// SiLU of q, k and v by kernels of torch's, before the operator's: three launches, and bytes read and written.
double torch_silu_us(const Problem& p) {
  constexpr double kLaunchUs = 3, kGBs = 3800, kBytes = 2 * 2;
  const double rows = static_cast<double>(p.batch * p.heads * p.length);
  return 3 * kLaunchUs + rows * static_cast<double>(2 * p.dim_k + p.dim_v) * kBytes / (kGBs * 1e3);
}

// Of a problem without SiLU.
Status make_plain_plan(const Problem& p, const DeviceProps& device, const std::string& forced_text, Plan* plan) {
  Forced forced;
  if (Status s = parse_forced(forced_text, &forced); !s.is_ok()) return s;
  if (Status s = check_dim("head dim of q and k", p.dim_k); !s.is_ok()) return s;
  if (Status s = check_dim("head dim of v", p.dim_v); !s.is_ok()) return s;
  if (Status s = check_sizes(p); !s.is_ok()) return s;
  if (!p.packed && p.num_seqs != p.batch)
    return Status::error("num_seqs is " + std::to_string(p.num_seqs) + ", expected the batch, " +
                         std::to_string(p.batch) + ", without cu_seqlens");
  if (device.compute_capability < 80)
    return Status::error("the GPU has compute capability " + std::to_string(device.compute_capability / 10) + "." +
                         std::to_string(device.compute_capability % 10) + ", expected 8.0 or later");
  if (device.num_sms <= 0) return Status::error("the device has no multiprocessors");

  // Of the two families the faster one: where a call is short, the Hopper kernels are slow to start.
  Plan hopper;
  const Status on_hopper = plan_sm90(p, device, forced, &hopper);
  const bool is_portable = forced.family == "sm80";
  if (forced.family == "sm90" || (forced.passes == 1 && !is_portable) ||
      (on_hopper.is_ok() && (p.is_extend || forced.is_for_sm90()))) {
    *plan = hopper;
    return on_hopper;
  }
  const Status elsewhere = plan_portable(p, device, forced, plan);
  if (!on_hopper.is_ok() || (elsewhere.is_ok() && plan->predicted_us < hopper.predicted_us)) return elsewhere;
  *plan = hopper;
  return Status::ok();
}

}  // namespace

Status make_plan(const Problem& p, const DeviceProps& device, const std::string& forced_text, Plan* plan) {
  Problem plain = p;
  plain.silu = false;
  if (p.silu && p.backward) return Status::error("silu is of a forward, expected none of a backward");
  if (Status s = make_plain_plan(plain, device, forced_text, plan); !s.is_ok() || !p.silu) return s;
  // Kernels of torch's and this plan's, or Hopper's that do both, if that is faster or asked for by their name.
  plan->predicted_us += torch_silu_us(p);
  Forced forced;
  if (Status s = parse_forced(forced_text, &forced); !s.is_ok()) return s;
  Plan within;
  if (forced.passes == 1 || !plan_sm90(p, device, forced, &within).is_ok()) return Status::ok();
  if (forced.family.empty() && plan->predicted_us <= within.predicted_us) return Status::ok();
  *plan = within;
  plan->takes_silu = true;
  return Status::ok();
}

std::string describe(const Problem& p, const DeviceProps& device, const Plan& plan) {
  std::ostringstream line;
  line << (p.backward ? "backward" : "forward") << ' ' << dtype_text(p.dtype) << " B=" << p.batch << " H=" << p.heads
       << " N=" << p.length << " D=" << p.dim_k << " E=" << p.dim_v;
  if (p.packed) line << " packed=" << p.num_seqs;
  if (p.slope_grad) line << " dslope";
  if (p.silu) line << " silu";
  line << " on sm_" << device.compute_capability << 'x' << device.num_sms << ": " << family_text(plan.family);
  for (int i = 0; i < plan.num_launches; ++i)
    line << (i ? " + " : " ") << (plan.is_fused && i == 0 ? "dk and dv " : "") << "tile " << plan.tiles[i].tile_a
         << " slice " << plan.tiles[i].slice << " chunk " << plan.tiles[i].chunk;
  line << ", " << plan.num_segments << (plan.num_segments == 1 ? " segment of " : " segments of ") << plan.segment_len
       << (plan.in_one_pass ? " in one pass" : "") << (p.silu && !plan.takes_silu ? " behind torch's silu" : "")
       << (plan.num_pieces > 1 ? " gathered in " + std::to_string(plan.num_pieces) + " pieces" : "") << ", "
       << plan.num_units << " units";
  char number[64];
  std::snprintf(
      number, sizeof number, ", workspace %.2f MiB, predicted %.0f us",
      static_cast<double>(workspace_floats(p, plan) * (p.dtype == DType::kFloat64 ? 8 : 4)) / (1024.0 * 1024.0),
      plan.predicted_us);
  line << number;
  return line.str();
}

Status parse_problem(const std::string& text, Problem* p) {
  std::vector<std::string> fields;
  std::istringstream stream(text);
  for (std::string field; std::getline(stream, field, ',');) fields.push_back(field);
  if (fields.size() < 6)
    return Status::error("problem is '" + text +
                         "', expected B,H,N,D,E,dtype[,backward][,dslope][,silu][,packed=NUM_SEQS]");
  int64_t* const numbers[] = {&p->batch, &p->heads, &p->length, &p->dim_k, &p->dim_v};
  const char* const names[] = {"B", "H", "N", "D", "E"};
  for (int i = 0; i < 5; ++i)
    if (Status s = parse_number(names[i], fields[static_cast<size_t>(i)], numbers[i]); !s.is_ok()) return s;
  const std::string& dtype = fields[5];
  bool known = false;
  for (const DType t : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64}) {
    if (dtype != dtype_text(t)) continue;
    p->dtype = t;
    known = true;
  }
  if (!known) return Status::error("dtype is '" + dtype + "', expected bf16, fp16, fp32 or fp64");
  p->num_seqs = p->batch;
  for (size_t i = 6; i < fields.size(); ++i) {
    if (fields[i] == "backward") {
      p->backward = true;
    } else if (fields[i] == "silu") {
      p->silu = true;
    } else if (fields[i] == "dslope") {
      p->slope_grad = true;
    } else if (fields[i].rfind("packed=", 0) == 0) {
      p->packed = true;
      if (Status s = parse_number("packed", fields[i].substr(7), &p->num_seqs); !s.is_ok()) return s;
    } else {
      return Status::error("'" + fields[i] + "' is unknown, expected backward, dslope, silu or packed=NUM_SEQS");
    }
  }
  return Status::ok();
}

Status parse_device(const std::string& text, DeviceProps* device) {
  int capability = 0, sms = 0, used = 0;
  if (std::sscanf(text.c_str(), "sm_%dx%d%n", &capability, &sms, &used) != 2 || used != static_cast<int>(text.size()) ||
      sms <= 0)
    return Status::error("device is '" + text + "', expected sm_<capability>x<multiprocessors>, as sm_90x132");
  device->compute_capability = capability;
  device->num_sms = sms;
  // Shared memory by the CUDA programming guide's table of compute capabilities.
  const bool large = capability == 80 || capability == 87;
  const bool larger = capability == 90 || capability == 100 || capability == 103;
  device->shared_per_sm = (larger ? 228 : large ? 164 : 100) * 1024;
  device->shared_per_block = device->shared_per_sm - 1024;
  return Status::ok();
}

}  // namespace la2
