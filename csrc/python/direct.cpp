// la2::decode by the shortest way: from Python's arguments straight to the launch, past torch's dispatcher, which takes
// a third of the host's time for one small step, and half under no_grad. Tensors are seen through DLPack's C exchange
// API. Only the plain case goes this way; everything else, everything wrong included, is declined, and the caller goes
// by torch.ops.la2.decode (python/lightning_attn2_ext/_direct.py).
//
// CPython's limited API, so that one build serves every version from 3.10 on.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
//
#include <ATen/dlpack.h>

#include <initializer_list>

#include "../ops/direct.h"

namespace la2::python {
namespace {

// An op library's part of it.
struct Library {
  ops::DecodeIsPlain is_plain = nullptr;
  ops::DecodeDirectly decode = nullptr;
};

// What `setup` is given.
struct {
  const DLPackExchangeAPI* dlpack = nullptr;
  PyTypeObject* tensor = nullptr;
  PyObject* guards = nullptr;  // a tuple of functions: a true answer of any means that torch wants to see the call
  PyObject *in_inference_mode = nullptr, *is_grad_enabled = nullptr, *is_inference = nullptr;
  PyObject* increment_version = nullptr;
  PyObject* empty_like = nullptr;
  PyObject* contiguous = nullptr;  // keyword arguments of empty_like
  PyObject* requires_grad = nullptr;
  PyObject* is_neg = nullptr;
  Library cpu, cuda;
} torch_api;

// A reference that is given back.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {}
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* const object = object_;
    object_ = nullptr;
    return object;
  }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

bool is_true(const Owned& answer) { return !answer || PyObject_IsTrue(answer.get()) != 0; }

// A tensor as DLPack shows it, until its owner changes: of torch's own class, with memory, and with as many dimensions.
// Its strides count elements.
struct View : DLTensor {
  bool take(PyObject* object, int32_t rank) {
    return Py_TYPE(object) == torch_api.tensor &&
           torch_api.dlpack->dltensor_from_py_object_no_sync(object, this) == 0 && data != nullptr && ndim == rank &&
           strides != nullptr;
  }
  bool has_type(uint8_t code, uint8_t bits) const {
    return dtype.code == code && dtype.bits == bits && dtype.lanes == 1;
  }
  bool is_contiguous() const { return strides[2] == 1 && strides[1] == shape[2] && strides[0] == shape[1] * shape[2]; }
  bool is_like(const View& t) const {
    return device.device_type == t.device.device_type && device.device_id == t.device.device_id;
  }
  char* at_first() const { return static_cast<char*>(data) + byte_offset; }
  // As csrc/ops/arguments.cpp wants the rows of q, k and v: with unit stride, and aligned.
  bool has_readable_rows() const {
    if (strides[2] != 1) return false;
    if (dtype.bits != 16) return true;
    auto is_aligned = [&](int dim) { return shape[dim] == 1 || strides[dim] % 8 == 0; };
    return reinterpret_cast<uintptr_t>(at_first()) % 16 == 0 && is_aligned(0) && is_aligned(1);
  }
  Rows rows() const { return {at_first(), strides[0], strides[1], 0}; }
};

bool dtype_of(const View& t, DType* dtype) {
  if (t.has_type(kDLBfloat, 16)) return *dtype = DType::kBFloat16, true;
  if (t.has_type(kDLFloat, 16)) return *dtype = DType::kFloat16, true;
  if (t.has_type(kDLFloat, 32)) return *dtype = DType::kFloat32, true;
  return false;
}

bool is_head_dim(int64_t dim) { return dim > 0 && dim % 8 == 0 && dim <= 256; }

// Whether t is to be negated when it is read, as the imaginary part of a conjugate is: of that DLPack says nothing.
bool is_negated(PyObject* t) {
  return t != Py_None && is_true(Owned(PyObject_CallFunctionObjArgs(torch_api.is_neg, t, nullptr)));
}

// The tensors of a call.
struct Decode {
  PyObject *q, *k, *v, *state, *slope, *state_indices;
  View q_view;
  bool v_is_contiguous;
  RecurrentParams params = {};

  // Whether the call is a plain one. The rules are those of csrc/ops/arguments.cpp.
  bool fill(double scale, long silu) {
    RecurrentParams& p = params;
    View k_view, v_view, pool;
    if (!q_view.take(q, 3) || !k_view.take(k, 3) || !v_view.take(v, 3) || !pool.take(state, 4)) return false;
    if (!dtype_of(q_view, &p.dtype) || silu < 0 || silu > (kSiluQ | kSiluK | kSiluV)) return false;
    p.rows = q_view.shape[0], p.heads = q_view.shape[1], p.dim_k = q_view.shape[2], p.dim_v = v_view.shape[2];
    p.tokens = 1, p.scale = scale, p.silu = static_cast<int32_t>(silu), p.writes_state = true;
    if (p.rows < 1 || p.heads < 1 || !is_head_dim(p.dim_k) || !is_head_dim(p.dim_v)) return false;
    if (k_view.shape[2] != p.dim_k) return false;
    for (const View* t : {&k_view, &v_view})
      if (t->shape[0] != p.rows || t->shape[1] != p.heads || !t->is_like(q_view) ||
          !t->has_type(q_view.dtype.code, q_view.dtype.bits))
        return false;
    for (const View* t : {&q_view, &k_view, &v_view})
      if (!t->has_readable_rows()) return false;
    v_is_contiguous = v_view.is_contiguous();
    p.q = q_view.rows(), p.k = k_view.rows(), p.v = v_view.rows();
    if (!fill_state(pool) || !fill_slope() || !fill_indices()) return false;
    // There is no complex number of two bfloat16.
    if (p.dtype != DType::kBFloat16 && (is_negated(q) || is_negated(k) || is_negated(v))) return false;
    return !is_negated(slope) && (pool.dtype.bits == 16 || !is_negated(state));
  }

 private:
  bool fill_state(const View& pool) {
    RecurrentParams& p = params;
    const bool is_bf16 = pool.has_type(kDLBfloat, 16);
    if (!is_bf16 && !pool.has_type(kDLFloat, 32)) return false;
    if (pool.shape[1] != p.heads || pool.shape[2] != p.dim_k || pool.shape[3] != p.dim_v || !pool.is_like(q_view))
      return false;
    if (pool.strides[2] != 1 && pool.strides[3] != 1) return false;
    for (int i = 0; i < 4; ++i)
      if (pool.strides[i] == 0) return false;
    p.state = {pool.at_first(), pool.strides[0], pool.strides[1], pool.strides[2], pool.strides[3], nullptr, is_bf16};
    p.slots = pool.shape[0];
    return true;
  }

  bool fill_slope() {
    params.slope = {};
    if (slope == Py_None) return true;
    View t;
    if (!t.take(slope, 1)) {
      if (PyErr_Occurred() || !t.take(slope, 2) || t.shape[0] != params.rows) return false;
    }
    const int last = t.ndim - 1;
    if (!t.has_type(kDLFloat, 32) || t.shape[last] != params.heads || t.strides[last] != 1 || !t.is_like(q_view))
      return false;
    params.slope = {t.at_first(), last == 0 ? 0 : t.strides[0], 1};
    return true;
  }

  bool fill_indices() {
    params.state_indices = nullptr;
    if (state_indices == Py_None) return params.slots == params.rows;
    View t;
    if (!t.take(state_indices, 1) || t.shape[0] != params.rows || t.strides[0] != 1 || !t.is_like(q_view)) return false;
    params.indices_are_int64 = t.has_type(kDLInt, 64);
    if (!params.indices_are_int64 && !t.has_type(kDLInt, 32)) return false;
    params.state_indices = t.at_first();
    return true;
  }
};

// Where a gradient is asked for, or an inference tensor is changed outside of the mode, the operator has its say.
bool is_free_of_gradients(const Decode& call) {
  auto has_gradient = [](PyObject* t) {
    return t != Py_None && is_true(Owned(PyObject_GetAttr(t, torch_api.requires_grad)));
  };
  if (is_true(Owned(PyObject_CallNoArgs(torch_api.in_inference_mode)))) return !PyErr_Occurred();
  if (has_gradient(call.state)) return false;
  if (is_true(Owned(PyObject_CallFunctionObjArgs(torch_api.is_inference, call.state, nullptr)))) return false;
  if (!is_true(Owned(PyObject_CallNoArgs(torch_api.is_grad_enabled)))) return true;
  return !(has_gradient(call.q) || has_gradient(call.k) || has_gradient(call.v) || has_gradient(call.slope));
}

// The result, or nullptr where the call is declined, with or without a Python error.
PyObject* decode_or_decline(PyObject* const* args) {
  if (torch_api.dlpack == nullptr) return nullptr;
  Decode call{args[0], args[1], args[2], args[3], args[4], args[5], {}, false, {}};
  const double scale = PyFloat_AsDouble(args[6]);
  const long silu = PyLong_AsLong(args[7]);
  if (PyErr_Occurred() || !call.fill(scale, silu)) return nullptr;
  const int device_type = call.q_view.device.device_type, device = call.q_view.device.device_id;
  if (device_type != kDLCUDA && device_type != kDLCPU) return nullptr;
  const Library& library = device_type == kDLCUDA ? torch_api.cuda : torch_api.cpu;
  if (library.decode == nullptr || !library.is_plain(&call.params, sizeof(call.params), device)) return nullptr;
  const Py_ssize_t guards = PyTuple_Size(torch_api.guards);
  for (Py_ssize_t i = 0; i < guards; ++i)
    if (is_true(Owned(PyObject_CallNoArgs(PyTuple_GetItem(torch_api.guards, i))))) return nullptr;
  if (!is_free_of_gradients(call)) return nullptr;
  void* stream = nullptr;
  if (torch_api.dlpack->current_work_stream(call.q_view.device.device_type, device, &stream) != 0) return nullptr;

  const Owned like(PyTuple_Pack(1, call.v));
  if (!like) return nullptr;
  Owned out(PyObject_Call(torch_api.empty_like, like.get(), call.v_is_contiguous ? nullptr : torch_api.contiguous));
  View out_view;
  if (!out || !out_view.take(out.get(), 3)) return nullptr;
  call.params.out = {out_view.at_first(), out_view.strides[0], out_view.strides[1], 0};
  // A graph that has saved the state may not run backward afterwards.
  const Owned states(PyTuple_Pack(1, call.state));
  if (!states || !Owned(PyObject_CallFunctionObjArgs(torch_api.increment_version, states.get(), nullptr)))
    return nullptr;

  PyThreadState* const thread = PyEval_SaveThread();
  const bool is_done = library.decode(&call.params, device, stream);
  PyEval_RestoreThread(thread);
  return is_done ? out.release() : nullptr;
}

PyObject* decode(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 8) {
    PyErr_SetString(PyExc_TypeError, "decode: expected q, k, v, state, slope, state_indices, scale, silu");
    return nullptr;
  }
  PyObject* const out = decode_or_decline(args);
  if (out != nullptr) return out;
  PyErr_Clear();
  Py_RETURN_NONE;
}

Library library_of(PyObject* is_plain, PyObject* decode) {
  return {reinterpret_cast<ops::DecodeIsPlain>(PyLong_AsVoidPtr(is_plain)),
          reinterpret_cast<ops::DecodeDirectly>(PyLong_AsVoidPtr(decode))};
}

PyObject* setup(PyObject*, PyObject* args) {
  PyObject *capsule, *cpu[2], *cuda[2];
  if (!PyArg_ParseTuple(args, "OOOOOOOOOO(OO)(OO)", &capsule, &torch_api.tensor, &torch_api.guards,
                        &torch_api.in_inference_mode, &torch_api.is_grad_enabled, &torch_api.is_inference,
                        &torch_api.is_neg, &torch_api.increment_version, &torch_api.empty_like, &torch_api.contiguous,
                        &cpu[0], &cpu[1], &cuda[0], &cuda[1]))
    return nullptr;
  auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api == nullptr) return nullptr;
  if (api->header.version.major != DLPACK_MAJOR_VERSION || api->dltensor_from_py_object_no_sync == nullptr) {
    PyErr_Format(PyExc_ImportError, "DLPack is version %u, expected %d", api->header.version.major,
                 DLPACK_MAJOR_VERSION);
    return nullptr;
  }
  torch_api.cpu = library_of(cpu[0], cpu[1]);
  torch_api.cuda = library_of(cuda[0], cuda[1]);
  torch_api.requires_grad = PyUnicode_InternFromString("requires_grad");
  if (PyErr_Occurred()) return nullptr;
  Py_INCREF(args);  // and with it all that it holds, for as long as the process lives
  torch_api.dlpack = api;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"setup", setup, METH_VARARGS, "What of torch is used, and where the op libraries do it (_direct.py)."},
    {"decode", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(decode)), METH_FASTCALL,
     "The result of la2::decode, or None where the call was declined."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_direct_calls",
                      "Operators past the dispatcher.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace
}  // namespace la2::python

PyMODINIT_FUNC PyInit__direct_calls() { return PyModule_Create(&la2::python::module); }
