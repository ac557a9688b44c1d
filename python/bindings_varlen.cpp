// Packed batches' part of the Python module _C.
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "bindings.h"
#include "hopper_attention/abi.h"
#include "prepared.h"

namespace py = pybind11;

namespace {

using Strides = std::array<std::int64_t, 2>;  // elements: row, head

hopper_attention_forward_args describe(int dtype, int batch, int total_q, int total_k, int heads,
                                       int heads_kv, int head_dim, int head_dim_v, const Strides& q,
                                       const Strides& k, const Strides& v, const Strides& out,
                                       float softmax_scale, float softcap, bool causal,
                                       int window_left, int window_right, int sm_margin) {
  hopper_attention_forward_args args{};
  args.packed = 1;
  args.q_stride_seq = q[0], args.q_stride_head = q[1];
  args.k_stride_seq = k[0], args.k_stride_head = k[1];
  args.v_stride_seq = v[0], args.v_stride_head = v[1];
  args.out_stride_seq = out[0], args.out_stride_head = out[1];
  set_problem(&args, dtype, batch, total_q, total_k, heads, heads_kv, head_dim, head_dim_v,
              softmax_scale, softcap, causal, window_left, window_right);
  args.sm_margin = sm_margin;
  return args;
}

struct VarlenCall {
  using Args = hopper_attention_forward_args;
  static constexpr Py_ssize_t kNumAddresses = 11;
  static constexpr const char* kName = "prepared_varlen";
  static constexpr const char* kDoc =
      "Enqueue the forward kernels of a packed batch: q, k, v, cu_seqlens_q, cu_seqlens_k, "
      "seqused_q and seqused_k (0: none), out, lse, workspace, stream.";

  static void set_addresses(const Pointer (&addresses)[kNumAddresses], Args* args) {
    args->q = reinterpret_cast<const void*>(addresses[0]);
    args->k = reinterpret_cast<const void*>(addresses[1]);
    args->v = reinterpret_cast<const void*>(addresses[2]);
    args->cu_seqlens_q = reinterpret_cast<const std::int32_t*>(addresses[3]);
    args->cu_seqlens_k = reinterpret_cast<const std::int32_t*>(addresses[4]);
    args->seqused_q = reinterpret_cast<const std::int32_t*>(addresses[5]);
    args->seqused_k = reinterpret_cast<const std::int32_t*>(addresses[6]);
    args->out = reinterpret_cast<void*>(addresses[7]);
    args->lse = reinterpret_cast<float*>(addresses[8]);
    args->workspace = reinterpret_cast<void*>(addresses[9]);
    args->stream = reinterpret_cast<void*>(addresses[10]);
  }
  static hopper_attention_status run(const Args* args) { return hopper_attention_forward(args); }
};

// The call, and the bytes of workspace that it needs.
template <class... Shape>
py::tuple prepare(Shape... shape) {
  const hopper_attention_forward_args args = describe(shape...);
  return py::make_tuple(make_prepared<VarlenCall>(args),
                        hopper_attention_packed_workspace_bytes(args.seqlen_q, args.batch));
}

template <class... Shape>
std::string explain(Shape... shape) {
  return explanation(describe(shape...));
}

// Binds the functions with the parameters of `describe`, which is the one place that lists them.
template <class... Shape>
void bind(py::module_& module, hopper_attention_forward_args (*)(Shape...)) {
  module.def("prepare_varlen", &prepare<Shape...>,
             "Of a call with a packed batch: what takes the addresses, and its workspace's bytes.");
  module.def("explain_varlen", &explain<Shape...>, "JSON: how such a call would run.");
}

}  // namespace

void bind_varlen(py::module_& module) { bind(module, &describe); }
