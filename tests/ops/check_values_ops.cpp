// The functions of csrc/ops/check_values.h as operators, for test_check_values.py: each by itself, on values of the
// test's own choice. Built there, with csrc/ops/check_values.cpp and nothing else of the package.
#include "../../csrc/ops/check_values.h"

namespace {

using la2::ops::OptTensor;
using la2::ops::Tensor;

constexpr const char* kOp = "la2::op";

void slots(const Tensor& t, int64_t num_slots, bool for_writing) {
  la2::ops::check_slots(kOp, "slots", t, num_slots, for_writing);
}

void seq_offsets(const Tensor& t, int64_t tokens, bool covers_all) {
  la2::ops::check_seq_offsets(kOp, "cu_seqlens", t, tokens, covers_all);
}

void slopes(const Tensor& t) { la2::ops::check_slopes(kOp, t); }

void counts(const Tensor& t, int64_t most) {
  la2::ops::check_counts(kOp, "num_accepted", t, most, "the number of draft tokens");
}

void requests(const Tensor& cu_seqlens, int64_t tokens, int64_t num_slots, const OptTensor& read_slots,
              const OptTensor& write_slots, const OptTensor& has_initial_state, const OptTensor& snapshot_offsets,
              const OptTensor& snapshot_tokens, const OptTensor& snapshot_slots) {
  la2::ops::check_requests({kOp, cu_seqlens, tokens, num_slots, read_slots, write_slots, has_initial_state,
                            snapshot_offsets, snapshot_tokens, snapshot_slots});
}

}  // namespace

STABLE_TORCH_LIBRARY(la2_check, m) {
  m.def("slots(Tensor slots, int num_slots, bool for_writing) -> ()");
  m.def("seq_offsets(Tensor offsets, int tokens, bool covers_all) -> ()");
  m.def("slopes(Tensor slope) -> ()");
  m.def("counts(Tensor counts, int most) -> ()");
  m.def(
      "requests(Tensor cu_seqlens, int tokens, int num_slots, Tensor? read_slots=None, Tensor? write_slots=None, "
      "Tensor? has_initial_state=None, Tensor? snapshot_offsets=None, Tensor? snapshot_tokens=None, "
      "Tensor? snapshot_slots=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(la2_check, CompositeExplicitAutograd, m) {
  m.impl("slots", TORCH_BOX(&slots));
  m.impl("seq_offsets", TORCH_BOX(&seq_offsets));
  m.impl("slopes", TORCH_BOX(&slopes));
  m.impl("counts", TORCH_BOX(&counts));
  m.impl("requests", TORCH_BOX(&requests));
}
