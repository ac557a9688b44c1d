// The Python module _C: the C interface with integers for pointers. It knows neither torch nor
// CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "bindings.h"
#include "eager_calls.h"
#include "hopper_attention/abi.h"
#include "prepared.h"

namespace py = pybind11;

namespace {

using Strides = std::array<std::int64_t, 3>;  // elements: batch, sequence, head

hopper_attention_forward_args describe(int dtype, int batch, int seqlen_q, int seqlen_k, int heads,
                                       int heads_kv, int head_dim, int head_dim_v, const Strides& q,
                                       const Strides& k, const Strides& v, const Strides& out,
                                       float softmax_scale, float softcap, bool causal,
                                       int window_left, int window_right, int sm_margin) {
  hopper_attention_forward_args args{};
  args.q_stride_batch = q[0], args.q_stride_seq = q[1], args.q_stride_head = q[2];
  args.k_stride_batch = k[0], args.k_stride_seq = k[1], args.k_stride_head = k[2];
  args.v_stride_batch = v[0], args.v_stride_seq = v[1], args.v_stride_head = v[2];
  args.out_stride_batch = out[0], args.out_stride_seq = out[1], args.out_stride_head = out[2];
  set_problem(&args, dtype, batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v,
              softmax_scale, softcap, causal, window_left, window_right);
  args.sm_margin = sm_margin;
  return args;
}

struct ForwardCall {
  using Args = hopper_attention_forward_args;
  static constexpr Py_ssize_t kNumAddresses = 8;
  static constexpr const char* kName = "prepared_forward";
  static constexpr const char* kDoc =
      "Enqueue the forward kernel: q, k, v, out, lse, workspace, stream, sink (0: none).";

  static void set_addresses(const Pointer (&addresses)[kNumAddresses], Args* args) {
    args->q = reinterpret_cast<const void*>(addresses[0]);
    args->k = reinterpret_cast<const void*>(addresses[1]);
    args->v = reinterpret_cast<const void*>(addresses[2]);
    args->out = reinterpret_cast<void*>(addresses[3]);
    args->lse = reinterpret_cast<float*>(addresses[4]);
    args->workspace = reinterpret_cast<void*>(addresses[5]);
    args->stream = reinterpret_cast<void*>(addresses[6]);
    args->sink = reinterpret_cast<const float*>(addresses[7]);
  }
  static hopper_attention_status run(const Args* args) { return hopper_attention_forward(args); }
};

template <class... Shape>
void forward(Pointer q, Pointer k, Pointer v, Pointer out, Pointer lse, Pointer workspace,
             Pointer stream, Pointer sink, Shape... shape) {
  hopper_attention_forward_args args = describe(shape...);
  ForwardCall::set_addresses({q, k, v, out, lse, workspace, stream, sink}, &args);
  raise_on_failure(hopper_attention_forward(&args));
}

template <class... Shape>
py::object prepare(Shape... shape) {
  return make_prepared<ForwardCall>(describe(shape...));
}

template <class... Shape>
std::string explain_forward(Shape... shape) {
  return explanation(describe(shape...));
}

// Binds the functions with the parameters of `describe`, which is the one place that lists them.
template <class... Shape>
void bind(py::module_& module, hopper_attention_forward_args (*)(Shape...)) {
  module.def("forward", &forward<Shape...>, "Enqueue the forward kernel; see abi.h.");
  module.def("prepare", &prepare<Shape...>, "forward's arguments after the sink; what is left.");
  module.def("explain_forward", &explain_forward<Shape...>, "JSON: how a call would run.");
}

void bind_call_tables(py::module_& module) {
  for (PyMethodDef& definition : kCallTableFunctions) {
    PyObject* const function = PyCFunction_New(&definition, nullptr);
    if (function == nullptr) throw py::error_already_set();
    module.attr(definition.ml_name) = py::reinterpret_steal<py::object>(function);
  }
}

std::vector<std::string> instances() {
  std::vector<std::string> names;
  for (const char* listed : {hopper_attention_instances(), hopper_attention_backward_instances()}) {
    std::istringstream lines(listed);
    for (std::string line; std::getline(lines, line);) names.push_back(line);
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C interface of libhopper_attention, with integers for pointers.";
  bind(module, &describe);
  module.def("workspace_bytes", &hopper_attention_forward_workspace_bytes);
  bind_backward(module);
  bind_quantize(module);
  bind_forward_fp8(module);
  bind_varlen(module);
  bind_call_tables(module);
  module.def("version", &hopper_attention_version);
  module.def("instances", &instances);
}
