// The FP8 forward's part of the Python module _C.
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "bindings.h"
#include "hopper_attention/abi.h"
#include "prepared.h"

namespace py = pybind11;

namespace {

// (batch, seq, head) of q, k, v, out; then (batch, head) of q_descale, k_descale, (batch, head,
// channel) of v_descale, (batch, head) of v_token_factor
using Longs = std::array<std::int64_t, 21>;
// batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v, causal, window_left,
// window_right, sm_margin, out_dtype, accumulation, v_transposed, q_descale_tokens,
// k_descale_tokens, q_descale_per_kv
using Ints = std::array<std::int32_t, 17>;

void set_longs(hopper_attention_forward_args& args, const Longs& n) {
  args.q_stride_batch = n[0], args.q_stride_seq = n[1], args.q_stride_head = n[2];
  args.k_stride_batch = n[3], args.k_stride_seq = n[4], args.k_stride_head = n[5];
  args.v_stride_batch = n[6], args.v_stride_seq = n[7], args.v_stride_head = n[8];
  args.out_stride_batch = n[9], args.out_stride_seq = n[10], args.out_stride_head = n[11];
  args.q_descale_stride_batch = n[12], args.q_descale_stride_head = n[13];
  args.k_descale_stride_batch = n[14], args.k_descale_stride_head = n[15];
  args.v_descale_stride_batch = n[16], args.v_descale_stride_head = n[17];
  args.v_descale_stride_channel = n[18];
  args.v_token_factor_stride_batch = n[19], args.v_token_factor_stride_head = n[20];
}

void set_ints(hopper_attention_forward_args& args, const Ints& n) {
  args.dtype = HOPPER_ATTENTION_E4M3;
  args.batch = n[0], args.seqlen_q = n[1], args.seqlen_k = n[2];
  args.heads = n[3], args.heads_kv = n[4], args.head_dim = n[5], args.head_dim_v = n[6];
  args.causal = n[7], args.window_left = n[8], args.window_right = n[9], args.sm_margin = n[10];
  args.out_dtype = n[11], args.accumulation = n[12], args.v_transposed = n[13];
  args.q_descale_tokens = n[14], args.k_descale_tokens = n[15], args.q_descale_per_kv = n[16];
}

hopper_attention_forward_args describe(const Longs& longs, const Ints& ints, float softmax_scale,
                                       float softcap) {
  hopper_attention_forward_args args{};
  args.struct_size = sizeof(args);
  set_longs(args, longs);
  set_ints(args, ints);
  args.softmax_scale = softmax_scale;
  args.softcap = softcap;
  return args;
}

struct Fp8Call {
  using Args = hopper_attention_forward_args;
  static constexpr Py_ssize_t kNumAddresses = 12;
  static constexpr const char* kName = "prepared_forward_fp8";
  static constexpr const char* kDoc =
      "Enqueue the e4m3 forward kernel: q, k, v, q_descale, k_descale, v_descale, v_token_factor "
      "(0: none), out, lse, workspace, stream, sink (0: none).";

  static void set_addresses(const Pointer (&addresses)[kNumAddresses], Args* args) {
    const auto floats = [&](int i) { return reinterpret_cast<const float*>(addresses[i]); };
    args->q = reinterpret_cast<const void*>(addresses[0]);
    args->k = reinterpret_cast<const void*>(addresses[1]);
    args->v = reinterpret_cast<const void*>(addresses[2]);
    args->q_descale = floats(3), args->k_descale = floats(4), args->v_descale = floats(5);
    args->v_token_factor = floats(6);
    args->out = reinterpret_cast<void*>(addresses[7]);
    args->lse = reinterpret_cast<float*>(addresses[8]);
    args->workspace = reinterpret_cast<void*>(addresses[9]);
    args->stream = reinterpret_cast<void*>(addresses[10]);
    args->sink = floats(11);
  }
  static hopper_attention_status run(const Args* args) { return hopper_attention_forward(args); }
};

py::object prepare(const Longs& longs, const Ints& ints, float softmax_scale, float softcap) {
  return make_prepared<Fp8Call>(describe(longs, ints, softmax_scale, softcap));
}

std::string explain(const Longs& longs, const Ints& ints, float softmax_scale, float softcap) {
  return explanation(describe(longs, ints, softmax_scale, softcap));
}

}  // namespace

void bind_forward_fp8(pybind11::module_& module) {
  module.def("prepare_fp8", &prepare, "Of a call of the e4m3 forward: what takes the addresses.");
  module.def("explain_forward_fp8", &explain, "JSON: how an e4m3 call would run.");
}
