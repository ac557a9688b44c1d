// The backward pass's part of the Python module _C.
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "bindings.h"
#include "hopper_attention/abi.h"
#include "prepared.h"

namespace py = pybind11;

namespace {

using Strides = std::array<std::int64_t, 3>;        // elements: batch, sequence, head
using PackedStrides = std::array<std::int64_t, 2>;  // elements: row, head
// Of q, k, v, out, dout, dq, dk, dv.
using AllStrides = std::array<Strides, 8>;
using AllPackedStrides = std::array<PackedStrides, 8>;

void set_strides(hopper_attention_backward_args& args, const AllStrides& strides) {
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
}

hopper_attention_backward_args describe(int dtype, int batch, int seqlen_q, int seqlen_k, int heads,
                                        int heads_kv, int head_dim, int head_dim_v,
                                        const AllStrides& strides, float softmax_scale,
                                        float softcap, bool causal, int window_left,
                                        int window_right, bool deterministic) {
  hopper_attention_backward_args args{};
  set_strides(args, strides);
  set_problem(&args, dtype, batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v,
              softmax_scale, softcap, causal, window_left, window_right);
  args.deterministic = deterministic;
  return args;
}

hopper_attention_backward_args describe_varlen(int dtype, int batch, int total_q, int total_k,
                                               int heads, int heads_kv, int head_dim,
                                               int head_dim_v, const AllPackedStrides& strides,
                                               float softmax_scale, float softcap, bool causal,
                                               int window_left, int window_right,
                                               bool deterministic) {
  AllStrides of_one_batch{};
  for (int tensor = 0; tensor < 8; ++tensor) {
    of_one_batch[tensor] = {0, strides[tensor][0], strides[tensor][1]};
  }
  hopper_attention_backward_args args =
      describe(dtype, batch, total_q, total_k, heads, heads_kv, head_dim, head_dim_v, of_one_batch,
               softmax_scale, softcap, causal, window_left, window_right, deterministic);
  args.packed = 1;
  return args;
}

// What both calls begin with.
constexpr Py_ssize_t kNumCommon = 12;

void set_common(const Pointer* addresses, hopper_attention_backward_args* args) {
  args->q = reinterpret_cast<const void*>(addresses[0]);
  args->k = reinterpret_cast<const void*>(addresses[1]);
  args->v = reinterpret_cast<const void*>(addresses[2]);
  args->out = reinterpret_cast<const void*>(addresses[3]);
  args->dout = reinterpret_cast<const void*>(addresses[4]);
  args->lse = reinterpret_cast<const float*>(addresses[5]);
  args->dlse = reinterpret_cast<const float*>(addresses[6]);
  args->dq = reinterpret_cast<void*>(addresses[7]);
  args->dk = reinterpret_cast<void*>(addresses[8]);
  args->dv = reinterpret_cast<void*>(addresses[9]);
  args->workspace = reinterpret_cast<void*>(addresses[10]);
  args->stream = reinterpret_cast<void*>(addresses[11]);
}

struct BackwardCall {
  using Args = hopper_attention_backward_args;
  static constexpr Py_ssize_t kNumAddresses = kNumCommon + 2;
  static constexpr const char* kName = "prepared_backward";
  static constexpr const char* kDoc =
      "Enqueue the backward kernels: q, k, v, out, dout, lse, dlse (0: none), dq, dk, dv, "
      "workspace, stream, sink, dsink (0: none).";

  static void set_addresses(const Pointer (&addresses)[kNumAddresses], Args* args) {
    set_common(addresses, args);
    args->sink = reinterpret_cast<const float*>(addresses[kNumCommon]);
    args->dsink = reinterpret_cast<float*>(addresses[kNumCommon + 1]);
  }
  static hopper_attention_status run(const Args* args) { return hopper_attention_backward(args); }
};

struct VarlenBackwardCall {
  using Args = hopper_attention_backward_args;
  static constexpr Py_ssize_t kNumAddresses = kNumCommon + 4;
  static constexpr const char* kName = "prepared_varlen_backward";
  static constexpr const char* kDoc =
      "Enqueue the backward kernels of a packed batch: q, k, v, out, dout, lse, dlse (0: none), "
      "dq, dk, dv, workspace, stream, cu_seqlens_q, cu_seqlens_k, seqused_q and seqused_k (0: "
      "none).";

  static void set_addresses(const Pointer (&addresses)[kNumAddresses], Args* args) {
    set_common(addresses, args);
    args->cu_seqlens_q = reinterpret_cast<const std::int32_t*>(addresses[kNumCommon]);
    args->cu_seqlens_k = reinterpret_cast<const std::int32_t*>(addresses[kNumCommon + 1]);
    args->seqused_q = reinterpret_cast<const std::int32_t*>(addresses[kNumCommon + 2]);
    args->seqused_k = reinterpret_cast<const std::int32_t*>(addresses[kNumCommon + 3]);
  }
  static hopper_attention_status run(const Args* args) { return hopper_attention_backward(args); }
};

// The call, and the bytes of workspace that it needs.
template <class Call>
py::tuple prepare(const hopper_attention_backward_args& args) {
  std::uint64_t bytes = 0;
  raise_on_failure(hopper_attention_backward_workspace_bytes(&args, &bytes));
  return py::make_tuple(make_prepared<Call>(args), bytes);
}

// Binds it with the parameters of `describe`, which is the one place that lists them.
template <class Call, class... Shape>
void bind(py::module_& module, const char* name, const char* doc,
          hopper_attention_backward_args (*describe)(Shape...)) {
  module.def(name, [describe](Shape... shape) { return prepare<Call>(describe(shape...)); }, doc);
}

}  // namespace

void bind_backward(py::module_& module) {
  bind<BackwardCall>(
      module, "prepare_backward",
      "Of a call of the backward pass: what takes the addresses, and its workspace's bytes.",
      &describe);
  bind<VarlenBackwardCall>(module, "prepare_varlen_backward",
                           "Likewise of the backward pass of a packed batch.", &describe_varlen);
}
