// RMSNorm and gate behind decode (params.h: GatedNormParams). A job is a row.
#pragma once

#include "work.h"

namespace la2::cpu {
namespace {

inline float sigmoid(float x) { return 1.f / (1.f + __builtin_expf(-x)); }
inline double sigmoid(double x) { return 1. / (1. + __builtin_exp(-x)); }

template <class S>
bool gated_norm(const GatedNormParams& p, const Parallel& parallel) {
  using T = typename S::Acc;
  using Element = typename S::Element;
  constexpr int W = kLanes<T>;
  const int width = static_cast<int>(p.width);
  auto run = [&](int64_t row, char*) {
    Element* const x = static_cast<Element*>(p.x) + row * p.width;
    const Element* const gate = static_cast<const Element*>(p.gate) + row * p.gate_stride;
    const Element* const weight = static_cast<const Element*>(p.weight);
    Vec<T> squares = {};
    for (int i = 0; i < width; i += W) {
      const Vec<T> value = load_elements<S>(x + i, is_half<T>(i, width));
      squares += value * value;
    }
    const double mean = sum_lanes(fold_to_double(squares)) / width;
    const T factor = static_cast<T>(1 / __builtin_sqrt(mean + p.eps));
    for (int i = 0; i < width; i += W) {
      const bool half = is_half<T>(i, width);
      Vec<T> open = load_elements<S>(gate + i, half);
      for (int lane = 0; lane < W; ++lane) open[lane] = sigmoid(static_cast<T>(open[lane]));
      const Vec<T> y = load_elements<S>(x + i, half) * factor * (load_elements<S>(weight + i, half) * open);
      store_elements<S>(x + i, y, half);
    }
  };
  constexpr double kCost = 16;  // in multiply-adds, of an element
  return run_jobs(parallel, p.rows, kCost * static_cast<double>(p.rows) * static_cast<double>(p.width), 0, run);
}

}  // namespace
}  // namespace la2::cpu
