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

// Who writes a slot.
struct Writer {
  int64_t request;
  std::string place;  // "write_slots[2]"
};

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

void check_seq_offsets(const char* op, const char* name, const Tensor& offsets, int64_t tokens, bool covers_all,
                       const char* what) {
  const Integers offset(offsets);
  const int64_t last = offset.size() - 1;
  if (covers_all ? offset[0] != 0 : offset[0] < 0)
    fail(op, ": ", name, "[0] is ", offset[0], covers_all ? ", expected 0" : ", expected at least 0");
  for (int64_t i = 0; i < last; ++i)
    if (offset[i + 1] < offset[i])
      fail(op, ": ", name, "[", i + 1, "] is ", offset[i + 1], ", expected at least ", name, "[", i, "] = ", offset[i]);
  if (covers_all ? offset[last] != tokens : offset[last] > tokens)
    fail(op, ": ", name, "[-1] is ", offset[last], ", expected ", covers_all ? "" : "at most ", what, ", ", tokens);
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

void check_requests(const Requests& args) {
  const char* op = args.op;
  check_seq_offsets(op, "cu_seqlens", args.cu_seqlens, args.tokens, false);
  const Integers start(args.cu_seqlens);
  const int64_t requests = start.size() - 1;

  std::unordered_map<int64_t, Writer> writers;
  auto write = [&](int64_t slot, int64_t request, const std::string& place) {
    if (slot < 0) return;
    const auto [found, is_new] = writers.emplace(slot, Writer{request, place});
    if (!is_new)
      fail(op, ": ", place, " is ", slot, " like ", found->second.place, ", expected a slot that is not written twice");
  };

  std::optional<Integers> reads, writes;
  if (args.read_slots) reads.emplace(*args.read_slots);
  if (args.write_slots) writes.emplace(*args.write_slots);
  auto place = [](const char* name, int64_t r) { return std::string(name) + "[" + std::to_string(r) + "]"; };
  auto read_place = [&](int64_t r) {
    return reads ? place("read_slots", r) : "the slot of request " + std::to_string(r);
  };
  for (int64_t r = 0; r < requests; ++r) {
    if (reads) check_slot(op, "read_slots", *reads, r, args.num_slots);
    if (writes) check_slot(op, "write_slots", *writes, r, args.num_slots);
    write(writes ? (*writes)[r] : reads ? (*reads)[r] : r, r, writes ? place("write_slots", r) : read_place(r));
  }

  if (args.snapshot_offsets && args.snapshot_tokens && args.snapshot_slots) {
    const Integers count(*args.snapshot_tokens), slot(*args.snapshot_slots);
    check_seq_offsets(op, "snapshot_offsets", *args.snapshot_offsets, count.size(), false, "the number of snapshots");
    const Integers offset(*args.snapshot_offsets);
    for (int64_t r = 0; r < requests; ++r) {
      const int64_t length = start[r + 1] - start[r];
      for (int64_t i = offset[r]; i < offset[r + 1]; ++i) {
        const std::string here = place("snapshot_tokens", i);
        if (count[i] < 0 || count[i] > length)
          fail(op, ": ", here, " is ", count[i], ", expected 0 to ", length, ", the tokens of request ", r);
        if (i > offset[r] && count[i] < count[i - 1])
          fail(op, ": ", here, " is ", count[i], ", expected at least snapshot_tokens[", i - 1, "] = ", count[i - 1],
               " of the same request");
        check_slot(op, "snapshot_slots", slot, i, args.num_slots);
        write(slot[i], r, place("snapshot_slots", i));
      }
    }
  }

  std::optional<Tensor> has_state;
  if (args.has_initial_state) has_state = on_host(*args.has_initial_state);
  for (int64_t r = 0; r < requests; ++r) {
    if (has_state && !static_cast<const bool*>(has_state->const_data_ptr())[r]) continue;
    const int64_t slot = reads ? (*reads)[r] : r;
    const auto found = writers.find(slot);
    if (found != writers.end() && found->second.request != r)
      fail(op, ": ", read_place(r), " is ", slot, " like ", found->second.place,
           ", expected a slot that no other request writes to");
  }
}

void check_values(const Attention& args) {
  if (args.cu_seqlens) check_seq_offsets(args.op, "cu_seqlens", *args.cu_seqlens, args.sizes.length, true);
  if (args.slope) check_slopes(args.op, *args.slope);
}

void check_values(const Decode& args) {
  constexpr const char* kOp = "la2::decode";
  if (args.state_indices) check_slots(kOp, "state_indices", *args.state_indices, args.params.slots, true);
  if (args.slope) check_slopes(kOp, *args.slope);
}

}  // namespace la2::ops
