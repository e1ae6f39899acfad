// The CPU kernels: one table of entry points for each instruction set, chosen once at load.
#pragma once

#include "../params.h"

namespace la2::cpu {

// Runs body(context, begin, end) over [0, count), split over the threads of the caller's pool. Supplied by
// csrc/ops (torch's pool), so that the kernels know nothing of torch.
struct Parallel {
  void (*run)(int64_t count, void (*body)(void* context, int64_t begin, int64_t end), void* context);
  int num_threads;
};

// Scratch memory is the kernels' own business (per thread, bounded, independent of N). The values behind
// cu_seqlens, state_indices and of extend were checked by the caller. False: no memory for the scratch, nothing was
// done.
struct Kernels {
  bool (*forward)(const ForwardParams&, const Parallel&);
  bool (*backward)(const BackwardParams&, const Parallel&);
  bool (*recurrent)(const RecurrentParams&, const Parallel&);
  bool (*extend)(const ExtendParams&, const Parallel&);
  bool (*gated_norm)(const GatedNormParams&, const Parallel&);
  const char* name;  // "baseline", "avx2", "avx512"
};

// The best table this machine can run; LA2_CPU=baseline|avx2|avx512 lowers the choice (for tests).
const Kernels& kernels();

}  // namespace la2::cpu
