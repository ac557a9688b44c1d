// The C interface of the FP8 quantizer; a part of abi.h, whose rules hold here too.
#pragma once

#include "hopper_attention/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

// What shares a scale.
typedef enum hopper_attention_scale {
  HOPPER_ATTENTION_SCALE_TENSOR = 0,  // the whole tensor
  HOPPER_ATTENTION_SCALE_HEAD = 1,    // a head of a sequence
  HOPPER_ATTENTION_SCALE_BLOCK = 2,   // 128 tokens of a head; q and k only
  HOPPER_ATTENTION_SCALE_TOKEN = 3,   // a token of a head
  HOPPER_ATTENTION_SCALE_CHANNEL = 4  // a channel of a head; v only
} hopper_attention_scale;

// From q, k and v in 16 bits to e4m3 and float scales: x ~ x_out * descale. descale is the largest
// finite |x| of what shares it over 448, at least 2^-100 / 448, and 1 where all is zero. Finite
// values never overflow; NaN and infinity become e4m3's NaN, 0x7f.
//
// q and k pass, in this order, through rotary embedding, random signs, a Walsh-Hadamard transform
// and (k) the subtraction of the mean over the tokens of a head, each only where asked for.
//
// Packed sequences (cu_seqlens not null) lie one after the other: a tensor is (total, heads,
// head_dim), seqlen is total, and the batch strides are not read. In the outputs, "slots" are
// blocks of 128 tokens that restart at each sequence: those of sequence i start at slot
// cu_seqlens[i] / 128 + i, and there are total / 128 + batch in all.
typedef struct hopper_attention_quantize_args {
  uint64_t struct_size;  // sizeof(hopper_attention_quantize_args)

  const void* q;  // (batch, seqlen_q, heads, head_dim), or (seqlen_q, heads, head_dim) packed
  const void* k;  // (batch, seqlen_k, heads_kv, head_dim), likewise
  const void* v;  // (batch, seqlen_k, heads_kv, head_dim_v), likewise
  // e4m3, 16-byte aligned. Rows are written up to the next multiple of 16 elements, with zeros past
  // the head dimension. v_out has v's dimensions, or where v_transposed (batch, heads_kv,
  // head_dim_v, tokens), tokens being seqlen_k rounded up to 128, or (heads_kv, head_dim_v,
  // 128 * slots) packed: fp8.h's key_of_slot gives the order of each 16 tokens, and places without
  // a token are zero.
  void* q_out;
  void* k_out;
  void* v_out;
  // (batch, heads, n): n is 1 (tensor, head), ceil(seqlen / 128) (block), seqlen (token), or
  // head_dim_v (channel). Packed: block (heads, slots), token (heads, total), others the same.
  // v_descale of token is (batch, heads_kv, 1), the head's largest; a token's own is that times
  // v_token_factor, (batch, heads_kv, seqlen_k) or (heads_kv, total), in (0, 1].
  float* q_descale;
  float* k_descale;
  float* v_descale;
  float* v_token_factor;  // null unless v_scale is token
  float* k_mean;          // (batch, heads_kv, head_dim), 16-byte aligned; null unless smooth_k

  // Element strides; any for the inputs, multiples of 16 for the outputs. The stride of v_out
  // between tokens is v_out_stride_seq; between channels where v_transposed.
  int64_t q_stride_batch, q_stride_seq, q_stride_head;
  int64_t k_stride_batch, k_stride_seq, k_stride_head;
  int64_t v_stride_batch, v_stride_seq, v_stride_head;
  int64_t q_out_stride_batch, q_out_stride_seq, q_out_stride_head;
  int64_t k_out_stride_batch, k_out_stride_seq, k_out_stride_head;
  int64_t v_out_stride_batch, v_out_stride_seq, v_out_stride_head;

  int32_t dtype;  // hopper_attention_dtype of q, k and v
  int32_t batch;
  int32_t seqlen_q;
  int32_t seqlen_k;
  int32_t heads;                // 0: no q
  int32_t heads_kv;             // 0: neither k nor v
  int32_t head_dim;             // multiple of 8, 8 to 256
  int32_t head_dim_v;           // likewise
  const int32_t* cu_seqlens_q;  // (batch + 1) on the device, or null: not packed; both or neither
  const int32_t* cu_seqlens_k;

  int32_t qk_scale;  // hopper_attention_scale
  int32_t v_scale;
  int32_t hadamard;       // over blocks of the largest power of two that divides head_dim
  uint32_t sign_bits[8];  // bit c % 32 of word c / 32: channel c is negated first; hadamard only
  int32_t smooth_k;
  int32_t v_transposed;

  // Rotary embedding of the first rotary_dim channels of q and k; null: none. (rotary_max_len,
  // rotary_dim / 2) each. Pairs are channels 2i and 2i + 1 where interleaved, else i and
  // i + rotary_dim / 2. Key j stands at rotary_k_offset + j; query i at rotary_q_offset + i, plus
  // seqlen_k - seqlen_q of its sequence where rotary_q_aligned. Where a position is not in 0 to
  // rotary_max_len - 1 these channels of the token become NaN.
  const float* rotary_cos;
  const float* rotary_sin;
  int32_t rotary_dim;  // multiple of 16, at most head_dim
  int32_t rotary_max_len;
  int32_t rotary_interleaved;
  int32_t rotary_q_aligned;
  int64_t rotary_q_offset;
  int64_t rotary_k_offset;

  void* workspace;  // hopper_attention_quantize_workspace_bytes(), 16-byte aligned; any content
  void* stream;     // cudaStream_t; null is the default stream
} hopper_attention_quantize_args;

// Enqueues two kernels; three where K is smoothed.
HOPPER_ATTENTION_API hopper_attention_status
hopper_attention_quantize(const hopper_attention_quantize_args* args);

// Bytes of workspace that the call needs; pointers in args are not read. 0 where args is wrong.
HOPPER_ATTENTION_API size_t
hopper_attention_quantize_workspace_bytes(const hopper_attention_quantize_args* args);

#ifdef __cplusplus
}
#endif
