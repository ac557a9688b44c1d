// The FP8 forward's part of the Python module _C.
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "bindings.h"
#include "hopper_attention/abi.h"

namespace {

using Pointer = std::uintptr_t;
// q, k, v, out, lse, q_descale, k_descale, v_descale, v_token_factor, sink; 0 is null
using Pointers = std::array<Pointer, 10>;
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

hopper_attention_forward_args describe(const Pointers& pointers, const Longs& longs,
                                       const Ints& ints, float softmax_scale, float softcap) {
  const auto floats = [&](int i) { return reinterpret_cast<const float*>(pointers[i]); };
  hopper_attention_forward_args args{};
  args.struct_size = sizeof(args);
  args.q = reinterpret_cast<const void*>(pointers[0]);
  args.k = reinterpret_cast<const void*>(pointers[1]);
  args.v = reinterpret_cast<const void*>(pointers[2]);
  args.out = reinterpret_cast<void*>(pointers[3]);
  args.lse = reinterpret_cast<float*>(pointers[4]);
  args.q_descale = floats(5), args.k_descale = floats(6), args.v_descale = floats(7);
  args.v_token_factor = floats(8);
  args.sink = floats(9);
  set_longs(args, longs);
  set_ints(args, ints);
  args.softmax_scale = softmax_scale;
  args.softcap = softcap;
  return args;
}

void forward(const Pointers& pointers, const Longs& longs, const Ints& ints, float softmax_scale,
             float softcap, Pointer workspace, Pointer stream) {
  hopper_attention_forward_args args = describe(pointers, longs, ints, softmax_scale, softcap);
  args.workspace = reinterpret_cast<void*>(workspace);
  args.stream = reinterpret_cast<void*>(stream);
  raise_on_failure(hopper_attention_forward(&args));
}

std::string explain(const Longs& longs, const Ints& ints, float softmax_scale, float softcap) {
  const hopper_attention_forward_args args = describe({}, longs, ints, softmax_scale, softcap);
  char buffer[2048];
  raise_on_failure(hopper_attention_explain_forward(&args, buffer, sizeof(buffer)));
  return buffer;
}

}  // namespace

void bind_forward_fp8(pybind11::module_& module) {
  module.def("forward_fp8", &forward, "Enqueue the e4m3 forward kernel; see abi.h.");
  module.def("explain_forward_fp8", &explain, "JSON: how an e4m3 call would run.");
}
