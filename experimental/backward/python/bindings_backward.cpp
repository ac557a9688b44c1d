// The backward pass's part of the Python module _C.
#include "bindings_backward.h"

#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/stl.h>

#include "hopper_attention/abi.h"

namespace py = pybind11;

namespace {

using Pointer = std::uintptr_t;
using Strides = std::array<std::int64_t, 3>;  // elements: batch, sequence, head

void raise_on_failure(hopper_attention_status status) {
  if (status == HOPPER_ATTENTION_OK) return;
  const std::string message = hopper_attention_last_error();
  if (status == HOPPER_ATTENTION_INVALID_ARGUMENT) throw py::value_error(message);
  if (status == HOPPER_ATTENTION_NOT_SUPPORTED) {
    PyErr_SetString(PyExc_NotImplementedError, message.c_str());
    throw py::error_already_set();
  }
  throw std::runtime_error(message);
}

hopper_attention_backward_args describe(int dtype, int batch, int seqlen_q, int seqlen_k, int heads,
                                        int heads_kv, int head_dim, int head_dim_v,
                                        float softmax_scale, float softcap, bool causal,
                                        int window_left, int window_right, bool deterministic) {
  hopper_attention_backward_args args{};
  args.struct_size = sizeof(args);
  args.dtype = dtype;
  args.batch = batch;
  args.seqlen_q = seqlen_q;
  args.seqlen_k = seqlen_k;
  args.heads = heads;
  args.heads_kv = heads_kv;
  args.head_dim = head_dim;
  args.head_dim_v = head_dim_v;
  args.softmax_scale = softmax_scale;
  args.softcap = softcap;
  args.causal = causal;
  args.window_left = window_left;
  args.window_right = window_right;
  args.deterministic = deterministic;
  return args;
}

// pointers: q, k, v, out, dout, lse, dlse (0: absent), dq, dk, dv, workspace, stream.
// strides: of q, k, v, out, dout, dq, dk, dv.
template <class... Shape>
void backward(const std::array<Pointer, 12>& pointers, const std::array<Strides, 8>& strides,
              Shape... shape) {
  hopper_attention_backward_args args = describe(shape...);
  args.q = reinterpret_cast<const void*>(pointers[0]);
  args.k = reinterpret_cast<const void*>(pointers[1]);
  args.v = reinterpret_cast<const void*>(pointers[2]);
  args.out = reinterpret_cast<const void*>(pointers[3]);
  args.dout = reinterpret_cast<const void*>(pointers[4]);
  args.lse = reinterpret_cast<const float*>(pointers[5]);
  args.dlse = reinterpret_cast<const float*>(pointers[6]);
  args.dq = reinterpret_cast<void*>(pointers[7]);
  args.dk = reinterpret_cast<void*>(pointers[8]);
  args.dv = reinterpret_cast<void*>(pointers[9]);
  args.workspace = reinterpret_cast<void*>(pointers[10]);
  args.stream = reinterpret_cast<void*>(pointers[11]);
  std::int64_t* const fields[][3] = {
      {&args.q_stride_batch, &args.q_stride_seq, &args.q_stride_head},
      {&args.k_stride_batch, &args.k_stride_seq, &args.k_stride_head},
      {&args.v_stride_batch, &args.v_stride_seq, &args.v_stride_head},
      {&args.out_stride_batch, &args.out_stride_seq, &args.out_stride_head},
      {&args.dout_stride_batch, &args.dout_stride_seq, &args.dout_stride_head},
      {&args.dq_stride_batch, &args.dq_stride_seq, &args.dq_stride_head},
      {&args.dk_stride_batch, &args.dk_stride_seq, &args.dk_stride_head},
      {&args.dv_stride_batch, &args.dv_stride_seq, &args.dv_stride_head}};
  for (int tensor = 0; tensor < 8; ++tensor) {
    for (int dim = 0; dim < 3; ++dim) *fields[tensor][dim] = strides[tensor][dim];
  }
  raise_on_failure(hopper_attention_backward(&args));
}

template <class... Shape>
std::uint64_t workspace_bytes(Shape... shape) {
  const hopper_attention_backward_args args = describe(shape...);
  std::uint64_t bytes = 0;
  raise_on_failure(hopper_attention_backward_workspace_bytes(&args, &bytes));
  return bytes;
}

// Binds both functions with the parameters of `describe`, which is the one place that lists them.
template <class... Shape>
void bind(py::module_& module, hopper_attention_backward_args (*)(Shape...)) {
  module.def("backward", &backward<Shape...>, "Enqueue the backward kernels; see abi_backward.h.");
  module.def("backward_workspace_bytes", &workspace_bytes<Shape...>,
             "Bytes of workspace for a call of backward.");
}

std::vector<std::string> instances() {
  std::istringstream lines(hopper_attention_backward_instances());
  std::vector<std::string> names;
  for (std::string line; std::getline(lines, line);) names.push_back(line);
  return names;
}

}  // namespace

void bind_backward(py::module_& module) {
  bind(module, &describe);
  module.def("backward_instances", &instances);
}
