// Plans that a thread made before.
#include <array>
#include <optional>
#include <tuple>

#include "plan.h"

namespace la2 {
namespace {

// Structured bindings name every member: a new one does not compile until it is here.
auto members(const Problem& problem) {
  const auto& [backward, dtype, batch, heads, length, dim_k, dim_v, num_seqs, packed, slope_grad, is_extend, silu,
               mappable] = problem;
  return std::make_tuple(backward, dtype, batch, heads, length, dim_k, dim_v, num_seqs, packed, slope_grad, is_extend,
                         silu, mappable);
}
auto members(const DeviceProps& device) {
  const auto& [compute_capability, num_sms, shared_per_block, shared_per_sm] = device;
  return std::make_tuple(compute_capability, num_sms, shared_per_block, shared_per_sm);
}

struct Entry {
  Problem problem;
  DeviceProps device;
  std::string forced;
  Plan plan;

  bool answers(const Problem& p, const DeviceProps& d, const std::string& f) const {
    return members(problem) == members(p) && members(device) == members(d) && forced == f;
  }
};

// Where a problem's plan is kept, and whatever was there before is forgotten.
constexpr size_t kPlaces = 32;
size_t place_of(const Problem& p) {
  uint64_t mixed = (p.backward ? 1 : 0) + (p.silu ? 2 : 0);
  for (const int64_t part : {p.length, p.batch, p.heads, p.num_seqs, p.dim_k, p.dim_v}) {
    mixed = (mixed ^ static_cast<uint64_t>(part)) * 0x9e3779b97f4a7c15u;
    mixed ^= mixed >> 32;
  }
  return static_cast<size_t>(mixed % kPlaces);
}

}  // namespace

Status recall_plan(const Problem& problem, const DeviceProps& device, const std::string& forced, Plan* plan) {
  thread_local std::array<std::optional<Entry>, kPlaces> entries;
  std::optional<Entry>& entry = entries[place_of(problem)];
  if (!entry || !entry->answers(problem, device, forced)) {
    Plan made;
    if (Status status = make_plan(problem, device, forced, &made); !status.is_ok()) return status;
    entry = Entry{problem, device, forced, made};
  }
  *plan = entry->plan;
  return Status::ok();
}

}  // namespace la2
