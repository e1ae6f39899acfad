// The Hopper family's planner: csrc/kernels/sm90.
#include "plan_parts.h"

namespace la2 {
namespace {

constexpr int kChunk = 64;

// Microseconds a chunk of one block takes on its SM, on one H200 (csrc/kernels/DESIGN.md has the runs).
struct Sm90Cost {
  int tile_a, slice;
  double out, gradient, state_only;
};
constexpr Sm90Cost kTrilinear[] = {
    {64, 64, 0.75, 0.85, 0.50},   {64, 128, 0.90, 1.00, 0.60}, {128, 64, 0.95, 1.10, 0.60},
    {128, 128, 1.38, 1.60, 1.00}, {256, 64, 1.60, 2.10, 0.90},
};
constexpr double kFused64 = 1.5, kFused128 = 2.9;
constexpr double kGBs = 3850;     // 0.90 of what a copy moves
constexpr double kFirstUs = 5.0;  // launch, first copies, last stores
constexpr double kNextUs = 2.0;   // of one more kernel, which overlaps the one before
constexpr double kCutUs = 5.0;    // the combine pass, before its work
constexpr int kBytes = 2;

const Sm90Cost* find(int tile_a, int slice) {
  for (const Sm90Cost& cost : kTrilinear)
    if (cost.tile_a == tile_a && cost.slice == slice) return &cost;
  return nullptr;
}

// Slices side by side in a cluster: all up to two, else four where a and b are wide, two where they are not.
int cluster_for(int tile_a, int64_t slices) { return slices <= 1 ? 1 : slices == 2 || tile_a < 256 ? 2 : 4; }

// Blocks that are resident at once. An SM holds one; of clusters of 4, 30 fit into the 132 SMs of an H100 or H200.
int64_t resident_blocks(const DeviceProps& device, int cluster) {
  return cluster < 4 ? device.num_sms / cluster * cluster : device.num_sms * 10 / 11 / cluster * cluster;
}

// A launch with `items` blocks' worth of work, each `chunks` long, which moves `bytes`.
double launch_us(const DeviceProps& device, int64_t items, int cluster, int64_t chunks, double chunk_us, double bytes) {
  const int64_t turns = ceil_div(items, resident_blocks(device, cluster));
  return std::max(static_cast<double>(turns * chunks) * chunk_us, bytes / (kGBs * 1e3));
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
        const int cluster = cluster_for(cost->tile_a, slices);
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
        us += launch_us(device, units, 1, chunks, std::max(p.dim_k, p.dim_v) <= 64 ? kFused64 : kFused128,
                        rows * 3 * static_cast<double>(p.dim_k + p.dim_v)) +
              kNextUs;
        if (!add(1, p.dim_v, p.dim_k, slice, 1)) continue;
      } else {
        // Slices of 128 do not split what dk and dv need split.
        if (slice == 128 || !add(0, p.dim_v, p.dim_k, slice, 2) || !add(1, p.dim_k, p.dim_v, slice, 1)) continue;
        us += kNextUs;
      }
      if (cut) {
        us += kCutUs + kNextUs;
        auto add_states = [&](int launch, int64_t dim_a, int64_t dim_c, int jobs) {
          const int tile_a = tile_a_for(dim_a), slice_c = dim_c <= 64 || tile_a > 128 ? 64 : 128;
          const int64_t slices = ceil_div(dim_c, slice_c);
          const int cluster = cluster_for(tile_a, slices);
          candidate.state_tiles[launch] = {tile_a, slice_c, kChunk};
          candidate.state_clusters[launch] = cluster;
          candidate.state_floats[launch] = tile_a * ceil_div(dim_c, 64) * 64;
          const double items = static_cast<double>(units * slices * jobs) * read_share;
          us += launch_us(device, static_cast<int64_t>(items), cluster, chunks, find(tile_a, slice_c)->state_only,
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
        us += combine_us(p, candidate);
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
