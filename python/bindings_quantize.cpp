// The quantizer's part of the Python module _C.
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "bindings.h"
#include "hopper_attention/abi.h"
#include "prepared.h"

namespace py = pybind11;

namespace {

// Grouped by type, so that a call converts a few tuples and not eighty arguments.
// (batch, seq, head) of q, k, v, q_out, k_out, v_out, then rotary_q_offset and rotary_k_offset
using Longs = std::array<std::int64_t, 20>;
// dtype, batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v, qk_scale, v_scale,
// hadamard, smooth_k, v_transposed, rotary_dim, rotary_max_len, rotary_interleaved,
// rotary_q_aligned
using Ints = std::array<std::int32_t, 17>;
using Signs = std::array<std::uint32_t, 8>;

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

struct QuantizeCall {
  using Args = hopper_attention_quantize_args;
  static constexpr Py_ssize_t kNumAddresses = 17;
  static constexpr const char* kName = "prepared_quantize";
  static constexpr const char* kDoc =
      "Enqueue the quantizer: q, k, v, cu_seqlens_q, cu_seqlens_k, rotary_cos, rotary_sin (0: "
      "none), q_out, k_out, v_out, q_descale, k_descale, v_descale, v_token_factor, k_mean, "
      "workspace, stream.";

  static void set_addresses(const Pointer (&addresses)[kNumAddresses], Args* args) {
    const auto in = [&](int i) { return reinterpret_cast<const void*>(addresses[i]); };
    const auto out = [&](int i) { return reinterpret_cast<void*>(addresses[i]); };
    const auto floats = [&](int i) { return reinterpret_cast<float*>(addresses[i]); };
    const auto ints = [&](int i) { return reinterpret_cast<const std::int32_t*>(addresses[i]); };
    args->q = in(0), args->k = in(1), args->v = in(2);
    args->cu_seqlens_q = ints(3), args->cu_seqlens_k = ints(4);
    args->rotary_cos = floats(5), args->rotary_sin = floats(6);
    args->q_out = out(7), args->k_out = out(8), args->v_out = out(9);
    args->q_descale = floats(10), args->k_descale = floats(11), args->v_descale = floats(12);
    args->v_token_factor = floats(13), args->k_mean = floats(14);
    args->workspace = out(15);
    args->stream = out(16);
  }
  static hopper_attention_status run(const Args* args) { return hopper_attention_quantize(args); }
};

// The call, and the bytes of workspace that it needs.
py::tuple prepare(bool packed, const Longs& longs, const Ints& ints, const Signs& signs) {
  hopper_attention_quantize_args args{};
  args.struct_size = sizeof(args);
  set_longs(args, longs);
  set_ints(args, ints);
  for (std::size_t i = 0; i < signs.size(); ++i) args.sign_bits[i] = signs[i];
  // Not read for the workspace: only whether they are null says that sequences are packed.
  static const std::int32_t kNotNull = 0;
  if (packed) args.cu_seqlens_q = args.cu_seqlens_k = &kNotNull;
  const std::size_t bytes = hopper_attention_quantize_workspace_bytes(&args);
  return py::make_tuple(make_prepared<QuantizeCall>(args), bytes);
}

}  // namespace

void bind_quantize(pybind11::module_& module) {
  module.def("prepare_quantize", &prepare,
             "Of a call of the quantizer: what takes the addresses, and its workspace's bytes.");
}
