// The quantizer's part of the Python module _C.
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "bindings.h"
#include "hopper_attention/abi.h"

namespace {

using Pointer = std::uintptr_t;
// Grouped by type, so that a call converts a few tuples and not eighty arguments.
// q, k, v, q_out, k_out, v_out, q_descale, k_descale, v_descale, v_token_factor, k_mean,
// cu_seqlens_q, cu_seqlens_k, rotary_cos, rotary_sin; 0 is null
using Pointers = std::array<Pointer, 15>;
// (batch, seq, head) of q, k, v, q_out, k_out, v_out, then rotary_q_offset and rotary_k_offset
using Longs = std::array<std::int64_t, 20>;
// dtype, batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v, qk_scale, v_scale,
// hadamard, smooth_k, v_transposed, rotary_dim, rotary_max_len, rotary_interleaved,
// rotary_q_aligned
using Ints = std::array<std::int32_t, 17>;
using Signs = std::array<std::uint32_t, 8>;

void set_pointers(hopper_attention_quantize_args& args, const Pointers& p) {
  const auto in = [&](int i) { return reinterpret_cast<const void*>(p[i]); };
  const auto out = [&](int i) { return reinterpret_cast<void*>(p[i]); };
  const auto floats = [&](int i) { return reinterpret_cast<float*>(p[i]); };
  const auto ints = [&](int i) { return reinterpret_cast<const std::int32_t*>(p[i]); };
  args.q = in(0), args.k = in(1), args.v = in(2);
  args.q_out = out(3), args.k_out = out(4), args.v_out = out(5);
  args.q_descale = floats(6), args.k_descale = floats(7), args.v_descale = floats(8);
  args.v_token_factor = floats(9), args.k_mean = floats(10);
  args.cu_seqlens_q = ints(11), args.cu_seqlens_k = ints(12);
  args.rotary_cos = floats(13), args.rotary_sin = floats(14);
}

void set_longs(hopper_attention_quantize_args& args, const Longs& n) {
  args.q_stride_batch = n[0], args.q_stride_seq = n[1], args.q_stride_head = n[2];
  args.k_stride_batch = n[3], args.k_stride_seq = n[4], args.k_stride_head = n[5];
  args.v_stride_batch = n[6], args.v_stride_seq = n[7], args.v_stride_head = n[8];
  args.q_out_stride_batch = n[9], args.q_out_stride_seq = n[10], args.q_out_stride_head = n[11];
  args.k_out_stride_batch = n[12], args.k_out_stride_seq = n[13], args.k_out_stride_head = n[14];
  args.v_out_stride_batch = n[15], args.v_out_stride_seq = n[16], args.v_out_stride_head = n[17];
  args.rotary_q_offset = n[18], args.rotary_k_offset = n[19];
}

void set_ints(hopper_attention_quantize_args& args, const Ints& n) {
  args.dtype = n[0], args.batch = n[1], args.seqlen_q = n[2], args.seqlen_k = n[3];
  args.heads = n[4], args.heads_kv = n[5], args.head_dim = n[6], args.head_dim_v = n[7];
  args.qk_scale = n[8], args.v_scale = n[9];
  args.hadamard = n[10], args.smooth_k = n[11], args.v_transposed = n[12];
  args.rotary_dim = n[13], args.rotary_max_len = n[14];
  args.rotary_interleaved = n[15], args.rotary_q_aligned = n[16];
}

hopper_attention_quantize_args describe(const Pointers& pointers, const Longs& longs,
                                        const Ints& ints, const Signs& signs) {
  hopper_attention_quantize_args args{};
  args.struct_size = sizeof(args);
  set_pointers(args, pointers);
  set_longs(args, longs);
  set_ints(args, ints);
  for (std::size_t i = 0; i < signs.size(); ++i) args.sign_bits[i] = signs[i];
  return args;
}

void quantize(const Pointers& pointers, const Longs& longs, const Ints& ints, const Signs& signs,
              Pointer workspace, Pointer stream) {
  hopper_attention_quantize_args args = describe(pointers, longs, ints, signs);
  args.workspace = reinterpret_cast<void*>(workspace);
  args.stream = reinterpret_cast<void*>(stream);
  raise_on_failure(hopper_attention_quantize(&args));
}

std::size_t workspace_bytes(bool packed, const Ints& ints) {
  hopper_attention_quantize_args args = describe({}, {}, ints, {});
  // Not read: only whether they are null says that sequences are packed.
  static const std::int32_t kNotNull = 0;
  if (packed) args.cu_seqlens_q = args.cu_seqlens_k = &kNotNull;
  return hopper_attention_quantize_workspace_bytes(&args);
}

}  // namespace

void bind_quantize(pybind11::module_& module) {
  module.def("quantize", &quantize, "Enqueue the quantizer; see abi_quantize.h.");
  module.def("quantize_workspace_bytes", &workspace_bytes);
}
