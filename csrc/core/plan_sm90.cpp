// The Hopper family's planner: csrc/kernels/sm90.
#include "plan_parts.h"

namespace la2 {
namespace {

constexpr int kChunk = 64;

// Microseconds a chunk of one block takes on its SM while others idle, on one H200 (`bench calibrate`).
struct Sm90Cost {
  int tile_a, slice;
  double out, gradient, state_only, state_only_split;
};
constexpr Sm90Cost kTrilinear[] = {
    {64, 64, 0.87, 1.12, 0.43, 0.46},   {64, 128, 1.13, 1.30, 0.54, 0.70}, {128, 64, 1.02, 1.30, 0.51, 0.60},
    {128, 128, 1.38, 1.60, 0.64, 0.97}, {256, 64, 1.94, 2.60, 0.69, 1.58},
};
constexpr double kPair64 = 1.47, kPair128 = 3.19;  // dk and dv; one dim of 64 and one of 128: in between
constexpr double kBusy = 0.2;                      // slower by this where every SM is at work: shared L2, lower clocks
constexpr double kGBs = 3800;                      // 0.89 of what a copy moves
constexpr double kFirstUs = 8.0;                   // launch, first copies, last stores
constexpr double kNextUs = 2.0;                    // of one more kernel, which overlaps the one before
constexpr double kCombineUs = 6.0;
constexpr int kBytes = 2;

const Sm90Cost* find(int tile_a, int slice) {
  for (const Sm90Cost& cost : kTrilinear)
    if (cost.tile_a == tile_a && cost.slice == slice) return &cost;
  return nullptr;
}

// Slices side by side in a cluster: pairs where they come out even. Four at a time lost: with two stages a block waits
// for its copies, and for the slowest of four (csrc/kernels/DESIGN.md).
int cluster_for(int64_t slices, const Forced& forced) {
  if (forced.cluster != 0) return static_cast<int>(forced.cluster);
  return slices % 2 == 0 ? 2 : 1;
}

// Blocks that are resident at once. An SM holds one; of clusters of 4, 30 fit into the 132 SMs of an H100 or H200.
int64_t resident_blocks(const DeviceProps& device, int cluster) {
  return cluster < 4 ? device.num_sms / cluster * cluster : device.num_sms * 10 / 11 / cluster * cluster;
}

// A launch with `items` blocks' worth of work, each `chunks` long, which moves `bytes`.
double launch_us(const DeviceProps& device, int64_t items, int cluster, int64_t chunks, double chunk_us, double bytes) {
  const int64_t resident = resident_blocks(device, cluster);
  const double busy = std::min(1.0, static_cast<double>(items) / static_cast<double>(resident));
  const double turns = static_cast<double>(ceil_div(items, resident));
  return std::max(turns * static_cast<double>(chunks) * chunk_us * (1 + kBusy * busy), bytes / (kGBs * 1e3));
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

  const double rows = static_cast<double>(p.batch * p.heads * p.length) * kBytes;
  const bool is_fused = p.backward && p.dim_k <= 128 && p.dim_v <= 128;
  const bool wide_k = p.dim_k > 64, wide_v = p.dim_v > 64;
  const double pair_us = wide_k && wide_v ? kPair128 : wide_k || wide_v ? (kPair64 + kPair128) / 2 : kPair64;
  bool found = false;
  for (const int slice : {128, 64}) {
    if (forced.slice != 0 && forced.slice != slice) continue;
    for (const int64_t segments : counts_of_segments(p, forced)) {
      Plan candidate;
      candidate.family = Family::kSm90;
      const bool cut = cut_into_segments(p, segments, &candidate);
      const int64_t units = busy_units(p, candidate) * p.heads;
      const int64_t chunks = ceil_div(std::min(candidate.segment_len, std::max<int64_t>(p.length, 1)), kChunk);
      const double read_share =
          1.0 - 1.0 / static_cast<double>(candidate.num_segments);  // the last segment's state nobody needs

      double us = kFirstUs;
      auto add = [&](int launch, int64_t dim_a, int64_t dim_c, int wanted_slice, int jobs) -> bool {
        const Sm90Cost* cost = find(tile_a_for(dim_a), wanted_slice);
        if (cost == nullptr) return false;
        const int64_t slices = ceil_div(dim_c, wanted_slice);
        const int cluster = cluster_for(slices, forced);
        candidate.tiles[launch] = {cost->tile_a, wanted_slice, kChunk};
        candidate.clusters[launch] = cluster;
        candidate.max_blocks[launch] = p.packed ? 0 : resident_blocks(device, cluster);
        candidate.num_launches = launch + 1;
        const int64_t items = units * ceil_div(slices, cluster) * cluster * jobs;
        const double bytes = rows * jobs * 2 * static_cast<double>(dim_a + dim_c);
        us += launch_us(device, items, cluster, chunks, p.backward ? cost->gradient : cost->out, bytes);
        return true;
      };
      if (!p.backward) {
        if (slice == 128 && p.dim_v <= 64) continue;
        if (!add(0, p.dim_k, p.dim_v, slice, 1)) continue;
      } else if (is_fused) {
        if (slice == 128 && p.dim_k <= 64) continue;
        candidate.is_fused = true;
        candidate.tiles[0] = {tile_a_for(p.dim_v), tile_a_for(p.dim_k), kChunk};  // of dk
        candidate.max_blocks[0] = p.packed ? 0 : resident_blocks(device, 1);
        us += launch_us(device, units, 1, chunks, pair_us, rows * 3 * static_cast<double>(p.dim_k + p.dim_v)) + kNextUs;
        if (!add(1, p.dim_v, p.dim_k, slice, 1)) continue;
      } else {
        // Slices of 128 do not split what dk and dv need split.
        if (slice == 128 || !add(0, p.dim_v, p.dim_k, slice, 2) || !add(1, p.dim_k, p.dim_v, slice, 1)) continue;
        us += kNextUs;
      }
      if (cut) {
        us += kNextUs + (candidate.num_segments > 2 ? kCombineUs : 0);
        auto add_states = [&](int launch, int64_t dim_a, int64_t dim_c, int jobs) {
          const int tile_a = tile_a_for(dim_a), slice_c = dim_c <= 64 || tile_a > 128 ? 64 : 128;
          const int64_t slices = ceil_div(dim_c, slice_c);
          const int cluster = cluster_for(slices, forced);
          candidate.state_tiles[launch] = {tile_a, slice_c, kChunk};
          candidate.state_clusters[launch] = cluster;
          candidate.state_floats[launch] = tile_a * ceil_div(dim_c, 64) * 64;
          const double items = static_cast<double>(units * slices * jobs) * read_share;
          us += launch_us(device, static_cast<int64_t>(items), cluster, chunks,
                          p.backward ? find(tile_a, slice_c)->state_only_split : find(tile_a, slice_c)->state_only,
                          rows * jobs * read_share * static_cast<double>(dim_a + dim_c));
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
        if (candidate.num_segments > 2) us += combine_us(p, candidate);
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
                         std::to_string(p.dim_v) + " with slice " + std::to_string(forced.slice));
  return Status::ok();
}

}  // namespace la2
