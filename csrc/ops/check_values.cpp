#include "check_values.h"

#include <cmath>
#include <cstdlib>
#include <unordered_map>

namespace la2::ops {
namespace {

// A small tensor on the host, contiguous; the copy from a GPU waits for its stream.
Tensor on_host(const Tensor& t) {
  if (t.is_cpu()) return t.is_contiguous() ? t : torch::stable::contiguous(t);
  const std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  Tensor host = torch::stable::empty(sizes, t.scalar_type(), std::nullopt, torch::stable::Device(DeviceType::CPU));
  return torch::stable::copy_(host, t);
}

// Integers of either width.
class Integers {
 public:
  explicit Integers(const Tensor& t)
      : host_(on_host(t)),
        data_(host_.const_data_ptr()),
        size_(host_.numel()),
        is_int64_(host_.scalar_type() == ScalarType::Long) {}

  int64_t size() const { return size_; }
  int64_t operator[](int64_t i) const {
    return is_int64_ ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }

 private:
  Tensor host_;
  const void* data_;
  int64_t size_;
  bool is_int64_;
};

template <class T>
void check_slopes_of(const char* op, const Tensor& host) {
  const T* data = static_cast<const T*>(host.const_data_ptr());
  const int64_t heads = host.size(host.dim() - 1);
  for (int64_t i = 0; i < host.numel(); ++i) {
    if (std::isfinite(data[i]) && data[i] >= 0) continue;
    const std::string row = host.dim() == 2 ? std::to_string(i / heads) + ", " : "";
    fail(op, ": slope[", row, i % heads, "] is ", data[i], ", expected a finite number that is not negative");
  }
}

void check_slot(const char* op, const char* name, const Integers& slots, int64_t i, int64_t num_slots) {
  if (slots[i] >= num_slots)
    fail(op, ": ", name, "[", i, "] is ", slots[i], ", expected less than the ", num_slots, " slots of state");
}

}  // namespace

bool values_are_checked() {
  const char* value = std::getenv("LA2_CHECK");
  return value != nullptr && value[0] != '\0' && !(value[0] == '0' && value[1] == '\0');
}

void check_slots(const char* op, const char* name, const Tensor& slots, int64_t num_slots, bool for_writing) {
  const Integers slot(slots);
  std::unordered_map<int64_t, int64_t> first;
  for (int64_t i = 0; i < slot.size(); ++i) {
    check_slot(op, name, slot, i, num_slots);
    if (!for_writing || slot[i] < 0) continue;
    const auto [found, is_new] = first.emplace(slot[i], i);
    if (!is_new)
      fail(op, ": ", name, "[", i, "] is ", slot[i], " like ", name, "[", found->second,
           "], expected a slot that no other row writes to");
  }
}

void check_seq_offsets(const char* op, const char* name, const Tensor& offsets, int64_t tokens) {
  const Integers offset(offsets);
  const int64_t last = offset.size() - 1;
  if (offset[0] != 0) fail(op, ": ", name, "[0] is ", offset[0], ", expected 0");
  for (int64_t i = 0; i < last; ++i)
    if (offset[i + 1] < offset[i])
      fail(op, ": ", name, "[", i + 1, "] is ", offset[i + 1], ", expected at least ", name, "[", i, "] = ", offset[i]);
  if (offset[last] != tokens)
    fail(op, ": ", name, "[-1] is ", offset[last], ", expected the number of tokens, ", tokens);
}

void check_slopes(const char* op, const Tensor& slope) {
  const Tensor host = on_host(slope);
  if (host.scalar_type() == ScalarType::Double)
    check_slopes_of<double>(op, host);
  else
    check_slopes_of<float>(op, host);
}

void check_counts(const char* op, const char* name, const Tensor& counts, int64_t most, const char* what) {
  const Integers count(counts);
  for (int64_t i = 0; i < count.size(); ++i)
    if (count[i] < 0 || count[i] > most)
      fail(op, ": ", name, "[", i, "] is ", count[i], ", expected 0 to ", most, ", ", what);
}

void check_values(const Attention& args) {
  if (args.cu_seqlens) check_seq_offsets(args.op, "cu_seqlens", *args.cu_seqlens, args.sizes.length);
  if (args.slope) check_slopes(args.op, *args.slope);
}

void check_values(const char* op, const Recurrent& args) {
  const RecurrentParams& p = args.params;
  if (args.state_indices) check_slots(op, "state_indices", *args.state_indices, p.slots, p.writes_state);
  if (args.num_accepted) check_counts(op, "num_accepted", *args.num_accepted, p.tokens, "the number of draft tokens");
  if (args.slope) check_slopes(op, *args.slope);
}

}  // namespace la2::ops
