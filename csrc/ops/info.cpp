// What this library is: read by `python -m lightning_attn2_ext info` through ctypes.
#include <torch/headeronly/version.h>

#include <cstdio>

#include "../core/plan.h"
#include "../kernels/cpu/kernels.h"
#include "export.h"

#define LA2_TEXT_(x) #x
#define LA2_TEXT(x) LA2_TEXT_(x)

// One line of JSON.
LA2_EXPORT const char* la2_build_info() {
  return "{\"compiler\": \"" __VERSION__ "\", \"torch_headers\": \"" LA2_TEXT(TORCH_VERSION_MAJOR) "." LA2_TEXT(
      TORCH_VERSION_MINOR) "\", \"torch_target\": \"" LA2_TEXT(TORCH_TARGET_VERSION) "\"}";
}

// The instruction set whose kernels run: "avx512", "avx2" or "baseline".
LA2_EXPORT const char* la2_cpu_kernels() { return la2::cpu::kernels().name; }

// How a GPU would be used: problem "B,H,N,D,E,dtype[,backward][,dslope][,packed=NUM_SEQS]", device "sm_90x132" (compute
// capability, multiprocessors). Writes the plan's line (LA2_PLAN is heeded), or the reason why there is none, and
// returns 0 or 1.
LA2_EXPORT int la2_plan_line(const char* problem_text, const char* device_text, char* out, size_t size) {
  la2::Problem problem;
  la2::DeviceProps device;
  la2::Plan plan;
  la2::Status status = la2::parse_problem(problem_text, &problem);
  if (status.is_ok()) status = la2::parse_device(device_text, &device);
  if (status.is_ok()) {
    const char* forced = std::getenv("LA2_PLAN");
    status = la2::make_plan(problem, device, forced ? forced : "", &plan);
  }
  const std::string line = status.is_ok() ? la2::describe(problem, device, plan) : status.message();
  std::snprintf(out, size, "%s", line.c_str());
  return status.is_ok() ? 0 : 1;
}
