// csrc/core as a Python module, for the property tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

#include "core/decay.h"
#include "core/division.h"
#include "core/plan.h"

namespace py = pybind11;

namespace {

void raise_if(const la2::Status& status) {
  if (!status.is_ok()) throw std::invalid_argument(status.message());
}

la2::Problem problem(const std::string& text) {
  la2::Problem problem;
  raise_if(la2::parse_problem(text, &problem));
  return problem;
}

la2::DeviceProps device(const std::string& text) {
  la2::DeviceProps device;
  raise_if(la2::parse_device(text, &device));
  return device;
}

la2::Plan plan(const la2::Problem& problem, const la2::DeviceProps& device, const std::string& forced) {
  la2::Plan plan;
  raise_if(la2::make_plan(problem, device, forced, &plan));
  return plan;
}

la2::Plan recalled_plan(const la2::Problem& problem, const la2::DeviceProps& device, const std::string& forced) {
  la2::Plan plan;
  raise_if(la2::recall_plan(problem, device, forced, &plan));
  return plan;
}

}  // namespace

PYBIND11_MODULE(la2_core, m) {
  py::enum_<la2::DType>(m, "DType")
      .value("fp32", la2::DType::kFloat32)
      .value("bf16", la2::DType::kBFloat16)
      .value("fp16", la2::DType::kFloat16)
      .value("fp64", la2::DType::kFloat64);
  py::enum_<la2::Family>(m, "Family")
      .value("simt", la2::Family::kSimt)
      .value("sm80", la2::Family::kSm80)
      .value("sm90", la2::Family::kSm90);
  py::class_<la2::Problem>(m, "Problem")
      .def(py::init<>())
      .def_readwrite("backward", &la2::Problem::backward)
      .def_readwrite("dtype", &la2::Problem::dtype)
      .def_readwrite("batch", &la2::Problem::batch)
      .def_readwrite("heads", &la2::Problem::heads)
      .def_readwrite("length", &la2::Problem::length)
      .def_readwrite("dim_k", &la2::Problem::dim_k)
      .def_readwrite("dim_v", &la2::Problem::dim_v)
      .def_readwrite("num_seqs", &la2::Problem::num_seqs)
      .def_readwrite("packed", &la2::Problem::packed)
      .def_readwrite("slope_grad", &la2::Problem::slope_grad)
      .def_readwrite("is_extend", &la2::Problem::is_extend)
      .def_readwrite("silu", &la2::Problem::silu)
      .def_readwrite("mappable", &la2::Problem::mappable);
  py::class_<la2::DeviceProps>(m, "DeviceProps")
      .def(py::init<>())
      .def_readwrite("compute_capability", &la2::DeviceProps::compute_capability)
      .def_readwrite("num_sms", &la2::DeviceProps::num_sms)
      .def_readwrite("shared_per_block", &la2::DeviceProps::shared_per_block)
      .def_readwrite("shared_per_sm", &la2::DeviceProps::shared_per_sm);
  py::class_<la2::Tile>(m, "Tile")
      .def_readonly("tile_a", &la2::Tile::tile_a)
      .def_readonly("slice", &la2::Tile::slice)
      .def_readonly("chunk", &la2::Tile::chunk);
  py::class_<la2::Plan>(m, "Plan")
      .def_readonly("family", &la2::Plan::family)
      .def_readonly("is_fused", &la2::Plan::is_fused)
      .def_readonly("takes_silu", &la2::Plan::takes_silu)
      .def_readonly("in_one_pass", &la2::Plan::in_one_pass)
      .def_readonly("segment_len", &la2::Plan::segment_len)
      .def_readonly("num_segments", &la2::Plan::num_segments)
      .def_readonly("num_units", &la2::Plan::num_units)
      .def_readonly("local_states", &la2::Plan::local_states)
      .def_readonly("num_pieces", &la2::Plan::num_pieces)
      .def_readonly("piece_chunks", &la2::Plan::piece_chunks)
      .def_readonly("lanes", &la2::Plan::lanes)
      .def_readonly("item_tokens", &la2::Plan::item_tokens)
      .def_readonly("cuts_if_it_gains", &la2::Plan::cuts_if_it_gains)
      .def_readonly("pass_tokens", &la2::Plan::pass_tokens)
      .def_readonly("dot_floats", &la2::Plan::dot_floats)
      .def_readonly("predicted_us", &la2::Plan::predicted_us)
      .def_property_readonly("max_blocks",
                             [](const la2::Plan& p) { return std::make_tuple(p.max_blocks[0], p.max_blocks[1]); })
      .def_property_readonly("state_tiles",
                             [](const la2::Plan& p) { return std::make_tuple(p.state_tiles[0], p.state_tiles[1]); })
      .def_property_readonly("state_floats",
                             [](const la2::Plan& p) { return std::make_tuple(p.state_floats[0], p.state_floats[1]); })
      .def_property_readonly("tiles", [](const la2::Plan& p) {
        py::list tiles;
        for (int i = 0; i < p.num_launches; ++i) tiles.append(p.tiles[i]);
        return tiles;
      });
  m.def("problem", &problem);
  m.def("device", &device);
  m.def("plan", &plan, py::arg("problem"), py::arg("device"), py::arg("forced") = "");
  m.def("recalled_plan", &recalled_plan, py::arg("problem"), py::arg("device"), py::arg("forced") = "");
  m.def("describe", &la2::describe);
  m.def("quotient", [](int64_t n, int64_t divisor) { return la2::Division::by(divisor).quotient(n); });
  m.def("rounded_decay_power", [](float slope, int32_t n) { return la2::rounded_decay_power(slope, n); });
  m.def("sm80_shared_bytes", [](int tile_a, int slice, int chunk, bool slope_grad) {
    return la2::sm80_shared_bytes({tile_a, slice, chunk}, slope_grad);
  });
}
