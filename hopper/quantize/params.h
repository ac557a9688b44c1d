// What the quantizer's kernel is told.
#pragma once

#include <cstdint>

#include "hopper_attention/quantize.h"
#include "quantize/schedule.h"

namespace hopper_attention {

// One of q, k and v.
struct QuantizeTensor {
  const void* in;     // (batch, seqlen, heads, head_dim)
  std::uint8_t* out;  // likewise, or (batch, heads, head_dim, tokens) for a transposed V
  float* descale;     // (batch, heads, n), see abi_quantize.h
  // Workspace, see QuantizeWorkspace.
  std::uint64_t* found;            // (batch or 1, heads, slots) or of blocks of threads
  std::uint32_t* amax;             // (batch, heads) or (batch, heads, head_dim)
  std::uint32_t* infinite;         // (batch, heads), not 0 where there is an infinity
  std::uint32_t* measured;         // (batch or 1, heads): tiles that are in amax
  const std::int32_t* cu_seqlens;  // (batch + 1); null: dense
  std::int64_t in_stride_batch, in_stride_seq, in_stride_head;
  std::int64_t out_stride_batch, out_stride_seq, out_stride_head;
  std::int32_t batch;
  std::int32_t seqlen;  // of a sequence; of all where packed
  std::int32_t heads;
  std::int32_t head_dim;
  std::int32_t slots;  // blocks of 128 tokens: of a sequence; of all where packed
  HeadOrder order;
  ScaleKind scale;
  bool aligned;    // TMA can read it
  bool find_amax;  // a pass before the last looks for the largest |x|
};

struct QuantizeRotary {
  const float* cos;  // (max_len, dim / 2)
  const float* sin;
  std::int32_t dim;  // 0: none
  std::int32_t max_len;
  std::int64_t q_offset, k_offset;
  bool interleaved;
  bool q_aligned;
};

struct QuantizeParams {
  QuantizeTensor tensors[3];  // by QuantizeWhich
  QuantizeRotary rotary;
  QuantizeSchedule schedule;
  std::uint32_t* ticket;       // workspace
  std::int32_t hadamard_log2;  // of the channels it mixes; 0: none
  float hadamard_scale;
  std::uint32_t sign_bits[8];
  bool v_transposed;
  bool smooth_k;
  float* v_token_factor;  // (batch, heads_kv, seqlen_k); may be null
  float* k_mean;          // (batch, heads_kv, head_dim); may be null
  float* k_partial;       // workspace: (batch or 1, heads_kv, slots, head_dim)
  std::uint32_t* zeros;   // workspace: what begins as zero
  std::int64_t num_zeros;
  // Tickets that a block has without the counter of those, which may not be zero yet: it need not
  // wait for the kernels before.
  std::int32_t first_draws;
};

}  // namespace hopper_attention
